"""Changing the mixture of a model in memory, in weight form.

The floor is the time in which the bytes of the adapted matrices are read once and written once, by a copy. Measured are

* an expert that has been applied before, whose weights memory still holds;
* a new mixture of four experts, inside ``engine.switching``, whose directions memory holds;
* a z that is neither, composed from the bases;

each entered and left, against the floor and against the reference procedure, which composes every matrix and copies
every weight. The model has random weights: on a CPU ten layers of SmolLM2-135M's shapes, in float32 and bfloat16, on a
GPU four layers of an 8B model's, in bfloat16.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator

import torch

from benchmarks.speed.reference import Reference
from benchmarks.speed.rows import Row, in_turn
from benchmarks.speed.shapes import engine_of, random_experts, random_model
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z, mix


def run(args: argparse.Namespace) -> Iterator[Row]:
    """Measure; see :class:`benchmarks.speed.rows.Benchmark`."""
    on_gpu = args.device.startswith("cuda")
    for dtype in [torch.bfloat16] if on_gpu else [torch.float32, torch.bfloat16]:
        model = random_model(args.device, dtype, 1 if args.quick else None, args.seed)
        engine = engine_of(model)
        yield from _rows(args, engine, str(dtype).removeprefix("torch."), on_gpu)


@torch.no_grad()
def _rows(args: argparse.Namespace, engine: TransformersEngine, dtype: str, on_gpu: bool) -> Iterator[Row]:
    experts = random_experts(engine, 4, args.seed)
    numbers = itertools.count(1)
    reference = Reference(engine.model, engine.targets, engine.bases(engine.targets, progress=False))
    sources = [target.parameter.data for target in engine.targets.values()]
    copies = [torch.empty_like(source) for source in sources]

    def floor() -> None:
        for copy, source in zip(copies, sources, strict=True):
            copy.copy_(source)

    def procedure() -> None:
        reference.apply(experts[0])

    def apply(z: Z) -> None:
        with engine.applied(z):
            pass

    def known() -> None:
        for z in experts:
            apply(z)

    def mixture() -> Z:
        step = next(numbers) / 1000
        return mix(experts, [0.4 + step, 0.3, 0.2 - step, 0.1], "paper", "none")

    def new() -> None:
        apply(mixed.pop())

    def unknown() -> None:
        apply(others.pop())

    most = max(args.repeats, len(experts)) + 1  # directions pay from more mixtures than experts on
    mixed, others = [mixture() for _ in range(most)], [mixture() for _ in range(most)]
    for _ in range(2):  # held from the second time on
        known()
    (copied, again, composed, by_reference), _ = in_turn([floor, known, unknown, procedure], args.repeats, args.device)
    reference.apply(None)
    with engine.switching(experts, mixed):
        (summed,), _ = in_turn([new], args.repeats, args.device)
    again /= len(experts)
    size = sum(source.nbytes for source in sources) / 1e6
    figures = f"{size:.0f} MB of adapted matrices; floor {copied * 1e3:.2f} ms, reference {by_reference * 1e3:.1f} ms"
    sides: list[tuple[str, float, float | None, float | None]] = [
        ("an expert applied before", again, 3, 5),
        ("a new mixture of 4 known experts", summed, None, 5),
        ("any other z", composed, None, None),
    ]
    for what, seconds, most_floors, least_times in sides:
        detail = f"{seconds * 1e3:.2f} ms; {figures}"
        yield Row(
            f"change to {what}, {dtype}", "a copy of the bytes", seconds / copied, "time / floor", most_floors,
            "below", detail,
        )  # fmt: skip
        yield Row(
            f"change to {what}, {dtype}", "reference procedure", by_reference / seconds,
            "time of the reference / ours", least_times, "above", detail,
        )  # fmt: skip
