"""What the cost model counts, beside what it costs: the data behind the constants of ``adapters/engine/costs.py``.

Passes of the base and passes in activation form, with a mixture for each row or one for all, take turns at several
numbers of tokens; so do a pass and a change of the weights. Each figure is a ratio to the base's pass of one token, and
beside it stands what :class:`t2.adapters.engine.costs.CostModel` says. On a CPU processor time is taken, by one thread
(``OMP_NUM_THREADS=1``): other programs move it less than a clock. The model has random weights, as in ``switch``.
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
"""Rows and tokens of each: steps of generation, and prompts."""


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
            # Entering is not what a step of a batch costs: several passes share it.
            with engine.activation(used, torch.arange(len(ids)) % len(used)):
                for _ in range(2):
                    forward(ids)

        def entered(ids: torch.Tensor = ids, used: list[Z] = used) -> None:
            with engine.activation(used, torch.arange(len(ids)) % len(used)):
                pass

        least, plain, moved, entering = _least([one, base, activation, entered], args)
        moved = (moved - entering) / 2
        known = engine.costs.forward(rows * width) / engine.costs.forward(1)
        yield _row(f"base, {rows} × {width}, {dtype}", plain / least, known, plain)
        known = engine.costs.forward(rows * width, engine.targets) / engine.costs.forward(rows * width)
        yield _row(f"activation / base, {rows} × {width}, {dtype}", moved / plain, known, moved)

    def composed() -> None:
        with engine.applied(mixtures.pop()):
            pass

    def summed() -> None:
        with engine.applied(others.pop()):
            pass

    others = [mix(experts, [0.3, 0.01 * k, 0.1], "paper", "none") for k in range(40)]
    ids = torch.zeros(1, 64, dtype=torch.long, device=engine.device)
    anew, prompt = _least([composed, lambda: forward(ids)], args)
    unit = engine.costs.forward(64)
    yield _row(f"weights composed / base, 1 × 64, {dtype}", anew / prompt, engine.costs.composing() / unit, anew)
    with engine.switching(experts, others):
        again, prompt = _least([summed, lambda: forward(ids)], args)
    yield _row(f"weights summed / base, 1 × 64, {dtype}", again / prompt, engine.costs.summing(3) / unit, again)


def _row(what: str, measured: float, known: float, seconds: float) -> Row:
    return Row(what, "its cost", measured, f"the cost model: {known:.2f}", None, "below", f"{1e3 * seconds:.2f} ms")


def _least(sides: Sequence[Callable[[], None]], args: argparse.Namespace) -> list[float]:
    """Least seconds of each side; the sides take turns."""
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
