"""The application: operations, gate and error answers put together."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import anyio
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from t2.core.errors import T2Error
from t2.registry.server import problems
from t2.registry.server.auth import Authenticator
from t2.registry.server.content import Budget
from t2.registry.server.gate import LOOPBACK_NAMES, Gate, is_loopback
from t2.registry.server.health import Readiness
from t2.registry.server.metrics import Metrics
from t2.registry.server.openapi import build_schema
from t2.registry.server.operations import Operation, add_operations
from t2.registry.server.places import Places
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

THREADS = 10
"""In which operations run, of each process. They take turns anyway: more of them make all answers late under load."""
DOWNLOAD_BYTES = 256 * 1024 * 1024
"""Downloads that are in memory at once."""
CURVES = 4
"""Curves that are read at once: a long one takes 100 MB while it is."""
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

    Requests without a token pass while the database holds no token at all and ``settings.host`` is a loopback address.
    """
    metrics = Metrics()
    loopback = is_loopback(settings.host)
    authenticator = Authenticator(service, may_be_open=loopback)
    readiness = Readiness(service)
    threads = ThreadPoolExecutor(THREADS, "operation")

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            authenticator.close()
            readiness.close()
            threads.shutdown()
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
    app.state.uploads = Uploads(settings.concurrent_uploads, settings.max_upload_bytes, metrics)
    app.state.downloads = Budget(DOWNLOAD_BYTES)
    app.state.curves = anyio.CapacityLimiter(CURVES)
    app.state.verdicts = Places(VERDICTS, "comparisons")
    health.add_to(app)
    add_operations(app, OPERATIONS, threads)
    app.state.openapi = functools.cache(
        lambda: json.dumps(build_schema(app, {each.id: each for each in OPERATIONS})).encode()
    )
    hosts = (*LOOPBACK_NAMES, *settings.allowed_hosts) if loopback else settings.allowed_hosts or None
    app.add_middleware(Gate, metrics=metrics, hosts=hosts, origins=settings.cors_origins)
    return app
