"""Trying again: how often, how long, and when it is of use.

Waits have full jitter: a random part of a bound that doubles, so that many clients that were refused together do not
come back together. See Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

STATUSES = frozenset({429, 502, 503, 504})
"""Answers after which the same request may succeed."""


@dataclass(frozen=True)
class RetryPolicy:
    """How a client tries again.

    Attributes:
        attempts: in all, the first among them.
        base: seconds, the bound of the first wait; each next one is twice as long.
        cap: seconds, the largest bound.
        total: seconds from the first attempt after which none begins and none goes on.
        sleep, clock, uniform: of the tests; ``uniform`` gives numbers in [0, 1).
    """

    attempts: int = 5
    base: float = 0.25
    cap: float = 8.0
    total: float = 300.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    uniform: Callable[[], float] = field(default_factory=lambda: random.Random().random)  # processes must differ

    def wait(self, attempt: int, at_least: float | None = None) -> float:
        """Seconds to wait after the attempt with this number, from 1.

        Args:
            at_least: what the server asked for; the jitter comes on top of it.
        """
        bound = min(self.cap, self.base * 2.0 ** min(attempt - 1, 60))
        return (at_least or 0.0) + bound * self.uniform()


def retry_after(value: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for; None where it is absent or unreadable.

    RFC 9110, section 10.2.3: a number of seconds, or a date.
    """
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value) if len(value) <= 9 else math.inf
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    date = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())
