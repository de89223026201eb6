"""What a search may spend: so many evaluations, or so many seconds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from t2.core.errors import ArgumentError

LEAST = 2
"""Evaluations at least: the base and one mixture."""
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Budget:
    """A limit of either kind, or of neither.

    Attributes:
        evaluations: mixtures answered on all adaptation docs; one answered on half of them counts half.
        seconds: of wall clock.
    """

    evaluations: float | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``200`` (evaluations), ``60s``, ``5m`` or ``1h``.

        Raises:
            ArgumentError: it is neither, not above zero, or too small to compare anything.
        """
        found = re.fullmatch(r"(\d+(?:\.\d+)?(?:[eE]\+?\d+)?)([smh]?)", text.strip())
        number = float(found[1]) if found else math.nan
        if found is None or not math.isfinite(number):
            raise ArgumentError(
                f"budget={text[:60]} must be a number of evaluations, such as 200, or a time, such as 60s or 5m"
            )
        if found[2]:
            if number <= 0:
                raise ArgumentError(f"budget={text} must be more than no time")
            return cls(seconds=number * _UNITS[found[2]])
        if number != int(number) or number < LEAST:
            raise ArgumentError(
                f"budget={text} must be a whole number of evaluations, at least {LEAST}: the base and one mixture; "
                "a time has a unit, such as 60s"
            )
        return cls(evaluations=number)

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"{self.seconds:g}s"
        return "none" if self.evaluations is None else f"{self.evaluations:g}"

    def __bool__(self) -> bool:
        return self.evaluations is not None or self.seconds is not None

    def describe(self) -> str:
        """As said in a sentence: ``60 s``, ``200 evaluations``."""
        return f"{self.seconds:g} s" if self.seconds is not None else f"{self.evaluations or 0:g} evaluations"


NO_BUDGET = Budget()


class Meter:
    """Counts what is spent of a budget, from the moment it is made.

    Args:
        budget: the limit.
        clock: seconds of wall clock.

    Attributes:
        evaluations: spent so far, see :class:`Budget`.
        pace: seconds that an evaluation is taken to need at least.
    """

    def __init__(self, budget: Budget, clock: Callable[[], float]) -> None:
        self.budget = budget
        self.evaluations = 0.0
        self.pace = 0.0
        self._clock = clock
        self._start = clock()

    @property
    def seconds(self) -> float:
        """Spent so far."""
        return self._clock() - self._start

    def spend(self, evaluations: float) -> None:
        """Count evaluations."""
        self.evaluations += evaluations

    def left(self) -> float | None:
        """Evaluations that the budget still allows, 0 or more; None when it sets no limit.

        Under a time limit an evaluation is taken to need what the ones before it needed on average; before the first
        there is nothing to go by, and one is allowed.
        """
        if self.budget.evaluations is not None:
            return max(0.0, self.budget.evaluations - self.evaluations)
        if self.budget.seconds is not None:
            if not self.evaluations:
                return 1.0
            return max(0.0, self.budget.seconds - self.seconds) / max(1e-9, self.pace, self.seconds / self.evaluations)
        return None

    def allowed(self) -> int | None:
        """Whole evaluations that the budget still allows; None when it sets no limit."""
        left = self.left()
        return None if left is None else math.floor(left + 1e-6)

    def spent(self) -> str:
        """Why a search ends that the budget does not let go on."""
        return f"the budget of {self.budget.describe()} is spent"
