"""The exception tree of t2.

Every failure that a user can cause is a :class:`T2Error`. Its text is one line that says what is wrong, where, and
what to do; the command-line programs print that line and exit with 2. Anything else that escapes is a defect of t2.

    T2Error
    ├── ArgumentError        a model_arg, option, setting or configuration value
    ├── TaskError            a task: unknown, without a usable adaptation pool, of an unsupported kind
    ├── DataError            a data set that is absent, truncated or of another form
    ├── ResultsError         results of an evaluation: not lm-eval's, truncated, or at odds with their samples
    ├── ExpertError          an expert
    │   ├── ExpertFileError      its file: truncated, not of the strict profile, not finite
    │   └── ExpertMismatchError  it belongs to another base model, or its ranks differ
    ├── ModelError           the base model: no adaptable matrices, unsupported layers
    ├── StorageError         a file could not be written or read: full disk, permissions
    ├── TrainingError        training cannot go on: constant reward, diverged
    ├── RegistryError        an expert registry refused or failed
    │   ├── NotFoundError        no such expert, version, alias, …
    │   ├── ConflictError        it exists already, or changed meanwhile
    │   ├── InvalidRequestError  the request or the uploaded file breaks a rule
    │   ├── TooLargeError        an upload or a result is over a limit
    │   ├── UnauthorizedError    no token, or one that is unknown, expired or revoked
    │   ├── ForbiddenError       the token lacks the scope
    │   └── UnavailableError     the server, its database or its store cannot be reached; worth another try
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


class ResultsError(T2Error):
    """Results of an evaluation are absent, truncated, at odds with their samples, or cannot be compared."""


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


class RegistryError(T2Error):
    """An expert registry refused a request or failed.

    Attributes:
        status: the HTTP status that says the same.
        code: a stable name of the kind of error, for programs.
    """

    status = 500
    code = "internal-error"


class NotFoundError(RegistryError):
    """The registry has no such namespace, expert, version, alias or other thing."""

    status = 404
    code = "not-found"


class ConflictError(RegistryError):
    """What is to be made exists already, or what is to be changed has changed meanwhile."""

    status = 409
    code = "conflict"


class InvalidRequestError(RegistryError):
    """A request breaks a rule, or an uploaded file the strict profile."""

    status = 422
    code = "invalid-request"


class TooLargeError(RegistryError):
    """An upload is over a limit; the message states it."""

    status = 413
    code = "too-large"


class UnauthorizedError(RegistryError):
    """The registry wants a token, and got none, or one that is unknown, expired or revoked."""

    status = 401
    code = "unauthorized"


class ForbiddenError(RegistryError):
    """The token lacks the scope that the request needs."""

    status = 403
    code = "forbidden"


class UnavailableError(RegistryError):
    """The registry, its database or its blob store cannot be reached now; the same request may succeed later."""

    status = 503
    code = "unavailable"


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
