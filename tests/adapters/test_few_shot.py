"""Few-shot search on a tiny model: searches, groups and options side by side, budgets, and preselection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z
from t2.adapters.search import SEARCHES, Budget
from t2.adapters.strategies import STRATEGIES, Plan, Score
from t2.adapters.strategies.preselect import cost, rounds
from t2.core.errors import ArgumentError
from tests.adapters.conftest import expert_of, random_z
from tests.adapters.test_strategies import Q1, UP, Landscape, corners, distance, job


class Clock:
    """A clock that a scorer moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Docs:
    """A scorer over docs of which each mixture answers some; z of one matrix tells which mixture it is."""

    higher_is_better = True
    bounds: tuple[float, float] | None = None

    def __init__(
        self,
        docs: int,
        per_doc: Callable[[float, int], float],
        tie: Callable[[float], float] = lambda x: -1.0,
        clock: Clock | None = None,
    ) -> None:
        self.docs, self.prompts = docs, [f"doc {i}" for i in range(docs)]
        self.per_doc, self.tie, self.clock = per_doc, tie, clock
        self.answered: list[tuple[float, int]] = []

    @staticmethod
    def number(z: Z | None) -> float:
        return 0.0 if z is None else round(float(z[UP][0]) - 1, 4)

    def evaluate(self, mixtures: Sequence[Z | None], docs: Sequence[int] | None = None) -> list[Score]:
        shown = range(self.docs) if docs is None else docs
        return [self._score([(self.number(z), doc) for doc in shown]) for z in mixtures]

    def combine(self, mixtures: Sequence[Z | None], rows: Sequence[int], docs: Sequence[int] | None = None) -> Score:
        shown = range(self.docs) if docs is None else docs
        return self._score([(self.number(mixtures[row]), doc) for row, doc in zip(rows, shown, strict=True)])

    def tie_break(self, mixtures: Sequence[Z | None], docs: Sequence[int] | None = None) -> list[float]:
        return [self.tie(self.number(z)) for z in mixtures]

    def _score(self, cells: list[tuple[float, int]]) -> Score:
        new = set(cells) - set(self.answered)
        self.answered += sorted(new)
        if self.clock is not None:
            self.clock.now += len(new) / self.docs
        values = tuple(self.per_doc(x, doc) for x, doc in cells)
        return Score(sum(values) / len(values), values)


def many(engine: TransformersEngine, count: int) -> list[Any]:
    """Experts 1 … count, told apart by z = 1 + k/100 of one matrix."""
    rank = engine.ranks()[UP]
    return [expert_of(engine, f"e{k}", {UP: torch.full((rank,), 1 + k / 100)}, "math") for k in range(1, count + 1)]


def search(
    engine: TransformersEngine, scorer: Any, experts: Any = None, clock: Clock | None = None, **options: Any
) -> Plan:
    settings: dict[str, Any] = {"population": 12, "generations": 30, "space": "delta", **options}
    work = job(engine, corners(engine) if experts is None else experts, scorer, **settings)
    return STRATEGIES["cem"]().plan(replace(work, clock=clock) if clock else work)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("per", ["expert", "layer", "matrix"])
@pytest.mark.parametrize("space", ["paper", "delta"])
@pytest.mark.parametrize("normalise", ["none", "sum"])
@pytest.mark.parametrize("rescale", ["none", "nuclear"])
def test_every_search_works_with_every_grouping_and_option(
    name: str, per: Any, space: Any, normalise: Any, rescale: Any, llama: TransformersEngine
) -> None:
    options: dict[str, Any] = {"per": per, "space": space, "normalise": normalise, "rescale": rescale}
    experts = [expert_of(llama, k, random_z(llama, i)) for i, k in enumerate("ab")]
    scorer = Vectors()
    plan = search(llama, scorer, experts, search=name, population=6, generations=4, **options)
    assert plan.search is not None
    assert plan.search.algorithm == name
    assert plan.search.evaluations == len(scorer.seen) >= 10
    assert plan.held_out is not None
    assert plan.held_out.after == max(scorer.seen) > plan.held_out.before  # type: ignore[operator]
    (choice,) = plan.choices
    assert choice.z is not None
    alpha = list(choice.alpha.values())
    z = _choose(job(llama, experts, **options), [alpha[i : i + 2] for i in range(0, len(alpha), 2)])
    assert len(alpha) == 2 * {"expert": 1, "layer": 2, "matrix": len(z)}[per]
    assert all(torch.equal(choice.z[n], vector) for n, vector in z.items())
    if rescale == "nuclear":
        bases = llama.bases(z)
        sums = [(float((bases[n].sigma * v).sum()), float(bases[n].sigma.sum())) for n, v in z.items()]
        assert all(moved == pytest.approx(own, rel=1e-4) for moved, own in sums)


