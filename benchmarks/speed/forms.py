"""Measured costs beside those of the cost model, for the constants of ``engine/costs.py``.

Passes of the base and passes in activation form, with up to 32 mixtures in a batch, alternate at several numbers of
tokens; so do a pass and a change of the weights. Each figure is a ratio of two such costs, next to the same ratio by
:class:`t2.adapters.engine.costs.CostModel`. On a CPU, processor time of one thread (``OMP_NUM_THREADS=1``) is measured,
because other programs affect it less than elapsed time. The model has random weights, as in ``switch``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.speed.rows import Row
from benchmarks.speed.shapes import engine_of, random_experts, random_model
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z, mix

_TOKENS = ((1, 1), (4, 1), (16, 1), (32, 1), (128, 1), (1, 64), (1, 256))
"""Rows and tokens per row: steps of generation, then prompts."""


def run(args: argparse.Namespace) -> Iterator[Row]:
    """Measure; see :class:`benchmarks.speed.rows.Benchmark`."""
    for dtype in (torch.bfloat16, torch.float32):
        engine = engine_of(random_model(args.device, dtype, 1 if args.quick else None, args.seed))
        yield from _rows(args, engine, str(dtype).removeprefix("torch."))


@torch.no_grad()
def _rows(args: argparse.Namespace, engine: TransformersEngine, dtype: str) -> Iterator[Row]:
    experts = random_experts(engine, 3, args.seed)
    mixtures: list[Z] = [mix(experts, [0.1 * k, 0.5, 0.2], "paper", "none") for k in range(40)]
    engine.bases(engine.targets)

    def forward(ids: torch.Tensor) -> None:
        engine.model(input_ids=ids, use_cache=False, logits_to_keep=1)

    def one() -> None:
        forward(torch.zeros(1, 1, dtype=torch.long, device=engine.device))

    for rows, width in _TOKENS:
        ids = torch.zeros(rows, width, dtype=torch.long, device=engine.device)
        used = mixtures[: min(rows, 32)]

        def base(ids: torch.Tensor = ids) -> None:
            forward(ids)

        def activation(ids: torch.Tensor = ids, used: list[Z] = used) -> None:
            # The cost of entering the context is subtracted below: several passes of a batch share it.
            with engine.activation(used, torch.arange(len(ids)) % len(used)):
                for _ in range(2):
                    forward(ids)

        def entered(ids: torch.Tensor = ids, used: list[Z] = used) -> None:
            with engine.activation(used, torch.arange(len(ids)) % len(used)):
                pass

        single, plain, moved, entering = _least([one, base, activation, entered], args)
        moved = (moved - entering) / 2
        predicted = engine.costs.forward(rows * width) / engine.costs.forward(1)
        yield _row(f"base, {rows} × {width}, {dtype}", plain / single, predicted, plain)
        predicted = engine.costs.forward(rows * width, engine.targets) / engine.costs.forward(rows * width)
        yield _row(f"activation / base, {rows} × {width}, {dtype}", moved / plain, predicted, moved)

    def composed() -> None:
        with engine.applied(mixtures.pop()):
            pass

    def summed() -> None:
        with engine.applied(others.pop()):
            pass

    others = [mix(experts, [0.3, 0.01 * k, 0.1], "paper", "none") for k in range(40)]
    ids = torch.zeros(1, 64, dtype=torch.long, device=engine.device)
    composing, prompt = _least([composed, lambda: forward(ids)], args)
    unit = engine.costs.forward(64)
    predicted = engine.costs.composing() / unit
    yield _row(f"weights composed / base, 1 × 64, {dtype}", composing / prompt, predicted, composing)
    with engine.switching(experts, others):
        summing, prompt = _least([summed, lambda: forward(ids)], args)
    predicted = engine.costs.summing(3) / unit
    yield _row(f"weights summed / base, 1 × 64, {dtype}", summing / prompt, predicted, summing)


def _row(what: str, measured: float, predicted: float, seconds: float) -> Row:
    return Row(what, "its cost", measured, f"the cost model: {predicted:.2f}", None, "below", f"{1e3 * seconds:.2f} ms")


def _least(sides: Sequence[Callable[[], None]], args: argparse.Namespace) -> list[float]:
    """Return the least seconds of each side; the sides alternate."""
    cuda = args.device.startswith("cuda")
    clock = time.perf_counter if cuda else time.process_time
    taken: list[list[float]] = [[] for _ in sides]
    for _ in range(args.repeats + 1):
        for side, own in zip(sides, taken, strict=True):
            began = clock()
            side()
            if cuda:
                torch.cuda.synchronize(args.device)
            own.append(clock() - began)
    return [min(own[1:]) for own in taken]
