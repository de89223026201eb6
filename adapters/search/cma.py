"""The covariance matrix adaptation evolution strategy, by the library ``cmaes``.

Hansen 2016, The CMA Evolution Strategy: A Tutorial (arXiv 1604.00772). In many dimensions its separable variant (Ros &
Hansen 2008, A Simple Modification in CMA-ES Achieving Linear Time and Space Complexity): a full covariance matrix of D²
entries cannot be learned from the few thousand mixtures that a search may try.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cmaes
import numpy as np

from t2.adapters.search.base import COLLAPSED, PATIENCE, Candidate, GenerationSearch, Key, Needs, Point, rounded
from t2.core.seeds import derive_seed

SEPARABLE_ABOVE = 20
"""Dimensions above which the covariance is diagonal. Learning a full one takes about 10·D² evaluations; 32 candidates
in 100 generations suffice for 18 dimensions."""
_LEAST = 4
"""Candidates of an update at least; smaller generations are collected."""


class CMA(GenerationSearch):
    """Maximise a score by CMA-ES, which uses only the ranks of candidates: −inf is a last place like another.

    Equal keys share their rank. The starts are no samples of the distribution; they are told to it all the same, pulled
    towards the mean where they lie further off than its samples would (Hansen 2011, Injecting External Solutions Into
    CMA-ES, arXiv 1110.4181).

    Args:
        mean: initial mean, length D. One dimension gets a second that nothing depends on, since the method needs two.
        std: initial standard deviation of every coordinate.
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
        super().__init__(population=population, generations=generations, starts=starts, patience=PATIENCE)
        self._dimensions = len(mean)
        start = np.zeros(max(2, len(mean)))
        start[: len(mean)] = mean
        self._start, self._std = start.copy(), std
        self._size = max(population, _LEAST)
        method = cmaes.SepCMA if len(start) > SEPARABLE_ABOVE else cmaes.CMA
        self._method = method(mean=start, sigma=std, population_size=self._size, seed=derive_seed(seed, "cma") % 2**32)
        self._asked: dict[Candidate, Point] = {}
        self._told: list[tuple[Candidate, Key]] = []

    @property
    def mean(self) -> Point:
        """Mean of the distribution, length D."""
        return np.asarray(self._method.mean)[: self._dimensions]

    def needs(self, count: int) -> Needs:
        """The better half in the separable variant; the full one learns from the worse half as well."""
        separable = isinstance(self._method, cmaes.SepCMA)
        return Needs(self._size // 2 if separable and not self._told and count == self._size else count)

    def _sample(self, count: int) -> list[Point]:
        points = [np.asarray(self._method.ask(), dtype=np.float64) for _ in range(count)]
        self._asked.update((rounded(point[: self._dimensions]), point) for point in points)
        return [point[: self._dimensions] for point in points]

    def _learn(self, candidates: Sequence[Candidate], keys: Sequence[Key]) -> bool:
        self._told.extend(zip(candidates, keys, strict=True))
        if len(self._told) < self._size:
            return False
        best = sorted(self._told, key=lambda told: told[1], reverse=True)[: self._size]
        points = [self._point(candidate) for candidate, _ in best]
        places = {key: float(-i) for i, key in enumerate(sorted({key for _, key in best}))}
        self._method.tell([(point, places[key]) for point, (_, key) in zip(points, best, strict=True)])
        self._told.clear()
        self._asked.clear()
        spread = np.std([point[: self._dimensions] for point in points], axis=0)
        return float(spread.max()) < COLLAPSED

    def _point(self, candidate: Candidate) -> Point:
        if candidate in self._asked:
            return self._asked[candidate]
        point = self._start.copy()
        point[: self._dimensions] = candidate
        off = point - self._start
        size = len(off)
        most = self._std * (math.sqrt(size) + 2 * size / (size + 2))
        length = float(np.linalg.norm(off))
        return point if length <= most else self._start + off * (most / length)
