"""The exception tree of t2.

Every failure that a user can cause is a :class:`T2Error`. Its text is one line that says what is wrong, where, and
what to do; the command-line programs print that line and exit with 2. Anything else that escapes is a defect of t2.

    T2Error
    ├── ArgumentError        a model_arg, option, setting or configuration value
    ├── TaskError            a task: unknown, without a usable adaptation pool, of an unsupported kind
    ├── DataError            a data set that is absent, truncated or of another form
    ├── ExpertError          an expert
    │   ├── ExpertFileError      its file: truncated, not of the strict profile, not finite
    │   └── ExpertMismatchError  it belongs to another base model, or its ranks differ
    ├── ModelError           the base model: no adaptable matrices, unsupported layers
    ├── StorageError         a file could not be written or read: full disk, permissions
    ├── TrainingError        training cannot go on: constant reward, diverged
    └── DependencyError      an optional part is not installed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class T2Error(Exception):
    """A failure that a user can cause and mend; ``str()`` is one line: what, where, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class ArgumentError(T2Error):
    """A model_arg, option, setting or configuration value is unknown or out of range."""


class TaskError(T2Error):
    """A task is unknown, has no usable adaptation pool, or is of a kind that cannot be adapted."""


class DataError(T2Error):
    """A data set is absent, truncated or of another form than expected."""


class ExpertError(T2Error):
    """An expert cannot be found or used."""


class ExpertFileError(ExpertError):
    """An expert's file is truncated, breaks the strict profile, or holds values that are not finite."""


class ExpertMismatchError(ExpertError):
    """An expert belongs to another base model, or its matrices or ranks differ from the model's."""


class ModelError(T2Error):
    """The base model has no adaptable matrices, or layers that t2 does not support."""


class StorageError(T2Error):
    """A file could not be written or read."""


class TrainingError(T2Error):
    """Training cannot begin or go on, for a reason that another setting or task would remove."""


class DependencyError(T2Error):
    """An optional part of t2 is not installed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Suffix for an error about an unknown name: ``"; did you mean 'x'?"``, or the known names when none is near.

    Args:
        name: what the user wrote.
        known: the names that exist.
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    if not names:
        return "; none exist"
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return f"; known: {shown}"
