"""A report's tables as rows of text, for the terminal, Markdown and HTML alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from t2.core.record import ExpertRef
from t2.harness.compare.methods import BASE
from t2.harness.compare.report import ALPHA, Difference, Report, Row, TaskReport


@dataclass(frozen=True)
class Table:
    """A table with a line under it, which may be empty."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def scores(task: TaskReport) -> Table:
    """Scores, relative scores and what differs from the base."""
    rows = []
    for row in task.rows:
        to = row.to_base
        rows.append(
            (
                row.label,
                _seeds(row),
                _estimate(task, row),
                "–" if row.relative is None else f"{row.relative:.3f}",
                _difference(task, to),
                "–" if to is None else p_value(to.p),
                "–" if to is None else p_value(to.p_holm),
                _found(task, to),
                _marks(row),
            )
        )
    header = ("method", "seeds", f"{task.metric}{unit(task)} [95%]", "relative", "less base [95%]", "p", "Holm")
    return Table(
        "Scores",
        (*header, "found", "marks"),
        tuple(rows),
        "relative: the score over the base's. less base: paired by document, above 0 is better; p of no difference, "
        f"{_tests(task)}; Holm: adjusted for the tasks of this comparison. found: better or worse at {ALPHA:.0%}, else "
        "the smallest difference that would have been found with a power of 80%.",
    )


def controls(task: TaskReport) -> Table | None:
    """What differs from the controls, where there are any."""
    rows = [
        (
            row.method,
            control,
            _difference(task, one),
            f"{one.wins} : {one.losses}",
            p_value(one.p),
            p_value(one.p_holm),
            _found(task, one),
        )
        for row in task.rows
        for control, one in row.to_controls.items()
    ]
    if not rows:
        return None
    return Table(
        "Against the controls",
        ("method", "control", "less control [95%]", "wins : losses", "p", "Holm", "found"),
        tuple(rows),
        "A gain over the base that the control has too does not come from what was learned about single components.",
    )


def choices(task: TaskReport) -> Table | None:
    """What was chosen by its held-out score, where anything was."""
    rows = [
        (
            row.label,
            str(one.seed),
            one.taken,
            ", ".join(f"{label} {_held_out(score)}" for label, score in one.held_out.items()),
        )
        for row in task.rows
        for one in row.choices
    ]
    if not rows:
        return None
    return Table(
        "Chosen on held-out documents",
        ("method", "seed", "chosen", "scores on the adaptation documents"),
        tuple(rows),
        "The configuration with the best score on the adaptation documents, the first named of equals; no score of the "
        "result has a part in it.",
    )


def costs(task: TaskReport) -> Table:
    """What each row costs."""
    rows = tuple(
        (
            row.label,
            f"{row.numbers:,}",
            size(row.bytes),
            str(row.coefficients or "–"),
            f"{row.pass1:.1f}",
            f"{row.pass2:.1f}",
            f"{row.reused:.0%}",
        )
        for row in task.rows
    )
    return Table(
        "Cost",
        ("method", "numbers", "bytes", "α", "pass 1, s", "pass 2, s", "shared"),
        rows,
        "numbers, bytes: of the experts, or the adapter, in float32. α: coefficients that were searched. Seconds are a "
        "mean over seeds; a row that chooses has pass 1 of all that it chooses from. shared: requests that a cell of "
        "the same mixture answered before, in the seconds given here.",
    )


def runs(task: TaskReport) -> Table:
    """How to get each cell again."""
    rows = tuple(
        (row.label if seed is None else f"{row.label}, seed {seed}", f"`{command}`", samples[:12], record.digest()[:12])
        for row in task.rows
        if not row.choices
        for seed, command, samples, record in zip(row.seeds, row.commands, row.samples, row.records, strict=True)
    )
    return Table(
        "Runs",
        ("cell", "the same by itself", "samples", "record"),
        rows,
        "samples, record: the first 12 characters of the SHA-256 of the file of samples and of the record. "
        "`t2 rerun` does cells again and compares the digests.",
    )