class Vectors:
    """A scorer that likes mixtures whose vectors lie near 1.2 everywhere."""

    docs, prompts, higher_is_better = 3, ("",) * 3, True
    bounds: tuple[float, float] | None = None

    def __init__(self) -> None:
        self.seen: list[float] = []

    def evaluate(self, mixtures: Sequence[Z | None], docs: Sequence[int] | None = None) -> list[Score]:
        values = [
            -10.0 if z is None else -float(torch.cat([(v - 1.2) ** 2 for v in z.values()]).mean()) for z in mixtures
        ]
        self.seen += values
        return [Score(value) for value in values]

    def tie_break(self, mixtures: Sequence[Z | None], docs: Sequence[int] | None = None) -> list[float]:
        return [-1.0] * len(mixtures)


def told(plan: Plan) -> Any:
    """All of a plan but its vectors."""
    return [choice.alpha for choice in plan.choices], replace(plan, choices=())


def _choose(work: Any, rows: Any) -> Z:
    from t2.adapters.strategies.mixing import choose

    z = choose(work, rows).z
    assert z is not None
    return z


@pytest.mark.parametrize("name", SEARCHES)
def test_an_evaluation_budget_is_kept_exactly_and_repeats(name: str, llama: TransformersEngine) -> None:
    def plan(budget: int) -> tuple[Plan, Landscape]:
        scorer = Landscape(lambda a, b: -distance(a, b))
        return search(llama, scorer, search=name, budget=Budget(evaluations=budget)), scorer

    for budget in (2, 3, 20, 31):
        first, scorer = plan(budget)
        assert len(scorer.seen) == budget
        assert first.search is not None
        assert first.search.evaluations == budget
        assert first.search.stopped == f"the budget of {budget} evaluations is spent"
        assert f"; the budget of {budget} evaluations is spent" in first.note
        assert told(first) == told(plan(budget)[0])
    # Base and twelve, twelve more, and six of a third generation.
    assert [generation.evaluations for generation in plan(31)[0].history] == [12, 12, 6]


def test_the_least_budget_compares_one_mixture_with_the_base(llama: TransformersEngine) -> None:
    # The first expert alone is α = (1, 0).
    plan = search(llama, Landscape(lambda a, b: a), budget=Budget(evaluations=2))
    assert plan.note.startswith("best of 2 mixtures in 1 generations; ")
    assert list(plan.choices[0].alpha.values()) == [1.0, 0.0]
    assert not plan.no_signal
    assert plan.held_out is not None
    assert (plan.held_out.before, plan.held_out.after) == (0.0, 1.0)


def test_a_search_that_compared_nothing_does_not_speak_of_no_signal(llama: TransformersEngine) -> None:
    clock = Clock()
    scorer = Docs(10, lambda x, doc: x, clock=clock)
    plan = search(llama, scorer, many(llama, 3), clock, budget=Budget(seconds=0.5))
    assert plan.note == "the budget of 0.5 s is spent before any mixture could be compared with the base, which stays"
    assert not plan.no_signal
    assert plan.choices[0].z is None


def test_a_budget_that_is_not_reached_changes_nothing(llama: TransformersEngine) -> None:
    free = search(llama, Landscape(lambda a, b: -distance(a, b)), generations=3)
    rich = search(llama, Landscape(lambda a, b: -distance(a, b)), generations=3, budget=Budget(evaluations=1000))
    timed = search(llama, Landscape(lambda a, b: -distance(a, b)), generations=3, budget=Budget(seconds=3600))
    assert told(free) == told(rich) == told(timed)
    assert free.search is not None
    assert free.search.stopped == "all 3 generations done"


@pytest.mark.parametrize("seconds", [2, 10, 30.5])
def test_a_time_budget_is_kept(seconds: float, llama: TransformersEngine) -> None:
    clock = Clock()
    scorer = Docs(4, lambda x, doc: -abs(x - 0.37), clock=clock)
    plan = search(llama, scorer, many(llama, 3), clock, budget=Budget(seconds=seconds), space="paper")
    assert seconds - 1 < clock.now <= seconds
    assert plan.search is not None
    assert plan.search.evaluations == clock.now
    assert plan.search.stopped == f"the budget of {seconds:g} s is spent"


def test_the_estimate_comes_before_the_search(llama: TransformersEngine) -> None:
    clock = Clock()
    scorer = Docs(4, lambda x, doc: -abs(x - 0.37), clock=clock)
    said: list[tuple[str, float]] = []
    for budget in (Budget(), Budget(evaluations=50), Budget(seconds=20)):
        work = job(llama, many(llama, 12), scorer, population=5, generations=4, budget=budget)
        work = replace(work, clock=clock, say=lambda text: said.append((text, clock.now)))
        scorer.answered.clear()
        clock.now = 0.0
        STRATEGIES["cem"]().plan(work)
    assert [now for _, now in said] == [2.0, 2.0, 2.0]
    assert said[0][0] == (
        "tiny: searching mixtures of the best 8 of 12 experts on 4 adaptation docs by cem; about 1.0 s a mixture, "
        "5.0 s a generation of 5, at most 20 s for 4 generations, and before them 11 s to choose the experts"
    )
    assert said[1][0].endswith("; the budget of 50 evaluations allows about 50 s")
    assert said[2][0].endswith("; the budget of 20 s allows about 20 mixtures")


