"""What to say when a command needs an extra that is not installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from t2.core.errors import DependencyError


@contextlib.contextmanager
def needs_eval(command: str) -> Iterator[None]:
    """Turn a missing module of the ``eval`` extra into one line with the install command.

    Args:
        command: what the user ran, for the message.

    Raises:
        DependencyError: an import in the block failed because a module outside t2 is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in {"", "t2"}:
            raise
        raise DependencyError(
            f"{command} needs {name}, not part of the base install; run: pip install 't2-eval[eval]'"
        ) from error
