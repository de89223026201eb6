"""``adapt=none`` against lm-eval's own ``hf``: the same tasks over the same loaded model in one process.

Timed are whole evaluations, loading of the task included; building the two models over one that is loaded is timed
apart. The scores must be equal.
"""

from __future__ import annotations

import argparse
import functools
import logging
import time
from collections.abc import Iterator
from typing import Any

from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from benchmarks.speed.rows import Row, in_turn
from t2.harness.base import open_base
from t2.harness.model import T2LM
from t2.harness.tasks import load_task

TASKS = {"t2_arc_challenge": 50, "t2_arc_challenge_letter": 50}
"""Documents of a task of likelihoods and of a generated one."""


def run(args: argparse.Namespace) -> Iterator[Row]:
    """Measure; see :class:`benchmarks.speed.rows.Benchmark`."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    loaded = open_base(dtype=dtype, device=args.device, batch_size=16)
    given: dict[str, Any] = {"pretrained": loaded.model, "tokenizer": loaded.tokenizer, "batch_size": 16}
    built = []
    for make in (HFLM, T2LM):
        began = time.perf_counter()
        make(**given) if make is HFLM else make(device=args.device, **given)
        built.append(time.perf_counter() - began)
    hf, t2 = HFLM(**given), T2LM(device=args.device, **given)
    for name, docs in TASKS.items():
        count = 4 if args.quick else docs

        def evaluate(lm: Any, name: str = name, count: int = count) -> dict[str, Any]:
            return dict(
                evaluator.simple_evaluate(
                    lm,
                    tasks=[load_task(name)],
                    task_manager=TaskManager(include_defaults=False),
                    limit=count,
                    bootstrap_iters=0,
                    log_samples=False,
                )["results"][name]
            )

        sides: list[Any] = [functools.partial(evaluate, lm) for lm in (hf, t2)]
        (plain, own), (expected, found) = in_turn(sides, args.repeats, args.device, warm=False)
        if found != expected:
            raise SystemExit(f"{name}: adapt=none scores {found}, hf {expected}")
        yield Row(
            f"adapt=none, {name}, {dtype}",
            "lm-eval's hf",
            own / plain,
            "wall time / hf's",
            1.02,
            "below",
            f"{own:.2f} s and {plain:.2f} s for {count} documents; building the model over a loaded one "
            f"{built[1]:.2f} s and {built[0]:.2f} s",
        )
