"""Seconds and memory of a run on few scored docs beside a large training split: lm-eval's ``hf``, and t2.

    python -m benchmarks.reading [ROWS]

Each row is a process of its own on a tiny random model. ``cem: pool`` finds and draws the docs of a search without
searching. Seconds and the growth of the peak of resident memory are those of the evaluation, the model loaded before.
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
KINDS = ("hf", "adapt=none", "cem: pool")


def main() -> None:
    if len(sys.argv) == 4:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
        return
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    print(f"{describe_machine()}; {describe_versions('lm_eval', 'datasets', 'torch')}")
    print(f"{SCORED} scored docs, {rows} training docs")
    print("run         seconds  of hf's  MiB")
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), rows)
        base = 0.0
        for kind in KINDS:
            command = [sys.executable, "-m", "benchmarks.reading", kind, str(rows), folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds, grown = json.loads(done.stdout.splitlines()[-1])
            base = base or seconds
            print(f"{kind:10}  {seconds:7.2f}  {seconds / base:7.2f}  {grown / 2**20:.0f}")


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
    """Seconds, and bytes by which the peak of resident memory grew."""
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
    lm = T2LM(**args) if kind == "adapt=none" else HFLM(**args)
    run: Callable[[], Any] = lambda: tiny.evaluate(lm, [task])  # noqa: E731
    if kind == "cem: pool":
        run = lambda: draw(find_pool(task), TaskDocs(task, lm), 10, 0)  # noqa: E731
    before, start = peak_bytes(), time.perf_counter()
    run()
    return time.perf_counter() - start, peak_bytes() - before


def peak_bytes() -> int:
    """The largest resident memory that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
