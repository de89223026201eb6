"""One line instead of a traceback for a user's error, in programs that t2 does not own (``lm_eval``)."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TextIO

from t2.core.errors import T2Error

BROKEN_PIPE = 141
"""Exit status after the reader of the output is gone, as shells report it: 128 + SIGPIPE."""

_MODEL = ("--model=t2", "-M=t2", "-Mt2")
"""Spellings of lm-eval's ``--model t2``."""


def tell(stop: KeyboardInterrupt) -> bool:
    """Print what t2 says of a Ctrl-C; False where it says nothing."""
    notes = [note for note in getattr(stop, "__notes__", []) if note.startswith("t2: ")]
    if notes:
        print(f"\n{notes[0]}", file=sys.stderr)
    return bool(notes)


def flush_output(stream: TextIO | None, text: str = "") -> int:
    """Flush standard output; return 0, or the exit status if it cannot be written.

    A missing reader gets no message, any other failure one line. After a failure the stream is redirected to the null
    device, because Python flushes it again at exit.

    Args:
        stream: standard output; None if the program has none.
        text: text to write first. An empty line finds out whether an unbuffered stream, which has nothing to flush,
            caused an error.
    """
    if stream is None or stream.closed:
        return 0
    try:
        stream.write(text)
        stream.flush()
        return 0
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # a stream without a file
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            return BROKEN_PIPE
        with contextlib.suppress(OSError):
            print(
                f"t2: error: cannot write standard output: {error.strerror}; free space or write elsewhere",
                file=sys.stderr,
            )
        return 2


def _flush_at_exit() -> None:
    # Python's own flush, which comes later, would print a traceback if it fails.
    if status := flush_output(sys.stdout):
        os._exit(status)


def leave(status: int) -> NoReturn:
    """End the program, as ``sys.exit`` does.

    One that holds vLLM ends without tearing its libraries down: a thread of theirs that a Ctrl-C caught at work would
    abort it there, with another status.
    """
    if "vllm" in sys.modules:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def install(*, whole_program: bool = False) -> None:
    """Print an uncaught :class:`T2Error` as ``t2: error: …``, and what t2 says of a Ctrl-C that came while it worked.

    Every other exception goes where it went before.

    Args:
        whole_program: the program only runs a t2 model, so any Ctrl-C ends it without a traceback, and output that
            cannot be written ends it with one line.
    """
    if whole_program:
        atexit.register(_flush_at_exit)
    previous = sys.excepthook
    if getattr(previous, "_t2", False):
        previous._t2_whole |= whole_program  # type: ignore[attr-defined]
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        whole = hook._t2_whole  # type: ignore[attr-defined]
        if isinstance(error, T2Error):
            print(f"t2: error: {error}", file=sys.stderr)
            # An interpreter that meets SystemExit in its hook ends with that status instead of 1.
            raise SystemExit(2)
        if isinstance(error, KeyboardInterrupt) and (tell(error) or whole):
            leave(130)
        if isinstance(error, OSError) and whole and (status := flush_output(sys.stdout, "\n")):
            raise SystemExit(status)
        previous(kind, error, traceback)

    hook._t2 = True  # type: ignore[attr-defined]
    hook._t2_whole = whole_program  # type: ignore[attr-defined]
    sys.excepthook = hook


def runs_t2(arguments: Sequence[str]) -> bool:
    """Whether a command line, program name included, is lm-eval's with ``--model t2``."""
    program, *rest = arguments or [""]
    # Python sets "-m" while it looks for the module to run, before the name of its file.
    if Path(program).name not in ("lm_eval", "lm-eval", "-m"):
        return False
    pairs = zip(rest, [*rest[1:], ""], strict=True)
    return any(f"{first}={second}" in _MODEL or first in _MODEL for first, second in pairs)
