"""Operations of the API: one declaration each, and what happens to every request before its handler.

In this order: unknown query parameters are refused, the token is checked, then the body is read within its limit. So
nobody without the scope makes the server read a body or look into the database.
"""

from __future__ import annotations

import functools
import inspect
import json
import typing
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope as AsgiScope

from t2.core.errors import InvalidRequestError, nearest
from t2.core.references import ExpertName, parse_name
from t2.registry.schemas import Scope
from t2.registry.server.auth import Authenticator
from t2.registry.server.bodies import read_body
from t2.registry.server.limits import LEASE, Lease, Workers, check_values
from t2.registry.server.log import note_subject
from t2.registry.server.problems import HttpError, Problem
from t2.registry.services.service import Service
from t2.registry.settings import ServerSettings

JSON = "application/json"
BINARY = "application/octet-stream"
_SERVICE = "t2.service"
_BRIEF = 16 * 1024
"""Bytes of a JSON body that is read in the event loop, as a thread would take longer to reach."""
_JSON_FACTOR = 8
"""Bytes that the values of a JSON body take, for each byte of their text."""


@dataclass(frozen=True)
class Operation:
    """One operation of the API.

    Attributes:
        id: its name in the OpenAPI schema, which stays.
        scope: what a token needs; there is no operation without one.
        handler: answers a request; a plain function runs in a thread.
        answer: shape of the answer's JSON; None for none.
        status: of a success.
        errors: statuses that it may answer besides those that every operation may.
        takes: media type of the body; None where there is none.
        responses: more for the OpenAPI schema.
    """

    id: str
    method: str
    path: str
    scope: Scope
    handler: Callable[..., Any]
    answer: Any = None
    status: int = 200
    errors: Sequence[int] = ()
    takes: str | None = None
    responses: dict[int | str, dict[str, Any]] | None = None
    listed: bool = True


class OperationRoute(APIRoute):
    """The route of an operation."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()
        extra = self.openapi_extra or {}
        scope: Scope | None = extra.get("x-scope")
        if scope is None:
            raise TypeError(f"{self.path} has no scope")
        queries = {field.alias: _is_list(field.field_info.annotation) for field in self.dependant.query_params}
        shape = _shape(self.body_field.field_info.annotation) if self.body_field is not None else None

        async def handle(request: Request) -> Response:
            _check_parameters(request, queries)
            state = request.app.state
            authenticator: Authenticator = state.authenticator
            request.scope[_SERVICE] = service = await authenticator(request, scope)
            note_subject(request.scope, service.actor.subject)
            if shape is not None:
                check_type(request, JSON)
                settings: ServerSettings = state.settings
                body = await read_body(request, settings.max_body_bytes, settings)
                check_values(body, settings.max_body_values)
                parse: Callable[[], Any] = functools.partial(_parse, shape, body)
                if len(body) > _BRIEF:
                    lease: Lease = request.scope[LEASE]
                    writes: Workers = state.writes
                    await lease.promise(_JSON_FACTOR * len(body))
                    return await inner(_Parsed(request.scope, body, await writes.run(lease.owner, parse)))
                request = _Parsed(request.scope, body, parse() if body else None)
            return await inner(request)

        return handle


def add_operations(app: FastAPI, operations: Sequence[Operation], reads: Workers, writes: Workers) -> None:
    """Add operations to an application; plain functions run in threads, reads apart from writes."""
    for each in operations:
        statuses = {401, 403, 421, 422, 429, 500, 503, *each.errors}
        if "{" in each.path:
            statuses.add(404)
        if each.takes is not None:
            statuses |= {400, 408, 413, 415}
        responses: dict[int | str, dict[str, Any]] = {status: {"model": Problem} for status in sorted(statuses)}
        app.router.add_api_route(
            each.path,
            each.handler
            if inspect.iscoroutinefunction(each.handler)
            else _in_thread(each.handler, reads if each.method in ("GET", "HEAD") else writes),
            methods=[each.method],
            operation_id=each.id,
            name=each.id,
            response_model=each.answer,
            status_code=each.status,
            responses={**responses, **(each.responses or {})},
            include_in_schema=each.listed,
            openapi_extra={"x-scope": each.scope},
            route_class_override=OperationRoute,
        )


def _in_thread(handler: Callable[..., Any], workers: Workers) -> Callable[..., Coroutine[Any, Any, Any]]:
    """The handler in a thread; Starlette's own way takes several times as long to get there and back."""

    @functools.wraps(handler)
    async def run(**arguments: Any) -> Any:
        return await workers.run(owner_of(arguments["request"]), functools.partial(handler, **arguments))

    return run


