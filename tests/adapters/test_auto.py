"""``adapt=auto``: which strategy it takes on score landscapes that are known, what it may spend, and what it says."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.search import Budget
from t2.adapters.strategies import STRATEGIES, Choice, DomainPrompts, Plan, Score
from t2.adapters.strategies.auto import Judged, decide
from t2.core.errors import ArgumentError
from t2.core.record import Considered
from tests.adapters.conftest import expert_of, random_z
from tests.adapters.test_dispatch import classifier_of
from tests.adapters.test_few_shot import Clock, Docs, many
from tests.adapters.test_strategies import job


def auto(
    engine: TransformersEngine, scorer: Any, experts: Any = None, clock: Clock | None = None, **options: Any
) -> Plan:
    settings: dict[str, Any] = {"population": 12, "generations": 8, **options}
    work = job(engine, many(engine, 3) if experts is None else experts, scorer, **settings)
    return STRATEGIES["auto"]().plan(replace(work, clock=clock) if clock else work)


def table(plan: Plan) -> dict[str, Considered]:
    return {one.strategy: one for one in plan.considered}


def judged(name: str, per_doc: Sequence[float], cost: float, value: float | None = None) -> Judged:
    mean = sum(per_doc) / len(per_doc) if per_doc else 0.0
    return Judged(
        name, lambda: Plan((Choice(),), (0,), ""), Score(mean if value is None else value, tuple(per_doc)), cost
    )


def answers(right: Sequence[int], docs: int) -> list[float]:
    return [float(doc in right) for doc in range(docs)]


@pytest.mark.parametrize("docs", range(2, 41))
def test_one_answer_more_is_exactly_one_standard_error_and_not_enough(docs: int) -> None:
    """sd(d)/√n of one difference among n is 1/n; rounding must not decide."""
    for right in range(docs):
        base = judged("none", answers(range(right), docs), 0)
        search = judged("cem", answers(range(right + 1), docs), 60)
        assert decide([base, search]) is base
        assert base.reason.startswith("within one standard error") or docs == 1


@pytest.mark.parametrize(
    ("scores", "chosen", "reasons"),
    [
        # Two answers more and none lost is more than one standard error.
        (
            [([0, 1], 0), ([0, 1, 2, 3], 60)],
            1,
            ["lower than s1 by 0.2, one standard error is 0.133", "the highest score"],
        ),
        # Three won and one lost is not: 0.2 against 0.2.
        ([([0, 9], 0), ([0, 1, 2, 3], 60)], 0, ["within one standard error (0.2) of s1", "not better than s0"]),
        # Of equally good ones the cheapest, though another scores higher.
        (
            [([0], 0), ([1, 2, 3, 4], 5), ([1, 2, 3, 4, 5], 60)],
            1,
            ["lower than s2", "within one", "not better than s1"],
        ),
        (
            [([0, 1, 2], 9), ([0, 1, 2], 3), ([0, 1, 2], 3)],
            1,
            ["ties with s1", "ties with s0, cheaper", "ties with s1"],
        ),
    ],
)
def test_the_rule(scores: list[tuple[list[int], float]], chosen: int, reasons: list[str]) -> None:
    ones = [judged(f"s{i}", answers(right, 10), cost) for i, (right, cost) in enumerate(scores)]
    assert decide(ones) is ones[chosen]
    assert [one.reason.startswith(reason) for one, reason in zip(ones, reasons, strict=True)] == [True] * len(ones)


def test_the_rule_for_metrics_of_other_kinds() -> None:
    # Lower is better: the values by doc have the metric's own sign, the score is turned.
    worse, better = judged("none", [3.0, 4.0, 5.0], 0, value=-4.0), judged("cem", [1.0, 2.1, 3.0], 60, value=-6.1 / 3)
    assert decide([worse, better], higher_is_better=False) is better
    # A perplexity is no mean over docs: without a standard error the highest score is taken.
    base, search = judged("none", [], 0, value=-4.0), judged("cem", [], 60, value=-3.999)
    assert decide([base, search]) is search
    # What is not judged, or is no number, is not taken.
    unjudged = Judged("prompt", lambda: Plan((Choice(),), (0,), ""), None, None, "an expert has no domain")
    nothing = judged("mix", [], 1, value=-math.inf)
    assert decide([unjudged, nothing, search]) is search
    assert unjudged.reason == "an expert has no domain"
    assert decide([base, judged("cem", [], 60, value=-4.0)]) is base


def near(target: float, width: float = 0.005) -> Callable[[float, int], float]:
    return lambda x, doc: float(abs(x - target) < width)


def test_the_search_is_taken_where_only_a_mixture_is_right(llama: TransformersEngine) -> None:
    """z of expert k is 1 + k/100; in the delta space only α far from one expert alone gets near 1.16."""
    scorer = Docs(10, lambda x, doc: max(0.0, 1 - abs(x - 0.16) / 0.2))
    plan = auto(llama, scorer, space="delta", generations=40)
    found = table(plan)
    assert list(found) == ["none", "mix", "expert", "prompt", "cem"]
    assert [one.strategy for one in plan.considered if one.chosen] == ["cem"]
    assert found["cem"].reason == "the highest score"
    assert found["none"].reason.startswith("lower than cem by")
    assert plan.note.startswith("auto chose cem, ")
    assert plan.held_out is not None
    assert plan.held_out.before == pytest.approx(0.2)
    assert plan.held_out.after == pytest.approx(scorer.per_doc(Docs.number(plan.choices[0].z), 0))
    assert all(one.docs == 10 and one.score is not None for one in plan.considered)
    assert (found["none"].cost, found["mix"].cost, found["expert"].cost) == (0, 1, 4)
    assert found["cem"].cost is not None
    assert found["cem"].cost > 12


@pytest.mark.parametrize(("target", "expected"), [(0.0, "none"), (0.02, "mix"), (0.03, "expert")])
def test_the_simplest_that_suffices_is_taken(target: float, expected: str, llama: TransformersEngine) -> None:
    """The uniform mixture of 1.01, 1.02 and 1.03 is 1.02, which one expert is too."""
    plan = auto(llama, Docs(8, near(target)))
    assert [one.strategy for one in plan.considered if one.chosen] == [expected]
    assert Docs.number(plan.choices[0].z) == pytest.approx(target, abs=0.005)
    assert plan.held_out is not None
    assert plan.held_out.after == 1.0
    if expected == "expert":
        assert plan.choices[0].alpha == {"e3": 1.0}


def test_what_is_learned_by_heart_is_not_rewarded(llama: TransformersEngine) -> None:
    """Every mixture answers every doc by the toss of a coin: the best of many looks good where it was chosen."""

    def coin(x: float, doc: int) -> float:
        return float(hashlib.sha256(f"{x} {doc}".encode()).digest()[0] < 102)

    chosen, scores, fooled = [], [], []
    for seed in range(8):
        plan = auto(llama, Docs(16, coin), seed=seed, generations=10)
        found = table(plan)
        assert found["cem"].score is not None
        scores.append(found["cem"].score)
        chosen += [one.strategy for one in plan.considered if one.chosen]
        alone = STRATEGIES["cem"]().plan(
            job(llama, many(llama, 3), Docs(16, coin), population=12, generations=10, seed=seed)
        )
        assert alone.held_out is not None
        fooled.append(alone.held_out.after)
    assert sum(fooled) / 8 > 0.7  # type: ignore[arg-type]
    assert sum(scores) / 8 == pytest.approx(0.4, abs=0.1)
    assert chosen.count("cem") <= 3


def test_the_dispatch_is_judged_on_the_adaptation_docs(llama: TransformersEngine) -> None:
    """Every doc is answered right by the mixture that the dispatch gives it, and by no other."""
    domains = ["math", "code", "cooking"]
    experts = [expert_of(llama, f"e{i}", random_z(llama, i), domain) for i, domain in enumerate(domains)]
    scorer = Docs(32, lambda x, doc: 0.0)
    scorer.prompts = [f"{word} {i}" for i in range(8) for word in ("the", "stop", "zz ab", "7+8")]
    plain = STRATEGIES["prompt"]().plan(job(llama, experts, prompts=scorer.prompts, threshold=0.0))
    numbers = [Docs.number(plain.choices[row].z) for row in plain.rows]
    assert len(set(numbers)) > 1
    scorer.per_doc = lambda x, doc: float(x == numbers[doc])
    held_out = DomainPrompts((("7 + 8", "math"), ("stop", "code")), {"math": "here", "code": "here"})
    work = job(llama, experts, scorer, prompts=["one", "two", "three", "four"], population=12, generations=2)
    work = replace(work, options=replace(work.options, threshold=0.0), held_out=lambda labels, by: held_out)
    plan = STRATEGIES["auto"]().plan(work)
    found = table(plan)
    assert found["prompt"].score == 1.0
    used = len({row for row in plain.rows if plain.choices[row].z is not None})
    assert found["prompt"].cost == pytest.approx((4 + 2) / 32 + used, abs=1e-3)
    assert found["prompt"].chosen
    assert plan.dispatch
    assert len(plan.rows) == 4
    assert plan.held_out is not None
    assert plan.held_out.after == 1.0


def test_a_dispatch_is_judged_where_the_budget_has_room_for_its_questions(llama: TransformersEngine) -> None:
    held_out = DomainPrompts(tuple((f"sum {i}", "math") for i in range(40)), {"math": "here"})
    asked: list[tuple[Sequence[str], Any]] = []

    def given(labels: Sequence[str], classifier: Any) -> DomainPrompts:
        asked.append((labels, classifier))
        return held_out

    def plan(budget: int) -> Plan:
        work = job(llama, many(llama, 1), Docs(10, near(0.01)), budget=Budget(evaluations=budget), threshold=0.0)
        return STRATEGIES["auto"]().plan(replace(work, held_out=given))

    # The base and the expert take two evaluations, 40 held-out prompts four, and the adaptation docs one.
    poor, rich = table(plan(7)), table(plan(8))
    assert poor["prompt"].reason == "the budget leaves no room to judge it"
    assert rich["prompt"].score is not None
    found = plan(8).search
    assert found is not None
    assert 7 <= found.evaluations <= 8
    assert set(map(str, asked)) == {str((("math", "others"), None))}


def test_a_classifier_is_judged_beside_the_base_and_each_by_its_own_prompts(llama: TransformersEngine) -> None:
    experts = [expert_of(llama, f"e{i}", random_z(llama, i), domain) for i, domain in enumerate(["math", "code"])]
    classifier = classifier_of(llama)
    asked: list[Any] = []

    def given(labels: Sequence[str], by: Any) -> DomainPrompts:
        asked.append(None if by is None else by.name)
        return DomainPrompts((("7 + 8", "math"),), {"math": "here"})

    work = job(llama, experts, Docs(4, near(0.5)), population=4, generations=1)
    plan = STRATEGIES["auto"]().plan(replace(work, classifier=classifier, held_out=given))
    assert list(table(plan)) == ["none", "mix", "expert", "prompt", "classifier", "cem"]
    assert set(asked) == {None, classifier.name}
    assert table(plan)["classifier"].score is not None


def test_with_nothing_to_compare_there_is_no_signal_to_speak_of(llama: TransformersEngine) -> None:
    plan = auto(llama, Docs(10, near(0.0)), budget=Budget(evaluations=2))
    assert not plan.no_signal
    assert plan.note == "auto chose none, 1 on 10 adaptation docs (the only one that could be judged): the base model"


def test_experts_without_domains_are_judged_all_but_by_dispatch(llama: TransformersEngine) -> None:
    experts = [expert_of(llama, f"e{i}", random_z(llama, i), None) for i in range(2)]
    found = table(auto(llama, Docs(4, near(0.0)), experts, generations=1))
    assert found["prompt"].score is None
    assert found["prompt"].docs == 0
    assert found["prompt"].reason == "adapt=prompt needs experts with a domain, e0 has none"
    assert found["none"].chosen


def test_a_single_expert_has_no_uniform_mixture(llama: TransformersEngine) -> None:
    plan = auto(llama, Docs(4, near(0.01)), many(llama, 1))
    assert list(table(plan)) == ["none", "expert", "prompt", "cem"]
    assert plan.choices[0].alpha == {"e1": 1.0}
    assert table(plan)["expert"].cost == 1


def test_no_signal(llama: TransformersEngine) -> None:
    plan = auto(llama, Docs(6, lambda x, doc: 0.0))
    assert plan.no_signal
    assert plan.choices[0].z is None
    assert plan.note == "NO SIGNAL: every strategy scores 0 on 6 adaptation docs, so the base stays"


def test_a_lower_is_better_metric_is_told_with_its_own_sign(llama: TransformersEngine) -> None:
    class Loss(Docs):
        higher_is_better = False

        def _score(self, cells: list[tuple[float, int]]) -> Score:
            found = super()._score(cells)
            return Score(-found.value, found.per_doc)

    plan = auto(llama, Loss(6, lambda x, doc: 1 + abs(x - 0.03) * 10 + doc))
    found = table(plan)
    assert found["expert"].chosen
    assert found["none"].score == pytest.approx(3.8)
    assert found["expert"].score == pytest.approx(3.5)
    assert plan.held_out is not None
    assert plan.held_out.before == pytest.approx(3.8)
    assert plan.held_out.after == pytest.approx(3.5)


@pytest.mark.parametrize("budget", [2, 4, 6, 10, 15, 40, 100])
def test_a_budget_covers_judging_and_adapting(budget: int, llama: TransformersEngine) -> None:
    scorer = Docs(10, lambda x, doc: max(0.0, 1 - abs(x - 0.16) / 0.2))
    plan = auto(llama, scorer, space="delta", budget=Budget(evaluations=budget))
    assert len(scorer.answered) <= 10 * budget
    assert plan.search is not None
    assert len(scorer.answered) / 10 <= plan.search.evaluations + 1e-9 or plan.search.evaluations <= budget
    found = table(plan)
    if budget < 10:
        assert found["cem"].score is None
        assert found["cem"].reason == "the budget leaves no room to judge it"
    else:
        assert found["cem"].score is not None


def test_a_time_budget_covers_judging_and_adapting(llama: TransformersEngine) -> None:
    for seconds in (15, 60):
        clock = Clock()
        scorer = Docs(10, lambda x, doc: max(0.0, 1 - abs(x - 0.16) / 0.2), clock=clock)
        plan = auto(llama, scorer, clock=clock, space="delta", budget=Budget(seconds=seconds), generations=100)
        assert clock.now <= seconds + 1
        assert table(plan)["cem"].score is not None


def test_the_choice_does_not_depend_on_the_machine(llama: TransformersEngine) -> None:
    def plan(speed: float) -> Plan:
        clock = Clock()
        scorer = Docs(10, near(0.03), clock=clock)
        found = auto(llama, scorer, clock=clock)
        return replace(found, considered=tuple(one.model_copy(update={"seconds": speed}) for one in found.considered))

    first, again = plan(1.0), plan(1.0)
    assert [choice.alpha for choice in first.choices] == [choice.alpha for choice in again.choices]
    assert replace(first, choices=()) == replace(again, choices=())


def test_many_experts_are_preselected_on_each_half(llama: TransformersEngine) -> None:
    plan = auto(llama, Docs(10, lambda x, doc: x), many(llama, 20), generations=1, population=4)
    found = table(plan)
    assert found["expert"].chosen or found["cem"].chosen
    assert plan.preselected is not None
    assert plan.preselected.experts[0].name == "e20"
    assert found["expert"].score == pytest.approx(0.2)


def test_one_doc_is_not_enough(llama: TransformersEngine) -> None:
    with pytest.raises(ArgumentError, match="needs at least 2 labelled adaptation docs"):
        auto(llama, Docs(1, near(0.0)))
    with pytest.raises(ArgumentError, match="population=0"):
        auto(llama, Docs(4, near(0.0)), population=0)