def experts(report: Report) -> Table:
    """The experts and adapters that took part, and what of those of another base could be taken over."""
    rows = tuple(
        (one.name, one.domain or "–", *_taken_over(one, report.base), one.reference or "–", one.digest)
        for one in report.experts
    )
    return Table("Experts", ("expert", "domain", "base", "taken over", "reference", "SHA-256"), rows)


def notes(task: TaskReport) -> list[str]:
    """What must not be missed: searches without a signal, and experts that were trained on these documents."""
    found = []
    for row in task.rows:
        if row.no_signal:
            which = "" if len(row.seeds) == 1 else f" under {row.no_signal} of {len(row.seeds)} seeds"
            found.append(f"NO SIGNAL: {row.label}{which}: nothing told mixtures apart, so the base answered.")
        overlaps = {one.expert: one for record in row.records for one in record.overlap}
        found += [
            f"OVERLAP: {row.label}: {one.expert} was trained on {one.scored} scored and {one.adaptation} "
            "adaptation documents; it looks better than it is."
            for one in overlaps.values()
        ]
    return list(dict.fromkeys(found))


def is_share(task: TaskReport) -> bool:
    """Whether scores are shares, which are written in percent."""
    values = [row.score.value for row in task.rows if row.score.value is not None]
    return task.higher_is_better and all(0 <= value <= 1 for value in values)


def unit(task: TaskReport) -> str:
    """What scores are written in."""
    return ", %" if is_share(task) else ""


def value_text(task: TaskReport, value: float, *, sign: bool = False) -> str:
    """A score or a difference."""
    plus = "+" if sign else ""
    return f"{100 * value:{plus}.1f}" if is_share(task) else f"{value:{plus}.4g}"


def p_value(p: float) -> str:
    """A p-value."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}" if p >= 1e-9 else "<1e-9"


def size(count: int) -> str:
    """Bytes for people."""
    if not count:
        return "0"
    return f"{count / 1000:.0f} kB" if count < 1_000_000 else f"{count / 1_000_000:.1f} MB"


def _estimate(task: TaskReport, row: Row) -> str:
    if row.score.value is None:
        return "undefined"
    text = value_text(task, row.score.value)
    if row.score.low is None or row.score.high is None:
        return text
    return f"{text} [{value_text(task, row.score.low)}, {value_text(task, row.score.high)}]"


def _difference(task: TaskReport, one: Difference | None) -> str:
    if one is None:
        return "–"
    low, high = (value_text(task, edge, sign=True) for edge in (one.low, one.high))
    return f"{value_text(task, one.value, sign=True)} [{low}, {high}]"


def _found(task: TaskReport, one: Difference | None) -> str:
    if one is None:
        return ""
    if one.verdict:
        return one.verdict
    return "none" if one.could_see is None else f"none of {value_text(task, one.could_see)} or more"


def _marks(row: Row) -> str:
    marks = ["NO SIGNAL" if row.no_signal == len(row.seeds) else f"NO SIGNAL {row.no_signal}/{len(row.seeds)}"]
    marks = marks if row.no_signal else []
    return ", ".join([*marks, *(["OVERLAP"] if any(record.overlap for record in row.records) else [])])


def _taken_over(one: ExpertRef, base: str) -> tuple[str, str]:
    """The base model of an expert, and of another base's how many matrices it moves here and which it does not."""
    if one.transferred is None:
        return base, "–"
    without = f", without {', '.join(one.transferred.left_out)}" if one.transferred.left_out else ""
    origin = one.transferred.base
    return f"{origin.id} ({origin.fingerprint[:12]})", f"{one.transferred.matrices} matrices{without}"


def _held_out(score: float | None) -> str:
    return "undefined" if score is None else f"{score:.4g}"


def _seeds(row: Row) -> str:
    return ",".join(str(seed) for seed in row.seeds if seed is not None) or "–"


def _tests(task: TaskReport) -> str:
    names: Sequence[str] = sorted({row.to_base.test for row in task.rows if row.to_base is not None})
    told = {"mcnemar": "exact McNemar", "bootstrap": "paired bootstrap", "signs": "all signs of what differs"}
    return " or ".join(told[name] for name in names) or f"none was made, {BASE} is alone"
