"""What a benchmark of speed gives: rows of a table, each a ratio of two things measured in turn in one run."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: what was measured, in a few words, with the dtype or shape where there are several.
        against: what it was measured against.
        ratio: of the two; what it is a ratio of stands in ``target``.
        target: the bound in words, for example ``time of the reference / ours``.
        bound: what the ratio is to reach; None where there is no target on this kind of machine.
        better: whether a ratio above or below the bound meets it.
        detail: the two figures themselves with their units, and what else is to be known.
        numbers: anything more, for the JSON file.
    """

    what: str
    against: str
    ratio: float
    target: str
    bound: float | None
    better: Literal["above", "below"]
    detail: str
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.bound is None:
            return None
        return self.ratio >= self.bound if self.better == "above" else self.ratio <= self.bound

    def json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self) | {"met": self.met}


class Benchmark(Protocol):
    """A module of ``benchmarks/speed``: its docstring says what is compared, and :func:`run` does it."""

    def run(self, args: argparse.Namespace) -> Iterable[Row]:
        """Measure.

        Args:
            args: ``device`` (``cpu`` or ``cuda``), ``quick`` (smallest sizes, to see whether it works), ``repeats``
                and ``seed``.
        """
        ...


def in_turn(
    sides: Sequence[Callable[[], Any]], repeats: int, device: str = "cpu", warm: bool = True
) -> tuple[list[float], list[Any]]:
    """Median seconds of each side and its last result; the sides take turns, so that a busy machine slows them alike.

    Args:
        sides: what is timed.
        repeats: turns.
        device: a CUDA device is waited for.
        warm: run each side once before.
    """
    results: list[Any] = [side() for side in sides] if warm else [None] * len(sides)
    taken: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for i, side in enumerate(sides):
            _wait(device)
            began = time.perf_counter()
            results[i] = side()
            _wait(device)
            taken[i].append(time.perf_counter() - began)
    return [statistics.median(seconds) for seconds in taken], results


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
