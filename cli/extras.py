"""What commands share that need the ``eval`` extra: what to say when it is not installed, and arguments of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from t2.cli.interrupt import exiting_on_interrupt
from t2.core.errors import ArgumentError, DependencyError


@contextlib.contextmanager
def needs_eval(command: str) -> Iterator[None]:
    """Import the ``eval`` extra; report a missing module in one line, exit at once on Ctrl-C.

    Args:
        command: what the user ran, for the message.

    Raises:
        DependencyError: an import in the block failed because a module outside t2 is not installed.
    """
    try:
        with exiting_on_interrupt():
            yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in {"", "t2"}:
            raise
        raise DependencyError(
            f"{command} needs {name}, not part of the base install; run: pip install 't2-eval[eval]'"
        ) from error


def pairs(option: str, text: str) -> dict[str, Any]:
    """Arguments such as ``pretrained=…,dtype=bfloat16``, read as lm-eval reads them.

    Args:
        option: where they stand, for the message.
        text: what stands there.

    Raises:
        ArgumentError: a part has no name or no value.
        DependencyError: lm-eval is not installed.
    """
    with needs_eval(option):
        from lm_eval.utils import simple_parse_args_string
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not (name.strip() and equals and value.strip()):
            raise ArgumentError(f"{option}={text}: {part!r} is not of the form key=value")
    return dict(simple_parse_args_string(text))
