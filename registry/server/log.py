"""The server's log, and the id that ties an answer to its lines. Tokens, queries and bodies are never in it."""

from __future__ import annotations

import logging
import secrets
from collections.abc import MutableMapping
from typing import Any

log = logging.getLogger("t2.registry")
access = logging.getLogger("t2.registry.access")

_KEY = "t2.request_id"


def new_request_id(scope: MutableMapping[str, Any]) -> str:
    """Give a request its id."""
    scope[_KEY] = made = secrets.token_hex(8)
    return made


def request_id(scope: Any) -> str:
    """The id of a request."""
    return str(scope.get(_KEY, "-"))
