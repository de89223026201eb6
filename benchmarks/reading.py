"""Seconds and memory of a run on few scored docs beside a large training split: lm-eval's ``hf``, and t2.

    python -m benchmarks.reading [ROWS]

Each row is a process of its own on a tiny random model, run several times in turn; the best time counts. ``cem: pool``
finds and draws the docs of a search without searching. Seconds are those of the evaluation, the model loaded before.
MiB is the peak of the process's resident memory; its difference from the row ``load``, which loads the same libraries
and model and evaluates nothing, is what the evaluation needs.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, describe_versions

SCORED = 5
KINDS = ("load", "hf", "adapt=none", "cem: pool")
ROUNDS = 3


def main() -> None:
    if len(sys.argv) == 4:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
        return
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    print(f"{describe_machine()}; {describe_versions('lm_eval', 'datasets', 'torch')}")
    print(f"{SCORED} scored docs, {rows} training docs")
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), rows)
        found: dict[str, list[tuple[float, int]]] = {kind: [] for kind in KINDS}
        for _ in range(ROUNDS):
            for kind in KINDS:
                command = [sys.executable, "-m", "benchmarks.reading", kind, str(rows), folder]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[kind].append(json.loads(done.stdout.splitlines()[-1]))
    best = {kind: (min(s for s, _ in runs), min(peak for _, peak in runs)) for kind, runs in found.items()}
    print("run         seconds  of hf's  peak MiB  above load")
    for kind, (seconds, peak) in best.items():
        above = (peak - best["load"][1]) / 2**20
        print(f"{kind:10}  {seconds:7.2f}  {seconds / best['hf'][0]:7.2f}  {peak / 2**20:8.0f}  {above:10.0f}")


def write_data(folder: Path, rows: int) -> None:
    """A tiny model, and the rows of the task as the data sets library keeps them."""
    import datasets

    from tests.harness import tiny

    tiny.save_model(folder / "model")
    for split, count in (("test", SCORED), ("training", rows)):
        made = [
            {"q": f"{split} {i}: what is {i} times 7?", "choices": list("abcd"), "gold": i % 4} for i in range(count)
        ]
        datasets.Dataset.from_list(made).save_to_disk(folder / split)


def measure(kind: str, rows: int, folder: Path) -> tuple[float, int]:
    """Seconds of an evaluation, and the peak of this process's resident memory in bytes."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    from t2.harness.model import T2LM
    from t2.harness.pool import draw, find_pool
    from t2.harness.tasks import TaskDocs
    from tests.harness import tiny

    splits = {split: datasets.load_from_disk(folder / split) for split in ("test", "training")}
    config = {
        **{f"{split}_split": split for split in splits},
        "task": "few_scored",
        "custom_dataset": lambda **_: splits,
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{q}}\nA:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    }
    task = ConfigurableTask(config=config)
    args: dict[str, Any] = {"pretrained": str(folder / "model"), "device": "cpu"}
    lm: Any = HFLM(**args) if kind in ("load", "hf") else T2LM(**args)
    run: Callable[[], Any] = lambda: tiny.evaluate(lm, [task])  # noqa: E731
    if kind == "cem: pool":
        run = lambda: draw(find_pool(task), TaskDocs(task, lm.inner), 10, 0)  # noqa: E731
    if kind == "load":
        run = lambda: None  # noqa: E731
    start = time.perf_counter()
    run()
    return time.perf_counter() - start, peak_bytes()


def peak_bytes() -> int:
    """The largest resident memory that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