def owner_of(request: Request) -> Any:
    """In whose turn the work of a request is done."""
    lease: Lease = request.scope[LEASE]
    return lease.owner


class _Parsed(Request):
    """A request whose body was read and checked already."""

    def __init__(self, scope: AsgiScope, body: bytes, value: Any) -> None:
        super().__init__(scope)
        self._bytes, self._value = body, value

    async def body(self) -> bytes:
        return self._bytes

    async def json(self) -> Any:
        return self._value


def _shape(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)


def _parse(shape: TypeAdapter[Any], body: bytes) -> Any:
    """The value of a JSON body; the framework takes it as it is, instead of doing this in the event loop.

    Raises:
        RequestValidationError: it is not JSON, or not of this shape.
        HttpError: it cannot be read at all.
    """
    try:
        return shape.validate_python(json.loads(body))
    except json.JSONDecodeError as error:
        fault = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "JSON", "ctx": {"error": error.msg}}
        raise RequestValidationError([fault]) from error
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in faults]) from error
    except (ValueError, RecursionError) as error:
        raise HttpError(400, "the body cannot be read as JSON") from error


def registry(request: Request) -> Service:
    """The registry, acting for whoever makes the request."""
    service: Service = request.scope[_SERVICE]
    return service


def expert_name(namespace: str, name: str) -> ExpertName:
    """The name in an address.

    Raises:
        ArgumentError: it is none.
    """
    return parse_name(f"{namespace}/{name}")


def answer(value: BaseModel, status: int = 200) -> Response:
    """A JSON answer; what the registry made is not validated again."""
    return Response(value.__pydantic_serializer__.to_json(value), status, media_type=JSON)


def ready(text: str | bytes) -> Response:
    """A JSON answer that is there as text."""
    return Response(text, media_type=JSON)


def answer_list(adapter: TypeAdapter[Any], values: Sequence[BaseModel]) -> Response:
    """A JSON answer of several."""
    return Response(adapter.dump_json(values), media_type=JSON)


def done() -> Response:
    """The answer of what has nothing to tell."""
    return Response(status_code=204)


def check_type(request: Request, wanted: str) -> None:
    """Check the media type of a body, and that it is not compressed.

    Raises:
        HttpError: it is of another type; a browser's form cannot send ours, and so cannot write.
    """
    given = request.headers.getlist("content-type")
    if len(given) != 1 or given[0].partition(";")[0].strip().lower() != wanted:
        raise HttpError(415, f"the body must be of the type {wanted}; set the header Content-Type")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise HttpError(415, "compressed bodies are not taken; send it without Content-Encoding")


def _check_parameters(request: Request, known: dict[str, bool]) -> None:
    seen: set[str] = set()
    for name, value in request.query_params.multi_items():
        if name not in known:
            raise InvalidRequestError(f"query.{name[:100]}: there is no such parameter{nearest(name[:100], known)}")
        if name in seen and not known[name]:
            raise InvalidRequestError(f"query.{name}: it is given twice")
        if "\x00" in value:
            raise InvalidRequestError(f"query.{name}: it holds a NUL character")
        seen.add(name)


def _is_list(annotation: Any) -> bool:
    return any(typing.get_origin(each) is list for each in (annotation, *typing.get_args(annotation)))
