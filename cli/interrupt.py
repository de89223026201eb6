"""Exit at once, without a traceback, on Ctrl-C during imports.

A KeyboardInterrupt there would print the import in progress, and some libraries turn it into another error. Nothing has
to be undone during imports. Before this module is imported only Python itself has started.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

STATUS = 130
"""Exit status after Ctrl-C, as shells report it."""


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    """End the process; a signal handler."""
    os._exit(STATUS)


def exit_on_interrupt() -> None:
    """Let Ctrl-C end the process at once; no effect in threads or if Ctrl-C is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, _exit)


def raise_on_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _exit:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def exiting_on_interrupt() -> Iterator[None]:
    """Context in which Ctrl-C ends the process at once."""
    exit_on_interrupt()
    try:
        yield
    finally:
        raise_on_interrupt()
