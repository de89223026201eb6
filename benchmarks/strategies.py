"""Every strategy on tasks of different kinds: score, held-out score and seconds of each pass.

    python benchmarks/strategies.py --output strategies.json [--tasks t2_arc_challenge:200 …] [--strategies cem …]
    [--common dtype=bfloat16,…] [--gen-kwargs max_gen_toks=192]

One lm-eval run per strategy, on the same documents: the first N of each task. A strategy that stands in the output file
already is not run again, so an interrupted benchmark goes on where it was. Running HumanEval executes what the model
writes, in t2's sandbox.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import time
from pathlib import Path
from typing import Any

from lm_eval import evaluator
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string

from t2.core.errors import T2Error
from t2.core.files import atomic_write
from t2.harness.model import T2LM
from t2.harness.tasks import load_task

STRATEGIES = {
    "none": "adapt=none",
    "expert": "adapt=expert,experts=demo/reasoning",
    "expert, shuffled": "adapt=expert,experts=demo/reasoning,control=shuffle",
    "mix": "adapt=mix",
    "prompt": "adapt=prompt",
    "prompt, generated": "adapt=prompt,dispatch=generate",
    "classifier": "adapt=classifier",
    "cem": "adapt=cem",
    "cem, per layer": "adapt=cem,per=layer",
    "cem, CMA-ES": "adapt=cem,search=cma",
    "cem, random": "adapt=cem,search=random",
    "auto": "adapt=auto",
}
SEARCH = "population=12,generations=5"
"""Size of every search, so that the table is done in an hour or two on two cores."""
TASKS = ("t2_arc_challenge:200", "t2_humaneval:30", "t2_gsm8k_steps:200")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="name:documents")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--common", default="dtype=bfloat16", help="model_args of every strategy")
    parser.add_argument("--search", default=SEARCH, help="model_args of the strategies that search")
    parser.add_argument("--gen-kwargs", default="max_gen_toks=192", help="over those of the tasks")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    sizes = {name: int(count) for name, _, count in (task.partition(":") for task in args.tasks)}
    setting: dict[str, Any] = {
        "tasks": sizes,
        "common": args.common,
        "search": args.search,
        "gen_kwargs": args.gen_kwargs,
        "batch_size": args.batch_size,
    }
    report = json.loads(args.output.read_text()) if args.output.exists() else {**setting, "strategies": {}}
    if {key: report.get(key) for key in setting} != setting:
        raise SystemExit(f"{args.output} holds a benchmark of other settings; name another file")
    report["machine"] = {"cpus": os.cpu_count(), "torch": importlib.metadata.version("torch")}
    for name in args.strategies:
        if name in report["strategies"]:
            continue
        own = STRATEGIES[name]
        searches = "adapt=cem" in own or "adapt=auto" in own
        model_args = ",".join(part for part in (own, args.common, args.search if searches else "") if part)
        try:
            report["strategies"][name] = run(model_args, sizes, args.gen_kwargs, args.batch_size)
        except T2Error as error:
            raise SystemExit(f"{name} ({model_args}): {error}") from error
        atomic_write(args.output, json.dumps(report, indent=2).encode())
    for task in sizes:
        print(table(task, sizes[task], report["strategies"]))


def run(model_args: str, sizes: dict[str, int], gen_kwargs: str, batch_size: int) -> dict[str, Any]:
    """Scores and records of one strategy on all tasks."""
    start = time.perf_counter()
    lm = T2LM.create_from_arg_obj(simple_parse_args_string(model_args), {"batch_size": batch_size})
    results = evaluator.simple_evaluate(
        lm,
        tasks=[load_task(name) for name in sizes],
        task_manager=TaskManager(include_defaults=False),
        samples={name: list(range(count)) for name, count in sizes.items()},
        gen_kwargs=gen_kwargs,
        confirm_run_unsafe_code=True,
        log_samples=False,
    )
    seconds = time.perf_counter() - start
    assert results is not None
    records = {record["task"]: record for record in results["config"]["t2"]["records"]}
    tasks = {}
    for name in sizes:
        metric, value = next((k, v) for k, v in results["results"][name].items() if "," in k and "stderr" not in k)
        error = results["results"][name].get(metric.replace(",", "_stderr,"))
        tasks[name] = {
            "metric": metric,
            "score": value,
            "stderr": error if isinstance(error, float) else None,
            "record": records[name],
        }
    return {"model_args": model_args, "seconds": round(seconds, 1), "tasks": tasks}


def table(task: str, count: int, strategies: dict[str, Any]) -> str:
    """One task's rows as Markdown."""
    rows = [
        f"\n{task}, {count} documents, {next(iter(strategies.values()))['tasks'][task]['metric']}\n",
        "| strategy | score | ± | held-out score | pass 1, s | pass 2, s | what answered |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in strategies.items():
        own = found["tasks"][task]
        record = own["record"]
        held = record["held_out"]
        shown = "–" if held is None else f"{percent(held['before'])} → {percent(held['after'])}"
        error = percent(own["stderr"])
        timing = record["timing"]
        rows.append(
            f"| {name} | {percent(own['score'])} | {error} | {shown} | {timing['pass1']:.0f} | {timing['pass2']:.0f} "
            f"| {record['note']} |"
        )
    return "\n".join(rows)


def percent(value: float | None) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{100 * value:.1f}"


if __name__ == "__main__":
    main()
