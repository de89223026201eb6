"""Bodies of requests: their shapes, and reading them within a limit."""

from __future__ import annotations

import asyncio
from typing import Annotated

from pydantic import BaseModel, ConfigDict, FailFast, Field, RootModel, StringConstraints, model_validator
from starlette.requests import Request

from t2.core.curve import CurvePoint
from t2.core.errors import TooLargeError
from t2.registry.names import MAX_NUMBER, MAX_POINTS_A_CALL, MAX_TAGS
from t2.registry.schemas import NO_NUL as NO_NUL
from t2.registry.schemas import BaseId, Metrics, Name, Number, Scope, ShortText, Step, Tag, Targets, Text
from t2.registry.server.limits import LEASE, SMALL, Lease
from t2.registry.server.problems import HttpError
from t2.registry.settings import ServerSettings

MAX_INT = MAX_NUMBER
MAX_FIELDS = 50
"""Fields of one object, known and unknown."""


def _few_fields(value: object) -> object:
    # Each unknown field is an error of its own, of a thousand bytes.
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise ValueError(f"it has {len(value)} fields, at most {MAX_FIELDS} are taken")
    return value


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    _few = model_validator(mode="before")(_few_fields)


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

    _few = model_validator(mode="before")(_few_fields)

    step: Step


class PointsBody(_Body):
    """Points to add to a reward curve."""

    # The first point that is wrong ends the check.
    points: Annotated[list[PointBody], FailFast()] = Field(max_length=MAX_POINTS_A_CALL)


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


async def read_body(request: Request, limit: int, settings: ServerSettings) -> bytes:
    """The whole body, as :func:`read_parts` reads it."""
    return b"".join(await read_parts(request, limit, settings))


async def read_parts(request: Request, limit: int, settings: ServerSettings) -> list[bytes]:
    """The whole body, in parts; it is not read on once it is over the limit.

    Raises:
        TooLargeError: it is, or says that it will be.
        HttpError: it stopped arriving, or is too slow, or its length cannot be read, or there is no memory for it.
    """
    declared = request.headers.get("content-length")
    if declared is not None and not (declared.isascii() and declared.isdecimal()):
        raise HttpError(400, "the header Content-Length is not a number")
    message = f"the body has more than {limit} bytes, the limit here"
    if declared is not None and int(declared) > limit:
        raise TooLargeError(message)
    lease: Lease = request.scope[LEASE]
    parts: list[bytes] = []
    size = 0
    waited = 0.0  # for memory, which is not the client's fault
    stream = request.stream()
    time = asyncio.get_running_loop().time
    began = time()
    while True:
        due = min(began + settings.body_seconds, began + settings.slow_seconds + size / settings.slowest_rate) + waited
        try:
            async with asyncio.timeout_at(due), asyncio.timeout(settings.stall_seconds):
                part = await anext(stream, None)
        except TimeoutError as error:
            text = f"the body stopped arriving, or nearly, after {size} bytes; send it again"
            raise HttpError(408, text) from error
        if part is None:
            lease.grown()
            return parts
        size += len(part)
        if size > limit:
            raise TooLargeError(message)
        parts.append(part)
        if size > SMALL:
            asked = time()
            await lease.grow(size - lease.held)
            waited += time() - asked
