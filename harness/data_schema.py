"""The form of each benchmark's documents: what a row of any source becomes before a task sees it.

A row means the same whichever source it came from: fields that only one source has are dropped, ARC's choices are
labelled A, B, C, … (some Hub rows say 1, 2, 3, …), and MATH-500 rows get the field names of MATH.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from t2.core.digests import doc_hash

Row = dict[str, Any]
LETTERS = "ABCDEFGHIJ"


class RowError(ValueError):
    """A row lacks a field or holds a value of another type; the text says which."""


def arc_row(row: Mapping[str, Any]) -> Row:
    """``id``, ``question``, ``choices`` {``text``, ``label``} labelled from A, the right letter as ``answerKey``."""
    choices = row.get("choices")
    if not isinstance(choices, Mapping):
        raise RowError("field 'choices' is absent or not an object")
    texts, labels = _strings(choices, "text"), _strings(choices, "label")
    answer = _string(row, "answerKey")
    if len(texts) != len(labels) or not 2 <= len(texts) <= len(LETTERS):
        raise RowError(f"{len(texts)} choice texts and {len(labels)} labels")
    if answer not in labels:
        raise RowError(f"answerKey {answer!r} is not among the labels {labels}")
    return {
        "id": _string(row, "id"),
        "question": _string(row, "question"),
        "choices": {"text": texts, "label": list(LETTERS[: len(texts)])},
        "answerKey": LETTERS[labels.index(answer)],
    }


def gsm8k_row(row: Mapping[str, Any]) -> Row:
    """``question`` and ``answer``; the answer ends in ``#### number``."""
    answer = _string(row, "answer")
    if "####" not in answer:
        raise RowError("field 'answer' has no '####' before its final number")
    return {"question": _string(row, "question"), "answer": answer}


def math_row(row: Mapping[str, Any]) -> Row:
    """``problem``, ``level``, ``type``, ``solution``; the solution holds its answer in ``\\boxed{}``."""
    return {name: _string(row, name) for name in ("problem", "level", "type", "solution")}


def math500_row(row: Mapping[str, Any]) -> Row:
    """The fields of MATH; the Hub's ``subject`` is ``type``, its numeric level 2 is ``Level 2``.

    The Hub's ``answer`` is left out: it repeats what the solution boxes, and no other source has it in that form.
    """
    level = row.get("level")
    return {
        "problem": _string(row, "problem"),
        "level": f"Level {level}" if isinstance(level, int) else _string(row, "level"),
        "type": _string(row, "subject" if "subject" in row else "type"),
        "solution": _string(row, "solution"),
    }


def mbpp_row(row: Mapping[str, Any]) -> Row:
    """``task_id`` (1 to 974), ``text``, ``code``, ``test_setup_code`` and two lists of assert statements."""
    number = row.get("task_id")
    if not isinstance(number, int):
        raise RowError("field 'task_id' is absent or not a number")
    return {
        "task_id": number,
        "text": _string(row, "text"),
        "code": _string(row, "code"),
        "test_setup_code": _string(row, "test_setup_code"),
        "test_list": _strings(row, "test_list"),
        "challenge_test_list": _strings(row, "challenge_test_list"),
    }


def humaneval_row(row: Mapping[str, Any]) -> Row:
    """``task_id`` (``HumanEval/0`` …), ``prompt``, ``canonical_solution``, ``test``, ``entry_point``."""
    return {name: _string(row, name) for name in ("task_id", "prompt", "canonical_solution", "test", "entry_point")}


def hellaswag_row(row: Mapping[str, Any]) -> Row:
    """``text`` (activity and context), ``endings`` and ``label``; the Hub's WikiHow marks in brackets are left out."""
    if "text" in row:
        text, endings = _string(row, "text"), _strings(row, "endings")
    else:
        context = f"{_string(row, 'ctx_a')} {_string(row, 'ctx_b').capitalize()}"
        text = _without_marks(f"{_string(row, 'activity_label')}: {context}")
        endings = [_without_marks(ending) for ending in _strings(row, "endings")]
    label = str(row.get("label"))
    if not label.isdigit() or int(label) >= len(endings):
        raise RowError(f"label {label!r} is none of the {len(endings)} endings")
    return {"text": text, "endings": endings, "label": int(label)}


def boolq_row(row: Mapping[str, Any]) -> Row:
    """``passage``, ``question`` (without a question mark) and ``answer``, true or false."""
    if not isinstance(row.get("answer"), bool):
        raise RowError("field 'answer' is absent or not true or false")
    return {"passage": _string(row, "passage"), "question": _string(row, "question"), "answer": row["answer"]}


def winogrande_row(row: Mapping[str, Any]) -> Row:
    """``sentence`` with a gap ``_``, ``option1``, ``option2`` and ``answer``, 1 or 2 as text."""
    return {name: _string(row, name) for name in ("sentence", "option1", "option2", "answer")}


def in_order(dataset: str, rows: Sequence[Row]) -> list[Row]:
    """The one order of a data set, whichever source it came from.

    MBPP and HumanEval go by their number. MATH comes in seven subjects that sources string together differently: it
    goes by content hash, so that ``--limit`` takes from every subject. The others have one order in every source.
    """
    if dataset == "math":
        return sorted(rows, key=doc_hash)
    if dataset == "mbpp":
        return sorted(rows, key=lambda row: int(row["task_id"]))
    if dataset == "humaneval":
        return sorted(rows, key=lambda row: int(str(row["task_id"]).rpartition("/")[2]))
    return list(rows)


ROWS: dict[str, Callable[[Mapping[str, Any]], Row]] = {
    "arc_easy": arc_row,
    "arc_challenge": arc_row,
    "gsm8k": gsm8k_row,
    "math": math_row,
    "math500": math500_row,
    "mbpp": mbpp_row,
    "humaneval": humaneval_row,
    "hellaswag": hellaswag_row,
    "boolq": boolq_row,
    "winogrande": winogrande_row,
}


def _without_marks(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _string(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise RowError(f"field {name!r} is absent or not text")
    return value


def _strings(row: Mapping[str, Any], name: str) -> list[str]:
    value = row.get(name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise RowError(f"field {name!r} is absent or not a list of texts")
    return list(value)
