"""One line instead of a traceback for a user's error, in programs that t2 does not own (``lm_eval``)."""

from __future__ import annotations

import atexit
import os
import sys
from types import TracebackType
from typing import NoReturn

from t2.core.errors import T2Error


def tell(stop: KeyboardInterrupt) -> bool:
    """Print what t2 says of a Ctrl-C; False where it says nothing."""
    notes = [note for note in getattr(stop, "__notes__", []) if note.startswith("t2: ")]
    if notes:
        print(f"\n{notes[0]}", file=sys.stderr)
    return bool(notes)


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


def install() -> None:
    """Print an uncaught :class:`T2Error` as ``t2: error: …``, and what t2 says of a Ctrl-C that came while it worked.

    Every other exception goes where it went before.
    """
    previous = sys.excepthook
    if getattr(previous, "_t2", False):
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, T2Error):
            print(f"t2: error: {error}", file=sys.stderr)
            # An interpreter that meets SystemExit in its hook ends with that status instead of 1.
            raise SystemExit(2)
        if isinstance(error, KeyboardInterrupt) and tell(error):
            leave(130)
        previous(kind, error, traceback)

    hook._t2 = True  # type: ignore[attr-defined]
    sys.excepthook = hook
