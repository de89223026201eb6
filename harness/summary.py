"""What was adapted, as a table under lm-eval's own."""

from __future__ import annotations

import atexit
from collections.abc import Mapping, Sequence
from pathlib import Path

from t2.core.record import AdaptationRecord

_SHOWN = 8
"""Coefficients of a mixture that the table shows; with one per layer or matrix there are many."""

_armed = False


def format_summary(records: Sequence[AdaptationRecord], paths: Mapping[str, Path]) -> str:
    """A Markdown table with a line per task; under it versions of a registry that took part, and where records lie.

    Args:
        records: of one run.
        paths: where they lie, by task.
    """
    header = ("Task", "Strategy", "Mixture (α)", "Held-out score", "Pass 1", "Pass 2")
    lines = [header, *(_line(record) for record in records)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def join(line: Sequence[str]) -> str:
        return "|" + "|".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + "|"

    rule = "|" + "|".join("-" * width for width in widths) + "|"
    table = [join(header), rule, *(join(line) for line in lines[1:])]
    notes = [
        f"{r.task}: {r.note}; record: {paths[r.task]}" if r.task in paths else f"{r.task}: {r.note}" for r in records
    ]
    marks = [
        f"{r.task}: OVERLAP: expert {one.expert} was trained on {one.scored} scored docs and {one.adaptation} "
        "adaptation docs; it looks better on them than it is"
        for r in records
        for one in r.overlap
    ]
    # The name in a file says nothing of its version.
    origins = {
        f"{one.name}: {one.reference}" + ("" if one.digest in one.reference else f" (sha256 {one.digest[:12]})"): None
        for r in records
        for one in r.experts
        if one.reference is not None
    }
    return "\n".join(["t2: what was adapted", *table, *origins, *marks, *notes])


def arm(records: Sequence[AdaptationRecord], paths: Mapping[str, Path]) -> None:
    """Print the summary when the program ends, which is after lm-eval has printed its table."""
    global _armed
    if records and not _armed:
        atexit.register(print, format_summary(records, paths))
        _armed = True


def _line(record: AdaptationRecord) -> tuple[str, ...]:
    mixtures = [f"{_alpha(used.alpha)}" for used in record.mixtures]
    if len(mixtures) > 1:
        mixtures = [f"{used.requests}× {text}" for used, text in zip(record.mixtures, mixtures, strict=True)]
    held, calibration = record.held_out, record.calibration
    score = "–" if held is None else f"{_number(held.before)} → {_number(held.after)} ({held.docs} docs)"
    if held is None and calibration is not None and calibration.accuracy is not None:
        score = f"{calibration.accuracy:.0%} of {calibration.docs} prompts named right"
    if record.no_signal:
        score += ", NO SIGNAL"
    chosen = "".join(f": {one.strategy}" for one in record.considered if one.chosen)
    strategy = record.strategy + chosen + ("" if record.control == "none" else f" ({record.control})")
    if record.overlap:
        strategy += ", OVERLAP"
    return (
        record.task,
        strategy,
        "; ".join(mixtures) or "–",
        score,
        f"{record.timing.pass1:.1f} s",
        f"{record.timing.pass2:.1f} s",
    )


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"


def _alpha(alpha: Mapping[str, float]) -> str:
    if not alpha:
        return "base"
    parts = [f"{name} {value:.4g}" for name, value in alpha.items() if value] or ["all 0"]
    more = f" … {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return ", ".join(parts[:_SHOWN]) + more
