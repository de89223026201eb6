"""Scorers of generated answers: programs by their tests, numbers and letters by extraction, mathematics by value."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from t2.core.errors import TaskError
from t2.harness.math_answers import last_boxed, math_equal
from t2.harness.sandbox import SandboxResult, run_python

__all__ = [
    "INVALID",
    "extract_code",
    "extract_letter",
    "extract_number",
    "last_boxed",
    "math_equal",
    "parses",
    "pass_at_1",
    "program",
    "tests_passed",
]

CodeKind = Literal["humaneval", "mbpp"]
INVALID = "[invalid]"

# Processor time decides, so that a busy machine gives the same scores; MBPP's slowest right program takes four seconds.
_CPU_SECONDS = 10
_WALL_SECONDS = 40.0
_STARTS = 3
"""Attempts to start the sandbox, which on a busy machine may take too long once."""

_FENCE = re.compile(r"```[ \t]*[\w+-]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
_MARKED_NUMBER = re.compile(r"####\s*(-?\$?[\d,]*\.?\d+)")
_STATED_LETTER = re.compile(r"(?i:answer|option|choice)(?:\s+is)?\s*:?\s*[\"'(*$\\]*(?:boxed\{|text\{)*([A-J])\b(?!')")
_LEADING_LETTER = re.compile(r"\s*[\"'(*\[]*([A-J])(?:[.):,;\"'*\]]|\s*$|\s*\n)")
_LONE_LETTER = re.compile(r"(?<![\w'])(?:\(([A-J])\)|([B-HJ]))(?![\w'])")


def pass_at_1(doc: Mapping[str, Any], completion: str, kind: CodeKind) -> float:
    """1.0 when the completion's program passes the document's tests in the sandbox, else 0.0.

    Args:
        doc: a HumanEval or MBPP document.
        completion: what a model wrote: a continuation of the prompt, a fenced block, or whole functions.
        kind: which of the two data sets.

    Raises:
        TaskError: the sandbox does not start on this machine; no program is to blame for that.
    """
    source = program(doc, completion, kind)
    if source is None:
        return 0.0
    return float(_run(source).passed)


def tests_passed(doc: Mapping[str, Any], completion: str) -> float:
    """The share of an MBPP-like document's tests that the completion's program passes, each run by itself.

    Args:
        doc: has ``test_list``, assert statements, and may have ``test_setup_code``.
        completion: what a model wrote.

    Raises:
        TaskError: the sandbox does not start on this machine.
    """
    code = _definitions(extract_code(completion))
    if code is None:
        return 0.0
    passed = 0
    for test in doc["test_list"]:
        result = _run("\n".join([code, str(doc.get("test_setup_code") or ""), test, ""]))
        passed += result.passed
        if result.outcome == "timeout":
            # The others would most likely take as long.
            break
    return passed / len(doc["test_list"])


def parses(completion: str) -> bool:
    """Whether a completion holds a program."""
    return _definitions(extract_code(completion)) is not None


def _run(source: str) -> SandboxResult:
    for _ in range(_STARTS):
        result = run_python(source, timeout=_WALL_SECONDS, cpu_seconds=_CPU_SECONDS)
        if result.outcome != "error":
            return result
    raise TaskError(f"programs cannot be scored on this machine: {result.detail}; allow child processes of 512 MB")


def program(doc: Mapping[str, Any], completion: str, kind: CodeKind) -> str | None:
    """The whole program that decides: the code of the completion, then the document's tests; None without any code."""
    if kind == "humaneval":
        code = _complete_function(str(doc["prompt"]), str(doc["entry_point"]), completion)
        return None if code is None else f"{code}\n\n{doc['test']}\n\ncheck({doc['entry_point']})\n"
    code = _definitions(extract_code(completion))
    # The set-up follows the code, since it builds objects of the code's classes.
    return None if code is None else "\n".join([code, str(doc["test_setup_code"]), *doc["test_list"], ""])


def extract_code(completion: str) -> str:
    """The code in an answer: what stands before the first fence if that is code, else the first block that defines.

    A prompt may itself have opened the block; then the answer begins with code and its first fence is the closing one.
    """
    text = completion.replace("\r\n", "\n")
    head = text.split("```", 1)[0]
    if re.search(r"^(?:def|class|import|from|@|\w+\s*=)", head, re.MULTILINE) or "```" not in text:
        return head
    blocks = [match[1] for match in _FENCE.finditer(text)]
    return next((block for block in blocks if re.search(r"^\s*(?:def|class) ", block, re.MULTILINE)), "\n".join(blocks))


def extract_number(text: str, *, strict: bool) -> str:
    """The final number of a worked answer without ``$``, thousands separators and trailing zeros, or ``[invalid]``.

    Args:
        text: the answer.
        strict: only a number after ``####`` counts; otherwise the last number of the text.
    """
    found = _MARKED_NUMBER.findall(text) if strict else _NUMBER.findall(text)
    if not found:
        return INVALID
    number = re.sub(r"[$,]", "", found[0] if strict else found[-1])
    return re.sub(r"\.?0+$", "", number) if "." in number else number


def extract_letter(text: str) -> str:
    """The option that an answer names, ``A`` to ``J``, or ``[invalid]``.

    "The answer is B", "B", "B. iron" and "(B)" name B; "A student would …" names nothing, since its A is a word.
    """
    for pattern in (_STATED_LETTER, _LEADING_LETTER, _LONE_LETTER):
        match = pattern.search(text) if pattern is not _LEADING_LETTER else pattern.match(text)
        if match:
            return next(group for group in match.groups() if group).upper()
    return INVALID


def _complete_function(prompt: str, entry_point: str, completion: str) -> str | None:
    text = completion.replace("\r\n", "\n")
    head = text.split("```", 1)[0]
    continues = bool(head.strip("\n")) and head.lstrip("\n")[0] in " \t"
    code = head if continues else extract_code(text)
    if re.search(rf"^(?:async )?def {re.escape(entry_point)}\b", code, re.MULTILINE):
        # Whole functions: the prompt gives its imports and helpers, the definitions that follow replace its stub.
        return _definitions(f"{prompt}    pass\n\n{code}")
    if not code.strip():
        return None
    body = code.strip("\n") if continues else textwrap.indent(textwrap.dedent(code).strip("\n"), "    ")
    return _definitions(f"{prompt}{body}", at_least=prompt)


def _definitions(code: str, at_least: str = "") -> str | None:
    """The longest run of whole lines that is Python, less statements that only try it out; None when there is none.

    A generation may be cut in the middle of a line or run on into prose.
    """
    lines = code.split("\n")
    for count in (
        range(len(lines), len(at_least.rstrip("\n").split("\n")), -1) if at_least else range(len(lines), 0, -1)
    ):
        try:
            with warnings.catch_warnings():
                # The escapes that a model writes in its strings are no concern of the user's.
                warnings.simplefilter("ignore")
                tree = ast.parse("\n".join(lines[:count]))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for statement in tree.body:
            if _only_tries(statement):
                for number in range(statement.lineno - 1, statement.end_lineno or statement.lineno):
                    lines[number] = ""
        return "\n".join(lines[:count]) if any(line.strip() for line in lines[:count]) else None
    return None


def _only_tries(statement: ast.stmt) -> bool:
    match statement:
        case ast.Assert():
            return True
        case ast.If(test=ast.Compare(left=ast.Name(id="__name__"))):
            return True
        case ast.Expr(value=ast.Call(func=ast.Name(id="print" | "input" | "check" | "main"))):
            return True
        case _:
            return False
