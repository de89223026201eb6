from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2.training.rewards import reward_of


@pytest.mark.parametrize(
    ("score", "reward"), [(1, 1), (0, -1), (0.5, 0), (0.75, 0.5), (7, 1), (-3, -1), (float("nan"), -1)]
)
def test_a_score_between_0_and_1_lies_between_minus_1_and_1(score: float, reward: float) -> None:
    assert reward_of(score) == reward


def test_the_ends_can_be_moved() -> None:
    assert [reward_of(score, right=1.0, wrong=-0.1) for score in (0, 1)] == [-0.1, 1.0]


@given(st.floats(0, 1), st.floats(0, 1))
def test_where_lower_is_better_the_order_is_reversed(first: float, second: float) -> None:
    higher = reward_of(first) - reward_of(second)
    lower = reward_of(first, higher_is_better=False) - reward_of(second, higher_is_better=False)
    assert higher == pytest.approx(-lower, abs=1e-12)
