"""The application: operations, gate and error answers put together."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from t2.core.errors import T2Error
from t2.registry.server import problems
from t2.registry.server.auth import Authenticator, is_loopback, may_be_open
from t2.registry.server.gate import LOOPBACK_NAMES, Gate
from t2.registry.server.health import Readiness
from t2.registry.server.limits import Addresses, Memory, Workers, Workspace
from t2.registry.server.metrics import Metrics
from t2.registry.server.openapi import build_schema
from t2.registry.server.operations import Operation, add_operations
from t2.registry.server.protocol import CONNECTIONS, Connections
from t2.registry.server.routes import (
    access,
    aliases,
    base_models,
    content,
    curves,
    experts,
    health,
    leaderboard,
    namespaces,
    versions,
)
from t2.registry.server.uploads import Uploads
from t2.registry.services.service import Service
from t2.registry.settings import ServerSettings

HELD = 5 / 8
"""Part of the memory that bodies and answers may hold; the rest is for the work on them."""
CURVES = 4
"""Curves that are read at once: a long one takes 40 MB while it is."""
VERDICTS = 1
"""Comparisons at once: one of 32 MiB of samples takes 150 MB, and ten seconds where scores are not 0 and 1."""

OPERATIONS: tuple[Operation, ...] = (
    *namespaces.OPERATIONS,
    *experts.OPERATIONS,
    *versions.OPERATIONS,
    *content.OPERATIONS,
    *curves.OPERATIONS,
    *aliases.OPERATIONS,
    *base_models.OPERATIONS,
    *leaderboard.OPERATIONS,
    *access.OPERATIONS,
)


def create_app(service: Service, settings: ServerSettings) -> FastAPI:
    """The registry as an ASGI application; it closes the service when it ends.

    Requests without a token pass while the database holds no token at all, nobody but this machine is meant to reach
    the server, and they come from this machine without a proxy.
    """
    metrics = Metrics()
    loopback = is_loopback(settings.host)
    wait = settings.queue_seconds
    authenticator = Authenticator(
        service, may_be_open=may_be_open(settings.host, settings.allowed_hosts), wait=settings.queue_seconds
    )
    readiness = Readiness(service, settings.min_free_bytes)
    held = int(settings.memory_bytes * HELD)
    largest = max(settings.max_upload_bytes, settings.max_body_bytes)
    memory = Memory(held, body=largest, share=settings.memory_share, wait=wait)
    uploads = Uploads(settings, Workspace(settings.memory_bytes - held), metrics)
    addresses = Addresses(settings.trusted_proxies)
    reads = Workers(settings.read_threads, "reads", wait)
    writes = Workers(settings.write_threads, "writes", wait)
    downloads = Workers(settings.read_threads, "downloads", wait)
    curves_read = Workers(CURVES, "curves", wait)
    verdicts = Workers(VERDICTS, "comparisons", wait)

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        try:
            yield {CONNECTIONS: Connections(settings, addresses, metrics)}
        finally:
            authenticator.close()
            readiness.close()
            for each in (uploads, reads, writes, downloads, curves_read, verdicts):
                each.close()
            service.close()

    app = FastAPI(
        title="t2 registry",
        version="1",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=life,
        exception_handlers={
            T2Error: problems.on_t2_error,
            HTTPException: problems.on_http_exception,
            RequestValidationError: problems.on_validation_error,
        },
    )
    app.state.settings = settings
    app.state.metrics = metrics
    app.state.authenticator = authenticator
    app.state.readiness = readiness
    app.state.uploads = uploads
    app.state.memory = memory
    app.state.reads, app.state.writes = reads, writes
    app.state.downloads, app.state.curves, app.state.verdicts = downloads, curves_read, verdicts
    health.add_to(app)
    add_operations(app, OPERATIONS, reads, writes)
    building = threading.Lock()

    @functools.cache
    def schema() -> bytes:
        return json.dumps(build_schema(app, {each.id: each for each in OPERATIONS})).encode()

    def schema_once() -> bytes:
        with building:  # the cache alone lets several threads build it at the same time
            return schema()

    app.state.openapi = schema_once
    hosts = (*LOOPBACK_NAMES, *settings.allowed_hosts) if loopback else settings.allowed_hosts or None
    app.add_middleware(
        Gate, metrics=metrics, memory=memory, addresses=addresses, hosts=hosts, origins=settings.cors_origins
    )
    return app
