"""Judges mathematical answers with math-verify: one JSON request a line on stdin, ``true`` or ``false`` on stdout.

A process of its own, because math-verify keeps its time limits with ``signal.alarm``, which only a main thread may use,
and because a runaway simplification can then be killed. ``t2.harness.math_answers`` starts it by path and keeps it.
"""

from __future__ import annotations

import json
import logging
import os
import sys

from math_verify import parse, verify


def judge(gold: str, answer: str, boxed: bool) -> bool:
    """Whether the two denote the same value.

    Args:
        gold: LaTeX of the right answer, without delimiters.
        answer: LaTeX likewise when ``boxed``, else a whole text whose last expression counts.
    """
    expected = parse(f"\\boxed{{{gold}}}")
    given = parse(f"\\boxed{{{answer}}}" if boxed else answer)
    return bool(expected) and bool(given) and bool(verify(expected, given))


def main() -> None:
    """Serve until stdin ends."""
    logging.disable(logging.CRITICAL)
    answers = os.fdopen(os.dup(1), "w")
    # What sympy prints must not be taken for an answer.
    os.dup2(2, 1)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        try:
            equal = judge(*json.loads(line))
        # A parser of free text raises what it likes, and none of it makes the answer right.
        except Exception:  # noqa: BLE001
            equal = False
        print(json.dumps(equal), file=answers, flush=True)


if __name__ == "__main__":
    main()
