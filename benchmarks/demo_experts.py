"""What a demo expert does to the test split of its own benchmark, beside its controls.

    python benchmarks/demo_experts.py [--task t2_arc_easy] [--expert demo/reasoning] [--limit N] [--letters N]
    [--output FILE]

Scores every test document under the base, the expert and the expert with z shuffled within each matrix, all in one
run, and compares them document by document with the exact McNemar test. With ``--letters`` it also asks for the
answer's letter by likelihood, where a preference for some letters may pass for skill: there the base stands twice, as
it is and with its letter prior, estimated on validation documents without their labels, taken off.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import binomtest

from t2.adapters.controls import control_expert
from t2.adapters.engine import ScoreRequest
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z, check_expert, load_expert
from t2.core.files import atomic_write
from t2.harness.base import base_id, open_base
from t2.harness.catalogue import find_expert
from t2.harness.tasks import PromptForm, TaskDocs, encode_pair, load_task

Scores = npt.NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="t2_arc_easy")
    parser.add_argument("--expert", default="demo/reasoning")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--control-seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="score the first so many test documents only")
    parser.add_argument("--letters", type=int, default=0, help="ask for letters on so many documents of an ARC task")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    lm = open_base(dtype=args.dtype)
    engine = TransformersEngine(lm.model, lm.tokenizer, base_id(None))
    expert = load_expert(find_expert(args.expert))
    check_expert(expert, engine.base, engine.ranks())
    mixtures: dict[str, Z | None] = {
        "base": None,
        "expert": expert.z,
        "shuffled": control_expert(expert, "shuffle", args.control_seed).z,
    }
    report: dict[str, Any] = {
        "task": args.task,
        "base": engine.base.model_dump(),
        "dtype": args.dtype,
        "expert": {"name": args.expert, "digest": expert.digest},
        "control_seed": args.control_seed,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
    }
    task = load_task(args.task)
    start = time.perf_counter()
    docs = TaskDocs(task, lm, PromptForm())
    report["likelihood"] = likelihood(engine, docs, list(task.test_docs())[: args.limit], mixtures)
    if args.letters:
        letters = load_task(f"{args.task}_letter")
        report["letters"] = letter_form(engine, lm, letters, mixtures, args.letters)
    report["seconds"] = round(time.perf_counter() - start, 1)
    if args.output:
        atomic_write(args.output, json.dumps(report, indent=2).encode())


def likelihood(
    engine: TransformersEngine, docs: TaskDocs, test: Sequence[Any], mixtures: Mapping[str, Z | None]
) -> Any:
    """The task's own metrics under each mixture."""
    requests = docs.instances(test)
    found: dict[str, dict[str, Scores]] = {}
    for name, z in mixtures.items():
        with engine.applied(z):
            answers = docs.answer(engine, requests, progress=name)
        metrics = [docs.metrics(doc, r, a) for doc, r, a in zip(test, requests, answers, strict=True)]
        for metric in metrics[0]:
            found.setdefault(metric, {})[name] = np.array([m[metric] for m in metrics], dtype=np.float64)
    return {metric: table(f"{docs.name}, {metric}", scores) for metric, scores in found.items()}


def letter_form(engine: TransformersEngine, lm: Any, task: Any, mixtures: Mapping[str, Z | None], count: int) -> Any:
    """Likelihood of the letters A, B, … after a prompt that lists the options."""
    test, pool = list(task.test_docs())[:count], list(task.validation_docs())
    gold = [doc["choices"]["label"].index(doc["answerKey"]) for doc in test]
    prior = np.zeros(8)
    with engine.applied(None):
        asked = log_letters(engine, lm, task, pool)
    for place in range(8):
        seen = [row[place] for row in asked if len(row) > place]
        prior[place] = float(np.mean(seen)) if seen else 0.0
    scores: dict[str, Scores] = {}
    chosen: dict[str, list[int]] = {}
    for name, z in mixtures.items():
        with engine.applied(z):
            rows = log_letters(engine, lm, task, test)
        chosen[name] = [int(np.argmax(row)) for row in rows]
        if name == "base":
            chosen["base, letter prior off"] = [int(np.argmax(row - prior[: len(row)])) for row in rows]
    for name, picks in chosen.items():
        scores[name] = np.array([float(a == b) for a, b in zip(picks, gold, strict=True)])
    shares = {name: [round(picks.count(k) / len(picks), 3) for k in range(4)] for name, picks in chosen.items()}
    rows_of = table(f"{task.task_name} by likelihood of the letter", scores)
    for name, share in shares.items():
        print(f"{name}: letters A to D chosen {share}")
    return {"scores": rows_of, "letters": shares}


def log_letters(engine: TransformersEngine, lm: Any, task: Any, docs: Sequence[Any]) -> list[Scores]:
    """For each doc the log-probabilities of its letters, normalised over them."""
    requests, sizes = [], []
    for doc in docs:
        context = task.doc_to_text(doc)
        pairs = [encode_pair(lm, context, f" {label}") for label in doc["choices"]["label"]]
        requests += [ScoreRequest(tuple(left), tuple(right)) for left, right in pairs]
        sizes.append(len(pairs))
    values = torch.tensor([found.loglikelihood for found in engine.score(requests, progress="letters")])
    return [torch.log_softmax(row, dim=0).numpy().astype(np.float64) for row in values.split(sizes)]


def table(title: str, scores: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """Print and return each row's score with its standard error, and its paired difference to the base."""
    base = scores["base"]
    print(f"\n{title}, {len(base)} documents\n")
    print("| | score | ± | better / worse than base | exact McNemar p |\n|---|---|---|---|---|")
    rows = []
    for name, own in scores.items():
        better, worse = int((own > base).sum()), int((own < base).sum())
        p = binomtest(better, better + worse).pvalue if better + worse else 1.0
        score, error = float(own.mean()), float(own.std(ddof=1) / np.sqrt(len(own)))
        row = {"name": name, "n": len(own), "score": score, "stderr": error, "better": better, "worse": worse, "p": p}
        rows.append(row)
        paired = "– | –" if name == "base" else f"{better} / {worse} | {p:.2g}"
        print(f"| {name} | {100 * score:.1f} | {100 * error:.1f} | {paired} |")
    return rows


if __name__ == "__main__":
    main()
