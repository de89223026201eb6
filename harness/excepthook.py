"""One line instead of a traceback for a user's error, in programs that t2 does not own (``lm_eval``)."""

from __future__ import annotations

import sys
from types import TracebackType

from t2.core.errors import T2Error


def tell(stop: KeyboardInterrupt) -> bool:
    """Print what t2 says of a Ctrl-C; False where it says nothing."""
    notes = [note for note in getattr(stop, "__notes__", []) if note.startswith("t2: ")]
    if notes:
        print(f"\n{notes[0]}", file=sys.stderr)
    return bool(notes)


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
            raise SystemExit(130)
        previous(kind, error, traceback)

    hook._t2 = True  # type: ignore[attr-defined]
    sys.excepthook = hook
