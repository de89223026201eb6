"""The type of times in external data."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime


def _check_calendar(value: datetime) -> datetime:
    try:
        value.astimezone(UTC)
    except OverflowError:
        raise ValueError("the time is outside the years 1 to 9999 in UTC; give a time within them") from None
    return value


Time = Annotated[AwareDatetime, AfterValidator(_check_calendar)]
"""A time with an offset from UTC that can be converted to UTC."""
