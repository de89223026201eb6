"""``/healthz``, ``/readyz``, ``/metrics`` and the OpenAPI schema: for machines that watch, without a token."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from t2.registry.server.health import Readiness
from t2.registry.server.limits import Workers
from t2.registry.server.metrics import Metrics
from t2.registry.server.operations import JSON, answer, owner_of
from t2.registry.server.problems import Problem, problem

OPENAPI = "/v1/openapi.json"
_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Health(BaseModel):
    """The state of the server."""

    status: str


async def healthz() -> Response:
    """Tell that the process lives; nothing else is looked at."""
    return answer(Health(status="alive"))


async def readyz(request: Request) -> Response:
    """Tell whether database, schema and store can be used; 503 names what cannot."""
    readiness: Readiness = request.app.state.readiness
    failures = await readiness()
    if failures:
        return problem(request, 503, "; ".join(f"{name}: {failure}" for name, failure in failures.items()))
    return answer(Health(status="ready"))


async def metrics(request: Request) -> Response:
    """Tell what happened, in Prometheus's text format."""
    counted: Metrics = request.app.state.metrics
    reads: Workers = request.app.state.reads
    return Response(await reads.run(owner_of(request), counted.render), media_type=_TEXT)


async def openapi(request: Request) -> Response:
    """The OpenAPI schema of this API."""
    reads: Workers = request.app.state.reads
    schema: bytes = await reads.run(owner_of(request), request.app.state.openapi)
    return Response(schema, media_type=JSON)


def add_to(app: FastAPI) -> None:
    """Add the operations to the application."""
    plain: dict[int | str, Any] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    add = app.router.add_api_route
    add("/healthz", healthz, operation_id="healthz", response_model=Health)
    add("/readyz", readyz, operation_id="readyz", response_model=Health, responses={503: {"model": Problem}})
    add("/metrics", metrics, operation_id="metrics", response_class=Response, responses=plain)
    add(OPENAPI, openapi, include_in_schema=False)
