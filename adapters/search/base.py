"""The ask/tell protocol of a search, and what all searches share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from t2.core.errors import ArgumentError

Candidate = tuple[float, ...]
"""Coefficients α, rounded, so that a repeated candidate is recognised."""

Key = tuple[float, float]
"""What a candidate is ranked by: its score (higher is better), then the tie-breaking mean log-likelihood."""

Point = npt.NDArray[np.float64]

DECIMALS = 4
PATIENCE = 10
"""Generations without a better key after which a search that converges ends."""
COLLAPSED = 1e-3
"""Standard deviation below which the candidates count as one point."""
BECOME_ONE = "the candidates have become one"


@dataclass(frozen=True)
class Needs:
    """What a search learns from in a generation; all else may stay unknown without changing its course.

    Attributes:
        best: so many of the best candidates, repeated ones counted each time. Of the others it is enough to know that
            they come after these.
        ordered: the order among the best matters too, not only which they are. The very best is always told apart.
    """

    best: int
    ordered: bool = True


class Search(Protocol):
    """A search for the candidate with the largest key."""

    def ask(self) -> list[Candidate]:
        """The next generation; empty when the search has ended."""
        ...

    def tell(self, candidates: Sequence[Candidate], keys: Sequence[Key]) -> None:
        """Report the keys of the candidates last asked for, in their order."""
        ...

    def needs(self, count: int) -> Needs:
        """What has to be known of a generation of so many candidates before it is told."""
        ...

    @property
    def stopped(self) -> str | None:
        """Why the search has ended, or None while it has not."""
        ...


class GenerationSearch(ABC):
    """A search in generations, which differ between searches in how they are sampled and what is learned from them.

    The first generation begins with ``starts`` (for mixtures: each expert alone, and their mean), all of them, so that
    the result is never worse on the adaptation docs than the best of them; it is filled up to ``population`` with
    samples.

    Args:
        population: candidates per generation; the first has more where there are more starts.
        generations: at most so many.
        starts: candidates that open the first generation.
        patience: generations without a better key that end the search; None means that nothing of the kind does.

    Attributes:
        best: the best candidate told so far and its key; among equal ones the first.

    Raises:
        ArgumentError: a number is out of range.
    """

    def __init__(
        self, *, population: int, generations: int, starts: Sequence[Sequence[float]], patience: int | None
    ) -> None:
        if population < 1:
            raise ArgumentError(f"population={population} must be at least 1")
        if generations < 1:
            raise ArgumentError(f"generations={generations} must be at least 1")
        self.population = population
        self.generations = generations
        self.best: tuple[Candidate, Key] | None = None
        self._starts: list[Point] = [np.asarray(start, dtype=np.float64) for start in starts]
        self._patience = patience
        self._generation = 0
        self._stale = 0
        self._stopped: str | None = None

    @property
    def stopped(self) -> str | None:
        """Why the search has ended, or None."""
        return self._stopped

    def ask(self) -> list[Candidate]:
        """The next generation of candidates, rounded to four decimals; empty when the search has ended."""
        if self._stopped:
            return []
        starts = self._starts if self._generation == 0 else []
        return [rounded(point) for point in [*starts, *self._sample(max(0, self.population - len(starts)))]]

    def tell(self, candidates: Sequence[Candidate], keys: Sequence[Key]) -> None:
        """Learn from a generation; ties in the score are broken by the second part of the key, then by the order."""
        order = sorted(range(len(candidates)), key=lambda i: keys[i], reverse=True)
        converged = self._learn([candidates[i] for i in order], [keys[i] for i in order])
        self._generation += 1
        champion = (candidates[order[0]], keys[order[0]])
        if self.best is None or champion[1] > self.best[1]:
            self.best = champion
            self._stale = 0
        else:
            self._stale += 1
        if self._generation >= self.generations:
            self._stopped = f"all {self.generations} generations done"
        elif self._patience is not None and self._stale >= self._patience:
            self._stopped = f"no better candidate in {self._patience} generations"
        elif converged:
            self._stopped = BECOME_ONE

    def needs(self, count: int) -> Needs:
        """What has to be known of a generation of so many candidates: here all of it."""
        return Needs(count)

    @abstractmethod
    def _sample(self, count: int) -> list[Point]:
        """So many new points."""

    @abstractmethod
    def _learn(self, candidates: Sequence[Candidate], keys: Sequence[Key]) -> bool:
        """Learn from a generation, best first; true when all further candidates would be much the same."""


def rounded(point: Point) -> Candidate:
    """A point as a candidate; never −0."""
    return tuple(float(x) for x in np.round(point, DECIMALS) + 0.0)
