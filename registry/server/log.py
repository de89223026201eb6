"""The server's log, and the id that ties an answer to its lines. Tokens, queries and bodies are never in it."""

from __future__ import annotations

import logging
import random
from collections.abc import MutableMapping
from typing import Any

log = logging.getLogger("t2.registry")
access = logging.getLogger("t2.registry.access")

_KEY = "t2.request_id"
_SUBJECT = "t2.subject"


def new_request_id(scope: MutableMapping[str, Any]) -> str:
    """Give a request its id."""
    # Nobody gains by guessing one, and a system call would hand the interpreter to another thread.
    scope[_KEY] = made = f"{random.getrandbits(64):016x}"
    return made


def request_id(scope: Any) -> str:
    """The id of a request."""
    return str(scope.get(_KEY, "-"))


def note_subject(scope: MutableMapping[str, Any], name: str) -> None:
    """Remember whose request it is."""
    scope[_SUBJECT] = name


def subject(scope: Any) -> str:
    """Whose request it is, ``-`` while that is not known; with nothing that would break a line."""
    return ascii(scope.get(_SUBJECT, "-"))[1:-1]
