"""Whether what lies between two trainings of one task is as good as they are: SVF beside adapters of PEFT.

    python -m benchmarks.interpolation --folder FOLDER [--task t2_arc_easy] [--methods svf lora] [--steps N --batch N …]
    [--docs N] [--points N] [--output FILE]

Trains each method with two seeds, which split and order the documents differently and draw other first values of an
adapter, and answers test documents, which neither has seen, with θ(t) = (1−t)·θ₀ + t·θ₁. θ are the numbers that were
trained: z of an expert, in which the weights are linear, or the parameters of an adapter, in whose product they are
not. It prints score and expected reward at each t beside the base's, and what the midpoint has less the mean of the
ends, paired by document. A training that was stopped goes on where it was, and a finished one is taken as it is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM

from benchmarks.machine import describe_machine, describe_versions
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z
from t2.core.errors import TaskError
from t2.core.files import atomic_write
from t2.core.statistics import mean_interval, paired
from t2.harness.base import open_base
from t2.harness.tasks import TaskDocs, load_task
from t2.training import folders
from t2.training.api import finished, task_docs, train
from t2.training.checkpoint import load_checkpoint
from t2.training.config import METHODS, TrainConfig, make_config
from t2.training.methods import build_engine, build_method
from t2.training.objective import expected_reward

SEEDS = (0, 1)
_RATES = {"svf": 5e-3, "lora": 2e-3, "dora": 2e-3, "ia3": 5e-3}


@dataclass(frozen=True)
class Answered:
    """Some test documents under one θ.

    Attributes:
        t: its place between the two trainings; None is the base.
        scores: the task's metric of each document.
        rewards: the expected reward of each.
    """

    t: float | None
    scores: list[float]
    rewards: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where trainings lie")
    parser.add_argument("--task", default="t2_arc_easy", help="one of choices")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["svf", "lora"])
    parser.add_argument("--targets", default="all")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--validation-docs", type=int, default=128)
    parser.add_argument("--points", type=int, default=5, help="numbers t from 0 to 1; an odd one has the midpoint")
    parser.add_argument("--docs", type=int, default=500, help="test documents")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args()
    if args.points < 3 or args.points % 2 == 0:
        parser.error("--points must be odd, and 3 at least")

    lm, task = open_base(dtype=args.dtype), load_task(args.task)
    found: dict[str, list[Answered]] = {}
    for method in args.methods:
        configs = [
            make_config(
                task=args.task,
                name=f"{method}-seed{seed}",
                method=method,
                model_args={"dtype": args.dtype},
                targets=args.targets,
                steps=args.steps,
                batch=args.batch,
                learning_rate=_RATES[method],
                clip=1.0,
                validation_docs=args.validation_docs,
                validate_every=args.steps,
                patience=0,
                select="reward",
                seed=seed,
            )
            for seed in SEEDS
        ]
        base = next(iter(found.values()))[0] if found else None
        found[method] = between(configs, args.folder, lm, task, args.points, args.docs, base)
    settings = {name: value for name, value in vars(args).items() if name not in ("folder", "output")}
    told = {"machine": describe_machine(), "versions": describe_versions("torch", "peft", "transformers", "lm-eval")}
    print(markdown(found))
    if args.output is not None:
        report = {**told, "settings": settings, **summary(found)}
        atomic_write(args.output, (json.dumps(report, indent=2) + "\n").encode())


def between(
    configs: Sequence[TrainConfig],
    folder: Path,
    lm: HFLM,
    task: Task,
    points: int,
    docs: int,
    base: Answered | None = None,
) -> list[Answered]:
    """The base, then θ(t) at some t from 0 to 1, over the first test documents.

    Args:
        configs: of the two trainings, which differ in seed and name.
        folder: where they lie, or are to lie.
        lm: the base model.
        task: one of choices.
        points: how many t.
        docs: how many documents.
        base: what the base answered, where it is known.

    Raises:
        T2Error: a training fails, or the task's answers are no choices.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        raise TaskError(f"task {task.task_name} has no choices, over which rewards are expected; name one that has")
    for config in configs:
        if finished(config, folder) is None:
            train(config, folder=folder, lm=lm, task=task)
    first, last = (load_checkpoint(folder / config.name / folders.CHECKPOINT).best_theta for config in configs)
    engine = build_engine(lm, configs[0])
    try:
        parameters = build_method(configs[0], engine, progress=False).parameters
        seen, test = task_docs(configs[0], task, lm), list(task.test_docs())[:docs]
        places = [index / (points - 1) for index in range(points)]
        return [
            base or answered(None, None, engine, seen, test),
            *(answered(t, parameters.z((1 - t) * first + t * last), engine, seen, test) for t in places),
        ]
    finally:
        engine.close()


