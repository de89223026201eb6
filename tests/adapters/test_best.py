"""``adapt=best`` takes the expert that does best alone, and never the base."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.strategies import STRATEGIES, Plan
from tests.adapters.test_few_shot import Docs, many
from tests.adapters.test_strategies import job


def best(engine: TransformersEngine, value: Callable[[float], float], tie: Callable[[float], float]) -> Plan:
    scorer = Docs(4, lambda x, doc: value(x), tie)
    return STRATEGIES["best"]().plan(job(engine, many(engine, 5), scorer))


def test_the_highest_score_wins_and_then_the_likelihood(llama: TransformersEngine) -> None:
    plan = best(llama, lambda x: -abs(x - 0.03), lambda x: -x)
    assert plan.choices[0].alpha == {"e3": 1.0}
    assert plan.held_out is not None
    assert (plan.held_out.docs, plan.held_out.after) == (4, 0.0)
    assert plan.held_out.before == pytest.approx(-0.03)
    assert plan.preselected is not None
    assert (plan.preselected.of, plan.preselected.evaluations) == (5, 6)
    assert best(llama, lambda x: 0.5, lambda x: x).choices[0].alpha == {"e5": 1.0}
    assert best(llama, lambda x: 0.5, lambda x: -1.0).choices[0].alpha == {"e1": 1.0}


def test_an_expert_is_taken_even_where_the_base_is_better(llama: TransformersEngine) -> None:
    plan = best(llama, lambda x: float(x == 0), lambda x: -x)
    assert plan.choices[0].alpha == {"e1": 1.0}
    assert not plan.no_signal
