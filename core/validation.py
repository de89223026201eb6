"""Messages of pydantic's validation errors."""

from __future__ import annotations

import pydantic


def first_fault(error: pydantic.ValidationError) -> str:
    """Return the first fault of a validation error as ``field: message``, without the input."""
    fault = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(map(str, fault["loc"]))
    message = fault["msg"].removeprefix("Value error, ")
    return f"{field}: {message}" if field else message