def answered(t: float | None, z: Z | None, engine: TransformersEngine, docs: TaskDocs, test: Sequence[Any]) -> Answered:
    """The score of each document, and 2·p − 1 with p the softmax of the choices' log-likelihoods at the right one."""
    requests = docs.instances(test)
    with engine.applied(z):
        responses = docs.answer(engine, requests, progress="base" if t is None else f"t = {t:g}")
    scores, rewards = [], []
    for doc, instances, own in zip(test, requests, responses, strict=True):
        number = docs.number(docs.metrics(doc, instances, own))
        assert number is not None
        scores.append(number)
        choices = torch.tensor([response[0] for response in own if isinstance(response, tuple)], dtype=torch.float64)
        earned = torch.full_like(choices, -1.0)
        earned[docs.gold_index(doc)] = 1.0
        rewards.append(float(expected_reward(choices, earned)))
    return Answered(t, scores, rewards)


def midpoint(found: Sequence[Answered]) -> dict[str, dict[str, float]]:
    """What the midpoint has less the mean of the ends, paired by document: difference, 95% interval and p.

    Args:
        found: the base and then an odd number of t from 0 to 1.
    """
    places = found[1:]
    assert all(one.t is not None and other.t is not None and one.t < other.t for one, other in pairwise(places))
    middle, ends = places[len(places) // 2], (places[0], places[-1])
    told = {}
    for name in ("scores", "rewards"):
        mean = [fmean(pair) for pair in zip(*(getattr(end, name) for end in ends), strict=True)]
        one = paired(getattr(middle, name), mean)
        told[name] = {"difference": one.difference, "low": one.interval.low, "high": one.interval.high, "p": one.p}
    return told


def summary(found: Mapping[str, Sequence[Answered]]) -> dict[str, Any]:
    """All of it as JSON, the documents included."""
    return {
        "methods": {
            method: {"midpoint_less_ends": midpoint(rows), "points": [asdict(row) for row in rows]}
            for method, rows in found.items()
        }
    }


def markdown(found: Mapping[str, Sequence[Answered]]) -> str:
    """A table of means with 95% intervals over documents, and the midpoints."""
    lines = ["| method | t | score, % [95%] | expected reward [95%] |", "|---|---|---|---|"]
    for method, rows in found.items():
        for row in rows:
            score, reward = mean_interval(row.scores), mean_interval(row.rewards)
            lines.append(
                f"| {method} | {'base' if row.t is None else f'{row.t:g}'} | {100 * fmean(row.scores):.1f} "
                f"[{100 * score.low:.1f}, {100 * score.high:.1f}] | {fmean(row.rewards):+.3f} "
                f"[{reward.low:+.3f}, {reward.high:+.3f}] |"
            )
    lines += ["", "| method | n | midpoint less mean of ends: score, points [95%], p | expected reward [95%], p |"]
    lines.append("|---|---|---|---|")
    for method, rows in found.items():
        of_score, of_reward = (midpoint(rows)[name] for name in ("scores", "rewards"))
        points = [f"{100 * of_score[name]:+.1f}" for name in ("difference", "low", "high")]
        earned = [f"{of_reward[name]:+.4f}" for name in ("difference", "low", "high")]
        lines.append(
            f"| {method} | {len(rows[0].scores)} | {points[0]} [{points[1]}, {points[2]}], {of_score['p']:.3f} "
            f"| {earned[0]} [{earned[1]}, {earned[2]}], {of_reward['p']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
