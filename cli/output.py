"""Tables for people, JSON for programs."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any


def print_json(value: Any) -> None:
    """Print a value as indented JSON.

    Raises:
        ValueError: the value holds NaN or an infinity.
    """
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]], *, none: str = "") -> None:
    """Print rows as left-aligned columns under a header; nothing is cut, so that the output can be searched.

    Args:
        none: what is printed instead where there are no rows.
    """
    if not rows and none:
        print(none)
        return
    cells = [[printable(str(cell)) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_fields(fields: Sequence[tuple[str, object]]) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in fields)
    for name, value in fields:
        print(f"{name.ljust(width)}  {printable(str(value))}".rstrip())


def print_error(message: str) -> None:
    """Print one line to standard error, as the program does when it ends in an error."""
    with contextlib.suppress(OSError):  # standard error may be closed; the exit status still reports the error
        print(f"t2: error: {printable(message)}", file=sys.stderr)


def printable(text: str) -> str:
    """A text with its control characters escaped: descriptions are other people's, and terminals obey some of them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
