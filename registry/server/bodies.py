"""Bodies of requests: their shapes, and reading them within a limit."""

from __future__ import annotations

import asyncio
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, RootModel, StringConstraints
from starlette.requests import Request

from t2.core.curve import CurvePoint
from t2.core.errors import TooLargeError
from t2.registry.names import MAX_NUMBER, MAX_POINTS_A_CALL, MAX_TAGS
from t2.registry.schemas import NO_NUL as NO_NUL
from t2.registry.schemas import BaseId, Metrics, Name, Number, Scope, ShortText, Step, Tag, Targets, Text
from t2.registry.server.problems import HttpError

CHUNK_SECONDS = 30.0
"""How long the server waits for the next bytes of a body."""
BODY_SECONDS = 600.0
"""How long for the whole body."""
START_SECONDS = 20.0
"""How long a body may come slower than :data:`SLOWEST`."""
SLOWEST = 64 * 1024
"""Bytes in a second, on average: an upload that trickles keeps others from its place."""

MAX_INT = MAX_NUMBER


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class NamespaceBody(_Body):
    """A namespace to make."""

    name: Name
    description: Text = ""


class DescriptionBody(_Body):
    """The new description of an expert."""

    description: Text


class TagsBody(_Body):
    """Tags to add and to remove."""

    add: list[Tag] = Field(default_factory=list, max_length=MAX_TAGS)
    remove: list[Tag] = Field(default_factory=list, max_length=MAX_TAGS)


class MetricsBody(RootModel[Metrics]):
    """Metrics to set, by name."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, json_schema_extra={"additionalProperties": False})

    root: Metrics


class PointBody(CurvePoint):
    """A point of a reward curve."""

    model_config = ConfigDict(strict=True)

    step: Step


class PointsBody(_Body):
    """Points to add to a reward curve."""

    points: list[PointBody] = Field(max_length=MAX_POINTS_A_CALL)


class AliasBody(_Body):
    """The version that an alias is to point to, and why."""

    version: Number
    reason: Text = ""


class BaseModelBody(_Body):
    """A base model: its name, revision, and the rank of each adaptable matrix."""

    id: BaseId
    revision: ShortText | None = None
    targets: Annotated[Targets, Field(json_schema_extra={"additionalProperties": False})]


class TokenBody(_Body):
    """An access token to make; without ``days`` it does not expire."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    scopes: list[Scope] = Field(min_length=1, max_length=3)
    days: Annotated[float, Field(gt=0, le=36500)] | None = None


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body; it is not read on once it is over the limit.

    Raises:
        TooLargeError: it is, or says that it will be.
        HttpError: it stopped arriving, or is too slow, or its length cannot be read.
    """
    declared = request.headers.get("content-length")
    if declared is not None and not (declared.isascii() and declared.isdecimal()):
        raise HttpError(400, "the header Content-Length is not a number")
    message = f"the body has more than {limit} bytes, the limit here"
    if declared is not None and int(declared) > limit:
        raise TooLargeError(message)
    parts: list[bytes] = []
    size = 0
    stream = request.stream()
    try:
        began = asyncio.get_running_loop().time()
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                due = began + START_SECONDS + size / SLOWEST
                async with asyncio.timeout_at(due), asyncio.timeout(CHUNK_SECONDS):
                    part = await anext(stream, None)
                if part is None:
                    return b"".join(parts)
                size += len(part)
                if size > limit:
                    raise TooLargeError(message)
                parts.append(part)
    except TimeoutError as error:
        raise HttpError(408, f"the body stopped arriving, or nearly, after {size} bytes; send it again") from error
