"""Few-shot search among 3, 30 and 300 experts, with and without preselection: seconds, memory, mixtures, scores.

    python benchmarks/many_experts.py --output many_experts.json [--task t2_arc_easy] [--counts 3 30 30:none 300]

The experts are the demo experts and variants of them: scaled towards or away from the base, shuffled within each matrix
(two in five), and with noise. ``30:none`` is 30 experts without preselection. Every count runs in a process of its own,
so that the peak of memory is its own. The chosen mixture and the base also answer further docs of the pool that no
search has seen; nothing of the test split is read.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z, load_expert, save_expert
from t2.adapters.search import NO_BUDGET, Meter
from t2.adapters.strategies import STRATEGIES, Job, Options
from t2.adapters.strategies.preselect import preselect
from t2.adapters.strategies.scorers import Metered
from t2.core.files import atomic_write
from t2.core.seeds import generator
from t2.harness.adaptation import Runtime, check_experts_move
from t2.harness.args import parse_args
from t2.harness.base import base_id, open_base
from t2.harness.experts import prepare_experts, read_experts
from t2.harness.pool import draw, find_pool
from t2.harness.scorer import TaskScorer
from t2.harness.shipped import demo_dir
from t2.harness.tasks import PromptForm, TaskDocs, encode_pair, load_task

SCORES = (("before", "after"), ("further_before", "further_after"))
DEMO = ("math", "code", "reasoning")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="t2_arc_easy")
    parser.add_argument("--counts", nargs="+", default=["3", "30", "30:none", "300"], help="experts[:preselect]")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--population", type=int, default=12)
    parser.add_argument("--generations", type=int, default=5)
    parser.add_argument("--further", type=int, default=100, help="docs of the pool that judge the result")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return
    found = []
    for count in args.counts:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", count]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    report = {"setting": {k: v for k, v in vars(args).items() if k not in ("one", "output")}, "results": found}
    report["machine"] = {"cpus": os.cpu_count(), "torch": torch.__version__}
    print(table(found))
    if args.output:
        atomic_write(args.output, json.dumps(report, indent=2, default=str).encode())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One row: ``args.one`` experts."""
    count, _, wanted = args.one.partition(":")
    lm = open_base(dtype=args.dtype)
    engine = TransformersEngine(lm.model, lm.tokenizer, base_id(None))
    row: dict[str, Any] = {"experts": int(count), "preselect": wanted or str(Options().preselect)}
    with tempfile.TemporaryDirectory() as folder:
        names = make_experts(Path(folder), int(count), args.seed)
        start = time.perf_counter()
        settings = parse_args({"adapt": "cem", "experts": names, "preselect": row["preselect"]})
        experts = prepare_experts(settings, read_experts(names), engine.base, engine.ranks())
        row["loading"] = time.perf_counter() - start
    row["experts_mb"] = sum(z.nbytes for expert in experts for z in expert.z.values()) / 2**20
    engine.bases(engine.ranks())
    start = time.perf_counter()
    check_experts_move(Runtime(lm, engine, tuple(experts), settings))
    row["check"] = time.perf_counter() - start

    task = load_task(args.task)
    pool = find_pool(task)
    docs = TaskDocs(task, lm, PromptForm(), forbidden=pool.scored)
    drawn = draw(pool, docs, args.shots + args.further, args.seed)
    scorer = TaskScorer(docs, drawn[: args.shots], engine, seed=args.seed, progress=False)
    options = Options(
        population=args.population,
        generations=args.generations,
        normalise="sum",
        preselect=settings.preselect,
        seed=args.seed,
    )
    job = Job(args.task, [""], experts, engine, options, partial(encode_pair, lm), lambda text: text, scorer)
    scorer.evaluate([None])
    start = time.perf_counter()
    row["preselection_evaluations"] = 0.0
    if settings.preselect is not None and len(experts) > settings.preselect:
        meter = Meter(NO_BUDGET, time.perf_counter)
        selected = preselect(job, Metered(scorer, meter), meter)
        job = replace(job, experts=selected.experts)
        row["preselection_evaluations"] = selected.report.evaluations
    row["preselection"] = time.perf_counter() - start
    start = time.perf_counter()
    plan = STRATEGIES["cem"]().plan(replace(job, progress=False))
    row["search"] = time.perf_counter() - start
    assert plan.search is not None
    assert plan.held_out is not None
    row |= {
        "search_evaluations": plan.search.evaluations,
        "stopped": plan.search.stopped,
        "before": plan.held_out.before,
        "after": plan.held_out.after,
        "alpha": plan.choices[0].alpha,
    }
    judge = TaskScorer(docs, drawn[args.shots :], engine, seed=args.seed, progress=False)
    row["further_before"], row["further_after"] = (s.value for s in judge.evaluate([None, plan.choices[0].z]))
    row["further"] = len(drawn) - args.shots
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return row


def make_experts(folder: Path, count: int, seed: int) -> list[str]:
    """Write experts and return their files: the demo experts, then variants of them in turn."""
    demo = [load_expert(demo_dir() / name / "expert.safetensors") for name in DEMO]
    names = []
    for index in range(count):
        source = demo[index % len(demo)]
        rng = generator(seed, "many experts", index)
        scale, noise, shuffled = rng.uniform(-1, 1.5), rng.uniform(0, 0.06), rng.random() < 0.4
        z: Z = dict(source.z)
        if index >= len(demo):
            for name, vector in source.z.items():
                moved = vector - 1
                if shuffled:
                    moved = moved[torch.from_numpy(rng.permutation(len(moved)))]
                drawn = torch.from_numpy(rng.standard_normal(len(moved))).float()
                z[name] = 1 + scale * moved + noise * drawn
        path = folder / f"e{index}.safetensors"
        save_expert(path, source.manifest.model_copy(update={"name": f"e{index}"}), z)
        names.append(str(path))
    return names


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    heads = [
        "experts",
        "preselect",
        "loading",
        "check",
        "preselection",
        "search",
        "mixtures",
        "experts' memory",
        "peak",
    ]
    heads += ["adaptation docs", "further docs"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for r in rows:
        look, searched = r["preselection_evaluations"], r["search_evaluations"]
        cells = [str(r["experts"]), r["preselect"]]
        cells += [f"{r[name]:.1f} s" for name in ("loading", "check", "preselection", "search")]
        cells += [f"{look:.0f} + {searched:.0f}", f"{r['experts_mb']:.0f} MB", f"{r['peak_mb']:.0f} MB"]
        cells += [f"{100 * r[a]:.0f}% → {100 * r[b]:.0f}%" for a, b in SCORES]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
