from __future__ import annotations

import pytest

from t2.adapters.search import NO_BUDGET, Budget, Meter
from t2.core.errors import ArgumentError


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("text", "budget", "shown"),
    [
        ("200", Budget(evaluations=200), "200"),
        ("1e3", Budget(evaluations=1000), "1000"),
        ("100.0", Budget(evaluations=100), "100"),
        ("2", Budget(evaluations=2), "2"),
        ("60s", Budget(seconds=60), "60s"),
        ("1.5m", Budget(seconds=90), "90s"),
        ("2h", Budget(seconds=7200), "7200s"),
    ],
)
def test_a_budget_is_a_number_of_evaluations_or_a_time(text: str, budget: Budget, shown: str) -> None:
    assert Budget.parse(text) == budget
    assert str(budget) == shown
    assert Budget.parse(str(budget)) == budget
    assert budget
    assert not NO_BUDGET


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0", "at least 2"),
        ("1", "at least 2: the base and one mixture"),
        ("2.5", "whole number of evaluations"),
        ("0s", "more than no time"),
        ("abc", "such as 200, or a time, such as 60s or 5m"),
        ("-5", "such as 200, or a time"),
        ("60 s s", "such as 200"),
        ("60d", "such as 200"),
        ("nan", "such as 200"),
        ("1e999", "such as 200"),
        ("True", "such as 200"),
        ("", "such as 200"),
    ],
)
def test_what_is_no_budget_is_told_in_one_line(text: str, why: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        Budget.parse(text)
    assert str(caught.value).startswith(f"budget={text}"[:10])
    assert why in str(caught.value)


def test_evaluations_are_counted_down() -> None:
    meter = Meter(Budget(evaluations=4), Clock())
    assert meter.allowed() == 4
    meter.spend(2.5)
    assert meter.left() == 1.5
    assert meter.allowed() == 1
    meter.spend(2)
    assert meter.allowed() == 0
    assert meter.spent() == "the budget of 4 evaluations is spent"
    # Ten tenths are one, whatever floating-point numbers say.
    exact = Meter(Budget(evaluations=2), Clock())
    for _ in range(10):
        exact.spend(0.1)
    assert exact.allowed() == 1


def test_time_allows_what_fits_by_the_average_so_far() -> None:
    clock = Clock()
    meter = Meter(Budget(seconds=60), clock)
    assert meter.allowed() == 1
    clock.now += 20
    meter.spend(4)
    assert meter.allowed() == 8
    meter.pace = 10.0
    assert meter.allowed() == 4
    clock.now += 45
    assert meter.allowed() == 0
    assert meter.spent() == "the budget of 60 s is spent"


def test_without_a_budget_nothing_is_limited() -> None:
    meter = Meter(NO_BUDGET, Clock())
    meter.spend(10**6)
    assert meter.allowed() is None
