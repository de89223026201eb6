"""The one shape of all error answers: problem details of RFC 9457."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from t2.core.errors import ArgumentError, ExpertFileError, RegistryError, StorageError, T2Error, nearest
from t2.registry.server.log import log, request_id

MEDIA_TYPE = "application/problem+json"

TITLES: dict[int, tuple[str, str]] = {
    400: ("bad-request", "The request cannot be read"),
    401: ("unauthorized", "An access token is needed"),
    403: ("forbidden", "The access token does not allow this"),
    404: ("not-found", "It is not there"),
    405: ("method-not-allowed", "This address has no such method"),
    408: ("timeout", "The request did not arrive in time"),
    409: ("conflict", "It conflicts with what is there"),
    413: ("too-large", "It is over a limit"),
    415: ("unsupported-media-type", "The body is of a type that is not taken here"),
    416: ("range-not-satisfiable", "The range lies outside of the content"),
    421: ("misdirected", "The server is not called by this name"),
    422: ("invalid-request", "The request breaks a rule"),
    429: ("too-many-requests", "This client has its share already"),
    500: ("internal-error", "The registry failed"),
    503: ("unavailable", "The registry cannot do this now"),
}
"""Code and title of each status that the registry answers errors with."""

RETRY_SECONDS = 1
"""Seconds in ``Retry-After`` with the statuses 429 and 503."""


class Fault(BaseModel):
    """One thing wrong with a request: where, such as ``query.limit``, and what."""

    where: str
    message: str


class Problem(BaseModel):
    """What every error answer holds.

    Attributes:
        type: a URN made of the code.
        title: the kind of error, for people.
        status: the HTTP status again.
        detail: one line: what, where, what to do.
        code: the kind of error, for programs.
        request_id: under which the server's log has more.
        errors: each thing wrong with the request, where there may be several.
    """

    model_config = ConfigDict(extra="forbid")

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: list[Fault] | None = None


class HttpError(T2Error):
    """An error of HTTP's own, which only a server knows."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})


def problem(
    request: Request, status: int, detail: str, *, headers: Mapping[str, str] | None = None, errors: Any = None
) -> Response:
    """An error answer."""
    status = status if status in TITLES else 500 if status >= 500 else 400
    code, title = TITLES[status]
    body = Problem(
        type=f"urn:t2:problem:{code}",
        title=title,
        status=status,
        detail=detail,
        code=code,
        request_id=request_id(request.scope),
        errors=errors,
    )
    given = dict(headers or {})
    if status in (429, 503):
        given.setdefault("Retry-After", str(RETRY_SECONDS))
    if status == 401:
        given.setdefault("WWW-Authenticate", 'Bearer realm="t2 registry"')
    return Response(body.model_dump_json(exclude_none=True), status, given, MEDIA_TYPE)


async def on_t2_error(request: Request, error: Exception) -> Response:
    """Answer an error of ours; those of the server's inside are told in its log alone."""
    if isinstance(error, HttpError):
        return problem(request, error.status, str(error), headers=error.headers)
    if isinstance(error, ArgumentError | ExpertFileError):
        return problem(request, 422, str(error))
    status = error.status if isinstance(error, RegistryError) else 503 if isinstance(error, StorageError) else 500
    if status < 500:
        return problem(request, status, str(error))
    log.error("%s %s", request_id(request.scope), error)
    return problem(request, status, hidden(request, status))


def hidden(request: Request, status: int) -> str:
    """What is told of a failure inside, whose own text may name hosts and folders of the server."""
    if status == 503:
        return "the registry cannot reach its database or its store now; try again in a few seconds"
    return f"the registry failed; its log says why, under the request {request_id(request.scope)}"


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Answer what the framework refuses: an unknown address, a wrong method, a body that cannot be read."""
    assert isinstance(error, HTTPException)
    detail = {
        404: f"there is nothing at {request.scope['path'][:200]!r}; the addresses are in /v1/openapi.json",
        405: f"{request.method[:20]} is not possible here; see the Allow header",
    }.get(error.status_code, str(error.detail))
    return problem(request, error.status_code, detail, headers=error.headers)


async def on_validation_error(request: Request, error: Exception) -> Response:
    """Answer parameters and bodies that do not fit their schema; values are not repeated."""
    assert isinstance(error, RequestValidationError)
    faults = [_fault(request, each) for each in error.errors()[:20]]
    more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
    detail = f"{faults[0].where}: {faults[0].message}{more}"
    return problem(request, 422, detail, errors=faults)


def _fault(request: Request, error: Mapping[str, Any]) -> Fault:
    location: Sequence[Any] = error["loc"]
    where = ".".join(str(part)[:100] for part in location)
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = f"there is no such field{nearest(str(location[-1])[:100], _fields(request, location[1:-1]))}"
    elif error["type"] == "json_invalid":
        where, message = "body", f"it is not JSON: {error['ctx']['error']} at character {location[-1]}"
    return Fault(where=where, message=message)


def _fields(request: Request, path: Sequence[Any]) -> list[str]:
    route = request.scope.get("route")
    field = route.body_field if isinstance(route, APIRoute) else None
    model = field.field_info.annotation if field is not None and not path else None
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
