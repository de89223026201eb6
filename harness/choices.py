"""Likelihood forms of GSM8K and MBPP for models too weak to earn reward by generating answers.

Each document becomes a choice among four continuations, of which one is right; wrong ones are made from the right one
by rules, chosen by the document's content hash, so that the same documents result everywhere.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from t2.core.digests import doc_hash
from t2.core.seeds import generator

CHOICES = 4
MAX_CODE = 400
"""Characters of a program; longer ones make a training step slow and are left out."""

_STEP = re.compile(r"<<([^<>=]+)=(-?[\d.,]+)>>")


def gsm8k_steps(row: Mapping[str, str]) -> dict[str, Any] | None:
    """One calculation of a GSM8K solution as a choice among four results.

    Args:
        row: ``question`` and ``answer``, the latter with ``<<48/2=24>>`` annotations.

    Returns:
        ``question``, ``prefix`` (the solution up to and with the equals sign), ``choices`` (results as text) and
        ``label`` (index of the right one); None when no calculation of the solution is written out.
    """
    answer = row["answer"]
    steps = []
    for match in _STEP.finditer(answer):
        before = _STEP.sub("", answer[: match.start()]).rstrip()
        unit = "$" if before.endswith("$") else ""
        before = before.removesuffix("$").rstrip()
        right = _number(match[2])
        wrong = [] if right is None else [w for w in _wrong_results(match[1], right) if w != right]
        if before.endswith("=") and right is not None and len(set(wrong)) >= CHOICES - 1:
            steps.append((before, unit, right, list(dict.fromkeys(wrong))))
    if not steps:
        return None
    rng = generator(0, "gsm8k_steps", doc_hash(dict(row)))
    before, unit, right, wrong = steps[int(rng.integers(len(steps)))]
    values = [right, *(wrong[int(i)] for i in rng.permutation(len(wrong))[: CHOICES - 1])]
    order = rng.permutation(CHOICES)
    return {
        "question": row["question"],
        "prefix": before,
        "choices": [unit + _text(values[int(i)]) for i in order],
        "label": int(np.flatnonzero(order == 0)[0]),
    }


def mbpp_programs(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """An MBPP problem as a choice among its program and three that differ from it in one place.

    The wrong ones are not run: now and then one of them may pass the tests as well.

    Args:
        row: ``text``, ``code`` and ``test_list``.

    Returns:
        ``text``, ``test``, ``choices`` (programs in the same layout) and ``label``; None when the program is too long,
        does not parse, or offers fewer than three places to change.
    """
    try:
        with warnings.catch_warnings():
            # What Python thinks of a program's escape sequences is no business of the user's.
            warnings.simplefilter("ignore")
            tree = ast.parse(row["code"].replace("\r", ""))
    except SyntaxError:
        return None
    right = ast.unparse(tree)
    wrong = sorted(set(_mutants(tree)) - {right})
    if len(right) > MAX_CODE or len(wrong) < CHOICES - 1:
        return None
    rng = generator(0, "mbpp_programs", doc_hash(dict(row)))
    programs = [right, *(wrong[int(i)] for i in rng.permutation(len(wrong))[: CHOICES - 1])]
    order = rng.permutation(CHOICES)
    return {
        "text": row["text"],
        "test": row["test_list"][0],
        "choices": [programs[int(i)] for i in order],
        "label": int(np.flatnonzero(order == 0)[0]),
    }


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _text(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.2f}".rstrip("0").rstrip(".")


def _wrong_results(expression: str, right: float) -> list[float]:
    """What the calculation gives with another operation, and near misses, which ask for more skill."""
    wrong = []
    match = re.fullmatch(r"\s*([\d.]+)\s*[-+*/]\s*([\d.]+)\s*", expression)
    if match:
        a, b = float(match[1]), float(match[2])
        wrong = [a + b, a - b, a * b, *([a / b] if b else [])]
    wrong += [right + shift for shift in (-10, -5, -2, -1, 1, 2, 5, 10)]
    digits = _text(right)
    if digits.isdigit() and len(digits) > 1:
        wrong.append(float(digits[:-2] + digits[-1] + digits[-2]))
    rounded = [round(value, 2) for value in wrong]
    return [value for value in rounded if value > 0 and _text(value) != _text(right)]


_BINARY: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}
_COMPARE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.Gt,
    ast.Gt: ast.Lt,
    ast.LtE: ast.GtE,
    ast.GtE: ast.LtE,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


def _mutants(tree: ast.Module) -> Iterator[str]:
    """The program with one place changed, for every place and rule; the tree is as before after each."""
    for node in ast.walk(tree):
        match node:
            case ast.BinOp(op=op) if type(op) in _BINARY:
                node.op = _BINARY[type(op)]()
                yield ast.unparse(tree)
                node.op = op
            case ast.Compare(ops=[op, *rest]) if type(op) in _COMPARE:
                node.ops = [_COMPARE[type(op)](), *rest]
                yield ast.unparse(tree)
                node.ops = [op, *rest]
            case ast.BoolOp(op=junction):
                node.op = ast.Or() if isinstance(junction, ast.And) else ast.And()
                yield ast.unparse(tree)
                node.op = junction
            case ast.Constant(value=bool(truth)):
                node.value = not truth
                yield ast.unparse(tree)
                node.value = truth
            case ast.Constant(value=int(number)):
                for near in (number + 1, number - 1):
                    if near >= 0:
                        node.value = near
                        yield ast.unparse(tree)
                node.value = number
            case ast.Call(args=[first, second, *others]):
                node.args = [second, first, *others]
                yield ast.unparse(tree)
                node.args = [first, second, *others]
