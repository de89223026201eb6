"""The cross-entropy method over a diagonal Gaussian (Rubinstein & Kroese 2004; Transformer², section 3.2 and A.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from t2.adapters.search.base import COLLAPSED, PATIENCE, Candidate, GenerationSearch, Key, Needs, Point
from t2.core.errors import ArgumentError
from t2.core.seeds import generator

SMOOTHING = 0.5
"""Share of the old standard deviation in the new one (smoothed updating, de Boer et al. 2005, A Tutorial on the
Cross-Entropy Method). Without it the distribution shrinks to a point before it reaches a best point far from its start.
"""


class CEM(GenerationSearch):
    """Maximise a score by sampling, keeping the elite, and refitting.

    Args:
        mean: initial mean, length D.
        std: initial standard deviation of every coordinate.
        population, generations, starts: see :class:`~t2.adapters.search.base.GenerationSearch`.
        elite: share of a generation that refits the distribution; at least two candidates, or one in a population of
            one.
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
        elite: float = 0.2,
        seed: int = 0,
        starts: Sequence[Sequence[float]] = (),
    ) -> None:
        super().__init__(population=population, generations=generations, starts=starts, patience=PATIENCE)
        if not 0 < elite <= 1:
            raise ArgumentError(f"elite={elite} must lie above 0 and not above 1")
        self.mean: Point = np.asarray(mean, dtype=np.float64)
        self.std: Point = np.full_like(self.mean, std)
        self.elites = min(population, max(2, math.ceil(elite * population)))
        self._rng = generator(seed, "cem")

    def needs(self, count: int) -> Needs:
        """The elite, in any order."""
        return Needs(min(count, self.elites), ordered=False)

    def _sample(self, count: int) -> list[Point]:
        return [self.mean + self.std * self._rng.standard_normal(len(self.mean)) for _ in range(count)]

    def _learn(self, candidates: Sequence[Candidate], keys: Sequence[Key]) -> bool:
        # In an order of their own: the sums below must not depend on how ties within the elite were broken.
        elite = np.asarray(sorted(candidates[: self.elites]))
        self.mean = elite.mean(axis=0)
        self.std = SMOOTHING * self.std + (1 - SMOOTHING) * elite.std(axis=0)
        return float(self.std.max()) < COLLAPSED
