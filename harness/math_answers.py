"""Whether an answer to a mathematics problem is right: math-verify's judgement, from any thread, in bounded time."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

from t2.core.errors import DependencyError

_CHILD = Path(__file__).with_name("math_child.py")
_START_SECONDS = 60.0
# math-verify gives up after 5 s of parsing and 5 s of comparing; this bound is for what its alarm cannot interrupt.
_JUDGE_SECONDS = 20.0
_LAST_CHARACTERS = 2000
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*(\{|[^\s{$])")


def last_boxed(text: str) -> str | None:
    """What the last ``\\boxed{…}`` of a text holds, braces matched; None without a whole one.

    ``\\boxed 7`` holds one character, as in TeX.
    """
    for match in reversed(list(_BOXED.finditer(text))):
        if match[1] != "{":
            return match[1]
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[match.end() :], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return text[match.end() : match.end() + brace.start()].strip()
    return None


def math_equal(answer_text: str, solution_text: str) -> bool:
    """Whether an answer agrees with a worked solution.

    Args:
        answer_text: what a model wrote; its last ``\\boxed{…}`` counts, or its last expression when it has none.
        solution_text: MATH's ``solution``; its last ``\\boxed{…}`` counts, or all of it when it has none.

    Raises:
        DependencyError: math-verify is not installed or does not start.
    """
    gold, boxed = last_boxed(solution_text), last_boxed(answer_text)
    gold = solution_text.strip() if gold is None else gold
    answer = answer_text.strip()[-_LAST_CHARACTERS:] if boxed is None else boxed
    if not answer:
        return False
    return _plain(answer) == _plain(gold) or _JUDGE.ask(gold, answer, boxed is not None)


def _plain(latex: str) -> str:
    """LaTeX without what changes only its looks."""
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf)\s*\{([^{}]*)\}", r"\1", latex)
    text = re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", text)
    text = re.sub(r"\\(?:left|right)(?![a-z])|\\[!,;: ]", "", text)
    return re.sub(r"[\s$]", "", text).removesuffix(".")


class _Judge:
    """The child process that judges: started when first asked, and again after each time limit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, gold: str, answer: str, boxed: bool) -> bool:
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps([gold, answer, boxed]).encode() + b"\n")
                process.stdin.flush()
                line = self._line(process, _JUDGE_SECONDS)
                if line is not None:
                    return line == b"true"
            self._stop()
            return False

    def close(self) -> None:
        """End the child process."""
        with self._lock:
            self._stop()

    def forget(self) -> None:
        """In a forked process: the child belongs to the parent."""
        self._lock = threading.Lock()
        self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        if importlib.util.find_spec("math_verify") is None:
            raise DependencyError("math-verify is not installed: pip install 't2-eval[eval]'")
        path = os.pathsep.join(folder for folder in sys.path if folder)
        process = subprocess.Popen(
            [sys.executable, "-P", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._process = process
        if self._line(process, _START_SECONDS) != b"ready":
            self._stop()
            raise DependencyError(
                f"math-verify does not start: run `{sys.executable} -c 'import math_verify'` to see why"
            )
        return process

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.communicate()
        self._process = None

    @staticmethod
    def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """The next line of the child without its end, or None when time is up or the child has ended."""
        assert process.stdout is not None
        handle = process.stdout.fileno()
        deadline, line = time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([handle], [], [], remaining)[0]:
                return None
            chunk = os.read(handle, 4096)
            if not chunk:
                return None
            line += chunk
        return line.strip()


_JUDGE = _Judge()
atexit.register(_JUDGE.close)
os.register_at_fork(after_in_child=_JUDGE.forget)
