"""From a task's metric and an answer to a reward."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

from t2.core.errors import ArgumentError, TaskError
from t2.harness.scoring import INVALID, extract_number, parses, tests_passed
from t2.harness.tasks import TaskDocs


class Shaper(Protocol):
    """Partial credit for an answer that may be wrong."""

    def __call__(self, docs: TaskDocs, doc: Any, answer: str) -> float:
        """Credit in [0, 1].

        Args:
            docs: the task.
            doc: one of its documents.
            answer: what the task's filter leaves of the model's answer.

        Raises:
            TaskError: the document has nothing to give credit by.
        """
        ...


def no_credit(docs: TaskDocs, doc: Any, answer: str) -> float:
    """A wrong answer earns nothing."""
    return 0.0


def credit_by_tests(docs: TaskDocs, doc: Any, answer: str) -> float:
    """The share of the document's tests (``test_list``, assert statements) that the answer's program passes."""
    if not _tests(doc):
        raise TaskError(
            f"reward=tests needs documents with a test_list of assert statements, which task {docs.name} has not; use "
            "reward=outcome"
        )
    return tests_passed(doc, answer)


def credit_by_number(docs: TaskDocs, doc: Any, answer: str) -> float:
    """How near the answer's last number a is to the right one g: max(0, 1 − |a − g| / max(|a|, |g|)), 1 where a = g.

    The difference is relative, so the unit does not matter, and symmetric, so that too large is no better than too
    small by the same factor. The right number is that after ``####``, else the last of the right answer's text.
    """
    text = docs.gold_text(doc) or ""
    gold = _number(extract_number(text, strict=True))
    gold = gold if gold is not None else _number(extract_number(text, strict=False))
    if gold is None:
        raise TaskError(
            f"reward=number needs right answers with a number, which a document of task {docs.name} has not; use "
            "reward=outcome or overlap"
        )
    given = _number(extract_number(answer, strict=False))
    if given is None:
        return 0.0
    return 1.0 if given == gold else max(0.0, 1 - abs(given - gold) / max(abs(given), abs(gold)))


def credit_by_overlap(docs: TaskDocs, doc: Any, answer: str) -> float:
    """F1 of the words that the answer shares with the right one (Rajpurkar et al. 2016), case and punctuation aside."""
    gold = docs.gold_text(doc)
    if gold is None:
        raise TaskError(f"reward=overlap needs right answers as texts, which a document of task {docs.name} has not")
    right, given = (Counter(re.findall(r"\w+", text.lower())) for text in (gold, answer))
    shared = (right & given).total()
    return 2 * shared / (right.total() + given.total()) if shared else 0.0


SHAPERS: Mapping[str, Shaper] = {
    "outcome": no_credit,
    "tests": credit_by_tests,
    "number": credit_by_number,
    "overlap": credit_by_overlap,
}
"""The values of ``reward``."""


def shaped(score: float, credit: float, weight: float) -> float:
    """The score of an answer with partial credit: max(s, w·c).

    Args:
        score: s, the task's metric in [0, 1], 1 for a right answer.
        credit: c in [0, 1].
        weight: w < 1, so that no wrong answer is worth as much as a right one.
    """
    return max(score, weight * credit)


def well_formed(docs: TaskDocs, doc: Any, answer: str) -> bool:
    """Whether an answer has the form that the task asks for: its filter finds an answer, or its program is Python."""
    if _tests(doc):
        return parses(answer)
    return answer.strip() not in ("", INVALID)


def check_form(docs: TaskDocs, doc: Any) -> None:
    """Check that a task's answers can lack the form asked for.

    Raises:
        ArgumentError: its filter takes any text.
    """
    if docs.objective.filter == "none" and not _tests(doc):
        raise ArgumentError(
            f"reward_format needs a filter that looks for the answer, and that of task {docs.name} takes any text; "
            "leave reward_format at 0"
        )


def reward_of(score: float, higher_is_better: bool = True, *, right: float = 1.0, wrong: float = -1.0) -> float:
    """The reward of one answer: ``wrong + (right − wrong)·s``, with s the score clipped to [0, 1].

    With the defaults a right answer earns +1, a wrong one −1 (Transformer², arXiv 2501.06252, section 3.1), and a score
    s between them 2s − 1. Where lower is better, s counts as 1 − s. A score that is not a number earns ``wrong``.

    Args:
        score: the task's metric for the answer.
        higher_is_better: direction of the metric.
        right: reward of s = 1.
        wrong: reward of s = 0.
    """
    return wrong + (right - wrong) * unit_score(score, higher_is_better)


def unit_score(score: float, higher_is_better: bool = True) -> float:
    """A score as a number in [0, 1], 1 the best; what is not a number counts as 0."""
    if math.isnan(score):
        return 0.0
    s = min(1.0, max(0.0, score))
    return s if higher_is_better else 1.0 - s


def _tests(doc: Any) -> bool:
    return isinstance(doc, Mapping) and isinstance(doc.get("test_list"), list) and bool(doc["test_list"])


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
