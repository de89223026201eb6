"""The cross-entropy method by itself, on functions whose best point is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from t2.adapters.search import CEM, Candidate, Key
from t2.adapters.search.base import PATIENCE
from t2.core.errors import ArgumentError

TOP = np.array([0.7, -0.4, 1.3])


def quadratic(candidate: Candidate) -> Key:
    return -float(((np.asarray(candidate) - TOP) ** 2).sum()), 0.0


def run(search: CEM, key: Callable[[Candidate], Key]) -> list[list[Candidate]]:
    """Search to the end and return the generations."""
    generations = []
    while candidates := search.ask():
        search.tell(candidates, [key(candidate) for candidate in candidates])
        generations.append(candidates)
    return generations


@pytest.mark.parametrize("seed", range(5))
def test_a_best_point_far_from_the_start_is_found(seed: int) -> None:
    search = CEM([1 / 3] * 3, seed=seed)
    run(search, quadratic)
    assert np.allclose(search.mean, TOP, atol=0.2)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_point_of_a_quadratic_is_found(seed: int) -> None:
    search = CEM([0, 0, 0], std=1.0, seed=seed)
    generations = run(search, quadratic)
    assert search.best is not None
    assert np.allclose(search.best[0], TOP, atol=0.02)
    assert np.allclose(search.mean, TOP, atol=0.02)
    assert search.best[1] == max(quadratic(candidate) for generation in generations for candidate in generation)
    assert search.stopped is not None
    assert search.ask() == []


def test_ties_in_the_score_are_broken_for_the_elite_and_the_best() -> None:
    """Only the second part of the key tells candidates apart."""
    search = CEM([0, 0, 0], std=1.0, seed=0)
    run(search, lambda candidate: (1.0, quadratic(candidate)[0]))
    assert search.best is not None
    assert np.allclose(search.best[0], TOP, atol=0.02)


def test_the_score_outweighs_the_tie_break() -> None:
    search = CEM([0.0], population=2, generations=1, elite=0.5)
    candidates = search.ask()
    search.tell(candidates, [(0.1, 100.0), (0.2, -100.0)])
    assert search.best == (candidates[1], (0.2, -100.0))


def test_the_distribution_is_refitted_to_the_elite() -> None:
    search = CEM([0.0, 0.0], population=10, elite=0.3)
    candidates = search.ask()
    search.tell(candidates, [(float(i), 0.0) for i in range(10)])
    elite = np.array(candidates[-3:])
    assert np.allclose(search.mean, elite.mean(axis=0))
    # Half of the old deviation stays, without which the distribution becomes a point on the way.
    assert np.allclose(search.std, 0.5 * 0.3 + 0.5 * elite.std(axis=0))


@pytest.mark.parametrize(
    ("population", "elite", "elites"),
    [(10, 0.3, 3), (10, 0.01, 2), (10, 0.21, 3), (10, 1, 10), (1, 0.2, 1), (2, 0.2, 2)],
)
def test_the_number_of_elites(population: int, elite: float, elites: int) -> None:
    assert CEM([0.0], population=population, elite=elite).elites == elites


def test_the_first_generation_begins_with_the_starts() -> None:
    starts = [(1.0, 0.0), (0.0, 1.0), (0.33333333, 0.66666667)]
    search = CEM([0.5, 0.5], population=8, starts=starts)
    first = search.ask()
    assert first[:3] == [(1.0, 0.0), (0.0, 1.0), (0.3333, 0.6667)]
    assert len(first) == len(set(first)) == 8
    search.tell(first, [quadratic((*candidate, 0.0)) for candidate in first])
    assert not set(starts) & set(search.ask())
    # However small the population, none of the starts is passed over.
    assert CEM([0.5, 0.5], population=2, starts=starts).ask() == first[:3]


def test_candidates_are_rounded_and_sampled_around_the_mean() -> None:
    candidates = np.array(CEM([2.0, -3.0], std=0.3, population=4000, seed=1).ask())
    assert np.array_equal(candidates, np.round(candidates, 4))
    assert np.allclose(candidates.mean(axis=0), [2, -3], atol=0.02)
    assert np.allclose(candidates.std(axis=0), 0.3, atol=0.02)
    assert str(CEM([-1e-9], std=0, population=1).ask()) == "[(0.0,)]"


def test_the_seed_decides() -> None:
    def candidates(seed: int) -> list[list[Candidate]]:
        return run(CEM([0, 0, 0], population=6, generations=5, seed=seed), quadratic)

    assert candidates(3) == candidates(3)
    assert candidates(3) != candidates(4)


def test_asking_twice_before_telling_changes_no_later_generation_but_by_the_sampler() -> None:
    search = CEM([0.0, 0.0], population=4, starts=[(1.0, 1.0)])
    assert search.ask()[0] == search.ask()[0] == (1.0, 1.0)


def test_it_stops_when_generations_are_done() -> None:
    search = CEM([0, 0, 0], generations=4, std=1.0)
    assert len(run(search, quadratic)) == 4
    assert search.stopped == "all 4 generations done"


def test_it_stops_without_a_better_candidate() -> None:
    search = CEM([0.0], elite=1.0)
    assert len(run(search, lambda candidate: (0.0, 0.0))) == 1 + PATIENCE
    assert search.stopped == f"no better candidate in {PATIENCE} generations"


def test_a_better_tie_break_counts_as_better() -> None:
    search = CEM([0.0], elite=1.0, generations=30)
    step = iter(range(10**6))
    assert len(run(search, lambda candidate: (0.0, float(next(step))))) == 30


def test_it_stops_when_the_candidates_have_become_one() -> None:
    search = CEM([0, 0, 0], std=1.0, generations=1000)
    assert len(run(search, quadratic)) < 100
    assert search.stopped == "the candidates have become one"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"population": 0}, "population=0 must be at least 1"),
        ({"generations": 0}, "generations=0 must be at least 1"),
        ({"elite": 0}, "elite=0 must lie above 0 and not above 1"),
        ({"elite": 1.5}, "elite=1.5 must lie above 0 and not above 1"),
        ({"elite": float("nan")}, "elite=nan must lie above 0 and not above 1"),
    ],
)
def test_numbers_out_of_range_are_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        CEM([0.0], **arguments)
    assert str(caught.value) == message