def test_rounds_of_a_preselection() -> None:
    assert rounds(10, 300, 8) == [(2, 300), (3, 122), (5, 49), (10, 20)]
    assert cost(rounds(10, 300, 8), 10) == 92.0
    assert rounds(10, 30, 8) == [(2, 30), (3, 22), (5, 16), (10, 12)]
    assert rounds(1, 30, 8) == [(1, 30)]
    assert rounds(2, 9, 8) == [(1, 9), (2, 9)]


def test_the_best_of_many_experts_are_found_with_few_evaluations(llama: TransformersEngine) -> None:
    """Expert k of 40 answers k of the 40 levels of every doc; the search is over the best eight."""
    scorer = Docs(10, lambda x, doc: x if doc % 2 else x / 2, tie=lambda x: -x)
    plan = search(llama, scorer, many(llama, 40), population=4, generations=2)
    assert plan.preselected is not None
    assert plan.preselected.of == 40
    assert [one.name for one in plan.preselected.experts] == [f"e{k}" for k in range(40, 32, -1)]
    assert plan.preselected.experts[0].score == pytest.approx(0.3)
    # The first expert and the base had answered all docs for the estimate.
    assert plan.preselected.evaluations == pytest.approx(cost(rounds(10, 40, 8), 10) - 0.2)
    assert set(plan.choices[0].alpha) == {f"e{k}" for k in range(33, 41)}
    alone = {x for x, doc in scorer.answered if x > 0 and (x, 9) in scorer.answered}
    assert len({x for x in alone if round(100 * x) == 100 * x}) < 40


def test_equal_experts_are_preselected_by_likelihood_then_by_order(llama: TransformersEngine) -> None:
    def chosen(tie: Callable[[float], float]) -> list[str]:
        plan = search(llama, Docs(8, lambda x, doc: float(x > 0), tie), many(llama, 12), population=2, generations=1)
        assert plan.preselected is not None
        return [one.name for one in plan.preselected.experts]

    assert chosen(lambda x: x) == [f"e{k}" for k in range(12, 4, -1)]
    assert chosen(lambda x: -1.0) == [f"e{k}" for k in range(1, 9)]


def test_as_many_experts_as_wanted_are_not_preselected(llama: TransformersEngine) -> None:
    def value(x: float, doc: int) -> float:
        return -abs(x - 0.03)

    few = search(llama, Docs(4, value), many(llama, 8), population=10, generations=1)
    none = search(llama, Docs(4, value), many(llama, 12), population=14, generations=1, preselect=None)
    assert few.preselected is None
    assert none.preselected is None
    assert len(none.choices[0].alpha) == 12
    assert few.search is not None
    assert few.search.evaluations >= 10


def test_a_preselection_takes_at_most_half_of_a_budget(llama: TransformersEngine) -> None:
    def plan(budget: float) -> Plan:
        return search(llama, Docs(10, lambda x, doc: x), many(llama, 40), budget=Budget(evaluations=budget))

    for budget in (16, 25, 60):
        report = plan(budget).preselected
        assert report is not None
        assert report.evaluations <= budget / 2
        assert len(report.experts) == 8
        found = plan(budget).search
        assert found is not None
        assert found.evaluations <= budget
    with pytest.raises(ArgumentError, match="budget=8 is too small for a first look at 40 experts"):
        plan(8)


def test_an_expert_that_gives_no_mixture_is_not_preselected(llama: TransformersEngine) -> None:
    rank = llama.ranks()[UP]
    zero = expert_of(llama, "zero", {UP: torch.zeros(rank)}, "math")
    experts = [zero, *many(llama, 9)]
    scorer = Docs(4, lambda x, doc: x)
    plan = search(llama, scorer, experts, rescale="nuclear", population=2, generations=1, space="paper")
    assert plan.preselected is not None
    assert "zero" not in {one.name for one in plan.preselected.experts}


def test_a_matrix_that_only_some_experts_hold_counts_as_one_in_the_others(llama: TransformersEngine) -> None:
    ranks = llama.ranks()
    experts = [
        expert_of(llama, "both", {UP: torch.full((ranks[UP],), 3.0), Q1: torch.full((ranks[Q1],), 2.0)}, "math"),
        expert_of(llama, "one", {UP: torch.full((ranks[UP],), 5.0)}, "code"),
    ]
    z = _choose(job(llama, experts), [(0.5, 0.25)])
    assert float(z[UP][0]) == 2.75
    assert float(z[Q1][0]) == 1.25
    delta = _choose(job(llama, experts, space="delta"), [(0.5, 0.25)])
    assert float(delta[UP][0]) == 3.0
    assert float(delta[Q1][0]) == 1.5
