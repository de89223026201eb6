"""The cross-entropy method over a diagonal Gaussian (Rubinstein & Kroese 2004; Transformer², section 3.2 and A.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from t2.adapters.search.base import Candidate, Key
from t2.core.errors import ArgumentError
from t2.core.seeds import generator

DECIMALS = 4
SMOOTHING = 0.5
"""Share of the old standard deviation in the new one (smoothed updating, de Boer et al. 2005, A Tutorial on the
Cross-Entropy Method). Without it the distribution shrinks to a point before it reaches a best point far from its start.
"""
PATIENCE = 10
"""Generations without a better key after which the search ends."""
COLLAPSED = 1e-3
"""Standard deviation below which the distribution counts as a point."""


class CEM:
    """Maximise a score by sampling, keeping the elite, and refitting.

    The first generation begins with ``starts`` (for mixtures: each expert alone, and their mean), so that the result is
    never worse on the held-out docs than the best of them; the rest is sampled.

    Args:
        mean: initial mean, length D.
        std: initial standard deviation of every coordinate.
        population: candidates per generation.
        generations: at most so many.
        elite: share of a generation that refits the distribution; at least two candidates, or one in a population of
        one. seed: derived seed of the sampler.
        starts: candidates that open the first generation.

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
        if population < 1:
            raise ArgumentError(f"population={population} must be at least 1")
        if generations < 1:
            raise ArgumentError(f"generations={generations} must be at least 1")
        if not 0 < elite <= 1:
            raise ArgumentError(f"elite={elite} must lie above 0 and not above 1")
        self.mean: npt.NDArray[np.float64] = np.asarray(mean, dtype=np.float64)
        self.std: npt.NDArray[np.float64] = np.full_like(self.mean, std)
        self.population = population
        self.generations = generations
        self.elites = min(population, max(2, math.ceil(elite * population)))
        self.best: tuple[Candidate, Key] | None = None
        self._rng = generator(seed, "cem")
        self._starts = [np.asarray(start, dtype=np.float64) for start in starts]
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
        points = self._starts[: self.population] if self._generation == 0 else []
        while len(points) < self.population:
            points = [*points, self.mean + self.std * self._rng.standard_normal(len(self.mean))]
        return [tuple(float(x) for x in np.round(point, DECIMALS) + 0.0) for point in points]

    def tell(self, candidates: Sequence[Candidate], keys: Sequence[Key]) -> None:
        """Refit the distribution to the elite; ties in the score are broken by the second part of the key."""
        order = sorted(range(len(candidates)), key=lambda i: keys[i], reverse=True)
        elite = np.asarray([candidates[i] for i in order[: self.elites]])
        self.mean = elite.mean(axis=0)
        self.std = SMOOTHING * self.std + (1 - SMOOTHING) * elite.std(axis=0)
        self._generation += 1
        champion = (candidates[order[0]], keys[order[0]])
        if self.best is None or champion[1] > self.best[1]:
            self.best = champion
            self._stale = 0
        else:
            self._stale += 1
        if self._generation >= self.generations:
            self._stopped = f"all {self.generations} generations done"
        elif self._stale >= PATIENCE:
            self._stopped = f"no better candidate in {PATIENCE} generations"
        elif float(self.std.max()) < COLLAPSED:
            self._stopped = "the candidates have become one"
