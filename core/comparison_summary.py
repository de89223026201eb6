"""A comparison for programs and for people."""

from __future__ import annotations

import math
from typing import Any

from t2.core.comparison import ComparedTask, Comparison
from t2.core.verdicts import Verdict

_MEANING = {
    Verdict.REGRESSED: "the candidate is worse",
    Verdict.IMPROVED: "the candidate is better",
    Verdict.NO_CHANGE: "a drop of more than the margin is excluded",
    Verdict.UNDERPOWERED: "these documents cannot exclude a drop of more than the margin",
}


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Plain JSON; ``smallest_drop`` is null where no drop would have been found."""
    return {
        "verdict": comparison.verdict.value,
        "reason": reason(comparison),
        "margin": comparison.margin,
        "level": comparison.level,
        "power": comparison.power,
        "tasks": [
            {
                "task": task.task,
                "verdict": task.said.verdict.value,
                "metric": task.metric,
                "filter": task.filter,
                "higher_is_better": task.higher_is_better,
                "n": task.said.difference.n,
                "baseline": task.baseline,
                "candidate": task.candidate,
                "difference": task.said.difference.difference,
                "interval": [task.said.difference.interval.low, task.said.difference.interval.high],
                "test": task.said.difference.test,
                "p": task.said.difference.p,
                "p_holm": task.said.p,
                "wins": task.said.difference.wins,
                "losses": task.said.difference.losses,
                "noise": task.said.noise,
                "smallest_drop": task.said.smallest_drop if math.isfinite(task.said.smallest_drop) else None,
            }
            for task in comparison.tasks
        ],
        "unpaired": list(comparison.unpaired),
    }


def reason(comparison: Comparison) -> str:
    """What the verdict means."""
    return _MEANING[comparison.verdict]


def sentence(comparison: Comparison) -> str:
    """The verdict in a line."""
    return f"{comparison.verdict}: {reason(comparison)}"


HEADER = (
    "task",
    "verdict",
    "metric",
    "documents",
    "baseline",
    "candidate",
    "difference",
    "interval",
    "p",
    "won, lost",
    "smallest drop",
)


def row(task: ComparedTask) -> tuple[str, ...]:
    """The cells of a task, as :data:`HEADER` names them."""
    said, difference = task.said, task.said.difference
    metric = task.metric if task.filter == "none" else f"{task.metric}, {task.filter}"
    return (
        task.task,
        said.verdict.value,
        metric,
        str(difference.n),
        f"{task.baseline:.4f}",
        f"{task.candidate:.4f}",
        f"{difference.difference:+.4f}",
        f"{difference.interval.low:+.4f} to {difference.interval.high:+.4f}",
        f"{said.p:.2g}",
        f"{difference.wins}, {difference.losses}",
        f"{said.smallest_drop:.4f}" if math.isfinite(said.smallest_drop) else "none",
    )


def notes(comparison: Comparison) -> list[str]:
    """What the table's figures mean, a line each."""
    line = (
        f"Margin {comparison.margin:g}; intervals at {comparison.level:.0%}; p after Holm over the tasks; the smallest "
        f"drop is found with power {comparison.power:g}; a difference above 0 is better."
    )
    floors = ", ".join(f"{task.task} {task.said.noise:.4f}" for task in comparison.tasks if task.said.noise)
    lines = [line, f"Noise floor: {floors}."] if floors else [line]
    if comparison.unpaired:
        lines.append(f"Left out: {', '.join(comparison.unpaired)}; the baseline's score is not a mean over documents.")
    return lines


def as_markdown(comparison: Comparison, candidate: str, baseline: str) -> str:
    """A section with a table.

    Args:
        candidate, baseline: what they are called.
    """
    rows = [HEADER, ("---",) * len(HEADER), *(row(task) for task in comparison.tasks)]
    table = "\n".join(f"| {' | '.join(_cell(cell) for cell in cells)} |" for cells in rows)
    told = "\n\n".join(notes(comparison))
    return (
        f"## {sentence(comparison)}\n\nCandidate {_code(candidate)}, baseline {_code(baseline)}.\n\n{table}\n\n{told}\n"
    )


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _code(text: str) -> str:
    return f"`{text.replace('`', ' ').replace(chr(10), ' ')}`"
