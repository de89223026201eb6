"""Random search: the baseline that a cleverer search has to beat at equal evaluations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from t2.adapters.search.base import Candidate, GenerationSearch, Key, Needs, Point
from t2.core.seeds import generator


class RandomSearch(GenerationSearch):
    """Sample from the distribution that the other searches start from, and learn nothing.

    It has nothing that could converge, so it goes through all its generations.

    Args:
        mean: mean of the samples, length D.
        std: their standard deviation in every coordinate.
        population, generations, starts: see :class:`~t2.adapters.search.base.GenerationSearch`.
        seed: derived seed of the sampler.

    Raises:
        ArgumentError: a number is out of range.
    """

    def __init__(
        self,
        mean: Sequence[float],
        *,
        std: float = 0.3,
        population: int = 32,
        generations: int = 100,
        seed: int = 0,
        starts: Sequence[Sequence[float]] = (),
    ) -> None:
        super().__init__(population=population, generations=generations, starts=starts, patience=None)
        self.mean: Point = np.asarray(mean, dtype=np.float64)
        self._std = std
        self._rng = generator(seed, "random search")

    def needs(self, count: int) -> Needs:
        """The best one."""
        return Needs(1)

    def _sample(self, count: int) -> list[Point]:
        return [self.mean + self._std * self._rng.standard_normal(len(self.mean)) for _ in range(count)]

    def _learn(self, candidates: Sequence[Candidate], keys: Sequence[Key]) -> bool:
        return False
