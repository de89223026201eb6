"""What every search promises, on functions whose best point is known; and what CMA-ES does by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from t2.adapters.search import CEM, CMA, SEARCHES, Candidate, Key, RandomSearch, Search, make_search
from t2.adapters.search.base import BECOME_ONE, PATIENCE
from t2.adapters.search.cma import SEPARABLE_ABOVE
from t2.core.errors import ArgumentError

TOP = np.array([0.7, -0.1, 0.6])
STARTS = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1 / 3] * 3]


def make(name: str, dimensions: int = 3, **settings: Any) -> Any:
    arguments: dict[str, Any] = {"population": 16, "generations": 60, "elite": 0.2, "seed": 0, "starts": []}
    return make_search(name, [1 / 3] * dimensions, **{**arguments, **settings})


def quadratic(candidate: Candidate) -> Key:
    return -float(((np.asarray(candidate) - np.resize(TOP, len(candidate))) ** 2).sum()), 0.0


def run(search: Search, key: Callable[[Candidate], Key]) -> list[list[Candidate]]:
    generations = []
    while candidates := search.ask():
        search.tell(candidates, [key(candidate) for candidate in candidates])
        generations.append(candidates)
    return generations


def best(generations: list[list[Candidate]]) -> Candidate:
    return max((candidate for generation in generations for candidate in generation), key=quadratic)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "within"), [("cem", 0.05), ("cma", 0.01), ("random", 0.15)])
def test_the_best_point_is_found(name: str, within: float, seed: int) -> None:
    search = make(name, seed=seed)
    generations = run(search, quadratic)
    assert np.allclose(best(generations), TOP, atol=within)
    assert search.best == (best(generations), quadratic(best(generations)))
    assert search.stopped
    assert search.ask() == []


@pytest.mark.parametrize("seed", range(3))
def test_those_that_learn_beat_the_baseline_at_equal_evaluations(seed: int) -> None:
    found = {}
    for name in SEARCHES:
        generations = run(make(name, 8, population=20, generations=20, seed=seed), quadratic)
        assert len(generations) == 20
        found[name] = quadratic(best(generations))[0]
    assert found["cem"] > found["random"]
    assert found["cma"] > found["random"]


@pytest.mark.parametrize("name", SEARCHES)
def test_the_first_generation_is_all_starts_filled_up_with_samples(name: str) -> None:
    first = make(name, starts=STARTS, population=8).ask()
    assert first[:4] == [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.3333, 0.3333, 0.3333)]
    assert len(set(first)) == 8
    assert make(name, starts=STARTS, population=2).ask() == first[:4]


@pytest.mark.parametrize("name", SEARCHES)
def test_samples_begin_around_the_same_mean_with_the_same_spread(name: str) -> None:
    candidates = np.array(make(name, population=2000).ask())
    assert np.array_equal(candidates, np.round(candidates, 4))
    assert np.allclose(candidates.mean(axis=0), 1 / 3, atol=0.03)
    assert np.allclose(candidates.std(axis=0), 0.3, atol=0.03)


@pytest.mark.parametrize("name", SEARCHES)
def test_the_seed_decides(name: str) -> None:
    def generations(seed: int) -> list[list[Candidate]]:
        return run(make(name, population=6, generations=5, seed=seed, starts=STARTS), quadratic)

    assert generations(3) == generations(3)
    assert generations(3)[1:] != generations(4)[1:]
    assert generations(2**62) != generations(3)


@pytest.mark.parametrize("name", ["cem", "cma"])
def test_ties_in_the_score_are_broken(name: str) -> None:
    generations = run(make(name), lambda candidate: (1.0, quadratic(candidate)[0]))
    assert np.allclose(best(generations), TOP, atol=0.05)


@pytest.mark.parametrize("name", SEARCHES)
def test_the_score_outweighs_the_tie_break(name: str) -> None:
    search = make(name, population=5)
    candidates = search.ask()
    search.tell(candidates, [(float(i == 3), float(-i)) for i in range(5)])
    assert search.best == (candidates[3], (1.0, -3.0))


@pytest.mark.parametrize("name", ["cem", "cma"])
def test_candidates_without_a_score_come_last_and_harm_nothing(name: str) -> None:
    def key(candidate: Candidate) -> Key:
        return (-math.inf, 0.0) if candidate[0] < 0.5 else quadratic(candidate)

    assert np.allclose(best(run(make(name), key)), TOP, atol=0.05)
    nowhere = make(name)
    run(nowhere, lambda candidate: (-math.inf, -math.inf))
    assert nowhere.best is not None
    assert nowhere.best[1] == (-math.inf, -math.inf)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize(("population", "dimensions"), [(1, 1), (1, 3), (2, 2), (3, 1), (6, 40)])
def test_small_populations_and_one_dimension_work(name: str, population: int, dimensions: int) -> None:
    search = make(name, dimensions, population=population, generations=200)
    generations = run(search, quadratic)
    assert all(len(generation) == population for generation in generations)
    assert {len(candidate) for generation in generations for candidate in generation} == {dimensions}
    improved = quadratic(best(generations)) > quadratic(best(generations[:1]))
    # From two candidates the cross-entropy method has next to nothing to learn a spread from.
    assert improved or (name == "cem" and population < 3)


@pytest.mark.parametrize(
    ("name", "key", "reason"),
    [
        *((name, quadratic, "all 3 generations done") for name in SEARCHES),
        *(
            (name, lambda candidate: (0.0, 0.0), f"no better candidate in {PATIENCE} generations")
            for name in SEARCHES[:2]
        ),
        ("random", lambda candidate: (0.0, 0.0), "all 40 generations done"),
        *((name, quadratic, BECOME_ONE) for name in SEARCHES[:2]),
    ],
)
def test_a_search_says_why_it_ended(name: str, key: Callable[[Candidate], Key], reason: str) -> None:
    generations = int(reason.split()[1]) if reason.startswith("all") else 1000
    search = make(name, generations=generations)
    assert len(run(search, key)) < 200
    assert search.stopped == reason


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("setting", ["population", "generations"])
def test_numbers_out_of_range_are_told(name: str, setting: str) -> None:
    with pytest.raises(ArgumentError, match=f"{setting}=0 must be at least 1"):
        make(name, **{setting: 0})


def test_an_unknown_search_is_told() -> None:
    with pytest.raises(ArgumentError, match="search=cna does not exist; did you mean 'cma'"):
        make("cna")
    assert [type(make(name)) for name in SEARCHES] == [CEM, CMA, RandomSearch]


def test_cma_learns_correlations_in_few_dimensions_and_scales_in_many() -> None:
    def narrow(candidate: Candidate) -> Key:
        """A valley along (1, 1), a hundred times as long as it is wide."""
        a, b = candidate
        return -(100 * (a - b) ** 2 + 0.01 * (a + b - 3) ** 2), 0.0

    search = CMA([0.0, 0.0], population=12, generations=60)
    run(search, narrow)
    assert search.best is not None
    assert np.allclose(search.best[0], [1.5, 1.5], atol=0.1)
    many = SEPARABLE_ABOVE + 10
    target = np.linspace(-0.5, 1.0, many)
    search = CMA([1 / 3] * many, population=24, generations=150)
    run(search, lambda candidate: (-float(((np.asarray(candidate) - target) ** 2).sum()), 0.0))
    assert search.best is not None
    assert np.allclose(search.best[0], target, atol=0.1)


def test_what_a_coefficient_per_matrix_needs_of_cma_stays_small() -> None:
    """Three experts in 210 matrices: 630 numbers, of which a full covariance would have 400,000."""
    starts = [[1.0 if i == k else 0.0 for i in range(3)] * 210 for k in range(3)]
    search = CMA([1 / 3] * 630, population=8, generations=3, starts=starts)
    generations = run(search, quadratic)
    assert [len(generation) for generation in generations] == [8, 8, 8]
    assert {len(candidate) for generation in generations for candidate in generation} == {630}
    assert max(abs(value) for candidate in generations[-1] for value in candidate) < 3


def test_cma_keeps_its_mean_when_nothing_is_told_apart() -> None:
    search = CMA([0.25, 0.75], population=10, generations=20, std=1e-2)
    run(search, lambda candidate: (0.0, 0.0))
    assert np.allclose(search.mean, [0.25, 0.75], atol=0.1)
