"""Searches over mixture coefficients: ask for candidates, tell their scores. They know nothing of models."""

from __future__ import annotations

from collections.abc import Sequence

from t2.adapters.search.base import Candidate, Key, Needs, Search
from t2.adapters.search.budget import NO_BUDGET, Budget, Meter
from t2.adapters.search.cem import CEM
from t2.adapters.search.cma import CMA
from t2.adapters.search.random_search import RandomSearch
from t2.core.errors import ArgumentError, nearest

SEARCHES = ("cem", "cma", "random")


def make_search(
    name: str,
    mean: Sequence[float],
    *,
    population: int,
    generations: int,
    elite: float,
    seed: int,
    starts: Sequence[Sequence[float]],
) -> Search:
    """The search called ``name``; ``elite`` is for ``cem`` alone.

    Raises:
        ArgumentError: there is no such search, or a number is out of range.
    """
    match name:
        case "cem":
            return CEM(mean, population=population, generations=generations, elite=elite, seed=seed, starts=starts)
        case "cma":
            return CMA(mean, population=population, generations=generations, seed=seed, starts=starts)
        case "random":
            return RandomSearch(mean, population=population, generations=generations, seed=seed, starts=starts)
    raise ArgumentError(f"search={name} does not exist{nearest(name, SEARCHES)}")


__all__ = [
    "CEM",
    "CMA",
    "NO_BUDGET",
    "SEARCHES",
    "Budget",
    "Candidate",
    "Key",
    "Meter",
    "Needs",
    "RandomSearch",
    "Search",
    "make_search",
]
