"""Ctrl-C while modules are imported ends the program at once: there is nothing to undo, and no traceback to show.

Raising KeyboardInterrupt there, as Python does, prints the import in progress, and libraries turn it into other errors.
Before this module is imported there is only Python's own start.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

STATUS = 130
"""Exit status of a program that Ctrl-C stopped, as shells have it."""


def t2_exit(number: int, frame: FrameType | None) -> NoReturn:
    """End the process; a handler of signals."""
    os._exit(STATUS)


def exit_on_interrupt() -> None:
    """From now on Ctrl-C ends the process at once. No effect in threads, and where Ctrl-C is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, t2_exit)


def raise_on_interrupt() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is t2_exit:
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
