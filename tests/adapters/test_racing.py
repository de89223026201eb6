"""What a search leaves out: exact races change nothing but the cost, the others cost what they are said to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.search_economy import Margins, simulate
from t2.adapters.expert import Z
from t2.adapters.search import SEARCHES, Budget, make_search
from t2.adapters.search.cma import SEPARABLE_ABOVE
from t2.adapters.strategies import Plan, Score
from t2.adapters.strategies.few_shot import early
from t2.adapters.strategies.racing import Runner, race

SEEDS = int(os.environ.get("T2_TEST_RACES", "3"))


class Table:
    """A scorer whose mixtures are numbered by their only component: row i holds the values of mixture i."""

    higher_is_better = True

    def __init__(self, values: np.ndarray[Any, Any], bounds: tuple[float, float] | None = (0.0, 1.0)) -> None:
        self.values, self.docs, self.bounds = values, values.shape[1], bounds
        self.prompts: Sequence[str] = [""] * self.docs
        self.answered: list[tuple[int, int]] = []

    def evaluate(self, mixtures: Sequence[Z | None], docs: Sequence[int] | None = None) -> list[Score]:
        found = []
        for z in mixtures:
            assert z is not None
            row, shown = int(z["w"]), list(range(self.docs) if docs is None else docs)
            self.answered += [(row, doc) for doc in shown]
            found.append(Score(float(self.values[row, shown].mean()), tuple(self.values[row, shown].tolist())))
        return found

    def combine(self, mixtures: Sequence[Z | None], rows: Sequence[int], docs: Sequence[int] | None = None) -> Score:
        raise AssertionError("a race dispatches nothing")

    def tie_break(self, mixtures: Sequence[Z | None], docs: Sequence[int] | None = None) -> list[float]:
        raise AssertionError("a race breaks no ties")


def runners(values: np.ndarray[Any, Any], copies: Sequence[int] | None = None) -> list[Runner]:
    each = copies or [1] * len(values)
    return [Runner({"w": torch.tensor(float(i))}, times) for i, times in enumerate(each)]


@pytest.mark.parametrize("seed", range(20 * SEEDS))
def test_who_leaves_a_race_is_worse_than_the_best_that_were_wanted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, docs = int(rng.integers(2, 24)), int(rng.integers(1, 14))
    graded = rng.random((count, docs))
    values = graded if seed % 3 == 0 else (graded < rng.random((count, 1))).astype(float)
    best, copies = int(rng.integers(1, count + 2)), [int(n) for n in rng.integers(1, 3, count)]
    rivals = (rng.random(int(rng.integers(0, 3))) * docs).tolist()
    scorer, steps = Table(values), list[int]()
    field = runners(values, copies)
    finished = race(field, scorer, best=best, rivals=rivals, order=rng.permutation(docs).tolist(), step=steps.append)
    assert len(scorer.answered) == len(set(scorer.answered)) == sum(runner.answered for runner in field)
    assert sum(steps) == count
    totals = values.sum(axis=1)
    every = sorted([*rivals, *(total for total, n in zip(totals, copies, strict=True) for _ in range(n))], reverse=True)
    for done, total, runner in zip(finished, totals, field, strict=True):
        assert done == (runner.answered == docs)
        if done:
            assert runner.total == pytest.approx(total)
        else:
            assert total < every[best - 1]


def test_a_hopeless_candidate_leaves_after_a_quarter_of_the_docs() -> None:
    values = np.vstack([np.ones((2, 12)), np.zeros((3, 12))])
    scorer = Table(values)
    assert race(runners(values), scorer, best=2, rivals=[], order=range(12)) == [True, True, False, False, False]
    assert len(scorer.answered) == 2 * 12 + 3 * 3


def test_equal_candidates_all_stay() -> None:
    values = np.tile([1.0, 0.0, 1.0, 0.0], (6, 1))
    assert all(race(runners(values), Table(values), best=2, rivals=[2.0], order=range(4)))


def test_a_value_out_of_bounds_ends_the_race_and_everyone_answers() -> None:
    class Losing(Table):
        def evaluate(self, mixtures: Sequence[Z | None], docs: Sequence[int] | None = None) -> list[Score]:
            found = super().evaluate(mixtures, docs)
            if any(value > 1 for score in found for value in score.per_doc):
                self.bounds = None
            return found

    values = np.vstack([np.ones((2, 8)), np.zeros((2, 8))])
    values[3, 7] = 20.0
    values[1, 7] = 5.0
    scorer = Losing(values)
    assert all(race(runners(values), scorer, best=1, rivals=[8.0], order=range(8)))
    assert set(scorer.answered) == {(row, doc) for row in range(4) for doc in range(8)}


def course(plan: Plan) -> Any:
    """All that must not change: the mixture, the scores, and the best of every generation."""
    z = plan.choices[0].z
    vector = None if z is None else z["w"].tolist()
    return plan.choices[0].alpha, vector, plan.held_out, plan.no_signal, [g.best for g in plan.history]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("experts", [1, 3, SEPARABLE_ABOVE + 2])
def test_exact_races_leave_the_course_of_a_search_as_it_is(search: str, experts: int) -> None:
    for seed in range(SEEDS):
        settings: dict[str, Any] = {"search": search, "population": 24, "generations": 8}
        plans = []
        for economy in ("none", "exact"):
            # Nobody can have all docs right, or the exact search would end there.
            scorer = Margins(experts, 11, easy=0.3, seed=seed)
            scorer.base[4] = -100.0
            plans.append((simulate(scorer, experts, seed, economy=economy, **settings), scorer))
        (full, whole), (raced, part) = plans
        assert course(raced) == course(full)
        assert raced.search is not None
        assert full.search is not None
        assert raced.search.stopped == full.search.stopped
        assert part.answered <= whole.answered
        assert raced.search.evaluations == pytest.approx(len(part.answered) / 11, abs=1e-3)
        assert full.search.evaluations == len(whole.answered) / 11


def test_races_save_answers() -> None:
    spent = {}
    for economy in ("none", "exact"):
        scorer = Margins(3, 12, easy=1.0, seed=5)
        scorer.base[0] = -100.0
        plan = simulate(scorer, 3, economy=economy, search="random", generations=10)
        assert plan.search is not None
        spent[economy] = plan.search.evaluations
        # The base, and the first expert, which were answered before the first generation.
        assert plan.search.evaluations == pytest.approx(1 + sum(g.evaluations for g in plan.history), abs=0.02)
    assert spent["exact"] < 0.8 * spent["none"]


@pytest.mark.parametrize("economy", ["exact", "early", "halving"])
def test_a_search_ends_when_no_mixture_can_score_higher(economy: Any) -> None:
    def reachable() -> Margins:
        """All docs can be right, one of them with the help of the first expert alone."""
        scorer = Margins(2, 6, easy=0.0, seed=1)
        scorer.base[:] = [-0.5, *[9.0] * 5]
        scorer.slopes[0] = [2.0, 0.0]
        return scorer

    plan, full = (simulate(reachable(), 2, economy=name) for name in (economy, "none"))
    assert plan.held_out is not None
    assert full.held_out is not None
    assert plan.held_out.after == full.held_out.after == 1.0
    assert plan.search is not None
    assert full.search is not None
    assert plan.search.stopped == "no mixture can score higher than 1"
    assert plan.search.evaluations < full.search.evaluations / 3


def test_early_ends_after_generations_without_a_higher_score_and_random_does_not() -> None:
    scorer = Margins(3, 10, easy=0.0, seed=0)
    plan = simulate(scorer, 3, economy="early")
    assert plan.search is not None
    wait = early(3)
    assert (wait, early(1), early(8), early(90)) == (4, 3, 5, 12)
    assert plan.search.stopped == f"no higher score in {wait} generations"
    best = [generation.best for generation in plan.history]
    assert len(set(best[-wait - 1 :])) == 1
    assert len(best) == wait + 1 or best[-wait - 2] != best[-1]
    plain = simulate(Margins(3, 10, easy=0.0, seed=0), 3, economy="early", search="random", generations=12)
    assert plain.search is not None
    assert plain.search.stopped == "all 12 generations done"


def test_halving_asks_each_generation_a_part_of_the_docs_first() -> None:
    scorer = Margins(3, 10, easy=0.0, seed=2)
    plan = simulate(scorer, 3, economy="halving", population=16, generations=1)
    counts: dict[bytes, int] = {}
    for name, _ in scorer.answered:
        counts[name] = counts.get(name, 0) + 1
    # The base answers all before the generation, and so does the first expert, which may be among the 8 that leave.
    assert sorted(counts.values()) in ([3] * 8 + [10] * 9, [3] * 7 + [10] * 10)
    assert plan.history[0].evaluations == pytest.approx(8 + 8 * 0.3)
    assert plan.search is not None
    assert plan.search.evaluations == pytest.approx(len(scorer.answered) / 10)


def test_a_budget_counts_what_a_race_spends() -> None:
    for budget in (5, 20, 40):
        scorer = Margins(3, 10, easy=1.0, seed=3)
        plan = simulate(scorer, 3, budget=Budget(evaluations=budget), search="random")
        assert plan.search is not None
        assert budget - 1 < plan.search.evaluations <= budget
        assert plan.search.evaluations == pytest.approx(len(scorer.answered) / 10)


def test_unbounded_scores_are_not_raced() -> None:
    scorer = Margins(3, 10, easy=1.0, seed=3)
    scorer.bounds = None
    plan = simulate(scorer, 3, generations=3, population=12)
    assert len(scorer.answered) % 10 == 0
    assert plan.search is not None
    assert plan.search.stopped == "all 3 generations done"


def test_searches_say_what_they_learn_from() -> None:
    def needs(name: str, dimensions: int, population: int = 20) -> tuple[int, bool]:
        search = make_search(
            name, [0.5] * dimensions, population=population, generations=9, elite=0.2, seed=0, starts=[]
        )
        found = search.needs(population)
        return found.best, found.ordered

    assert needs("cem", 3) == (4, False)
    assert needs("cma", 3) == (20, True)
    assert needs("cma", SEPARABLE_ABOVE + 1) == (10, True)
    assert needs("cma", SEPARABLE_ABOVE + 1, 2) == (2, True)
    assert needs("random", 3) == (1, True)


@pytest.mark.parametrize(("name", "dimensions"), [("cem", 3), ("cma", SEPARABLE_ABOVE + 1), ("random", 3)])
def test_what_a_search_does_not_need_does_not_change_its_course(name: str, dimensions: int) -> None:
    def run(blind: bool) -> list[Any]:
        search = make_search(
            name, [0.5] * dimensions, population=12, generations=6, elite=0.25, seed=1, starts=[[1.0] * dimensions]
        )
        asked = []
        while candidates := search.ask():
            asked.append(candidates)
            keys = [(-float(np.square(np.asarray(c) - 0.2).sum()), 0.0) for c in candidates]
            if blind:
                needs = search.needs(len(candidates))
                best = sorted(keys, reverse=True)[: needs.best]
                keys = [key if key in best else (-np.inf, -np.inf) for key in keys]
            search.tell(candidates, keys)
        return asked

    assert run(True) == run(False)
