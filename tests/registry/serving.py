"""Registry servers for tests: the application called in process, and a real process that listens."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from t2.registry.open import open_embedded
from t2.registry.schemas import Scope as TokenScope
from t2.registry.server.app import create_app
from t2.registry.services.service import Service
from t2.registry.settings import ServerSettings
from tests.registry.samples import expert_bytes

BINARY = {"Content-Type": "application/octet-stream"}


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def token(service: Service, *scopes: TokenScope, **options: Any) -> dict[str, str]:
    """The headers of a new token."""
    return bearer(service.create_token("-".join(scopes), scopes, **options).secret)


@contextmanager
def client_of(service: Service, *, url: str = "http://localhost", **settings: Any) -> Iterator[TestClient]:
    """A client of the application over a registry; errors of the server come as answers."""
    app = create_app(service, ServerSettings(**settings))
    local = ("127.0.0.1", 50000)
    with TestClient(app, base_url=url, raise_server_exceptions=False, follow_redirects=False, client=local) as client:
        yield client


@contextmanager
def embedded(folder: Path, **settings: Any) -> Iterator[tuple[Service, TestClient]]:
    """A fresh embedded registry, and a client of its application."""
    service = open_embedded(folder / "registry")
    with client_of(service, **settings) as client:
        yield service, client


def upload(
    client: TestClient, name: str = "team/math", seed: int = 0, *, headers: dict[str, str] | None = None
) -> dict[str, Any]:
    """Publish a sample over HTTP; the version."""
    answer = client.post(
        f"/v1/experts/{name}/versions", content=expert_bytes(seed), headers={**BINARY, **(headers or {})}
    )
    assert answer.status_code in (200, 201), answer.text
    version: dict[str, Any] = answer.json()
    return version


def living(app: ASGIApp) -> ASGIApp:
    """The application without the end of its life, for callers that begin it anew for each request."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})

    return call


@contextmanager
def process(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``t2 registry serve`` on a free port: the process and its URL. What it logs is in ``stderr``."""
    command = [sys.executable, "-m", "t2.cli", "registry", "serve", "--port", "0", *arguments]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        assert " on http://" in line, f"{line} {started.stderr.read() if started.stderr else ''}"
        yield started, line.split(" on ")[1].strip()
    finally:
        started.kill()
        started.communicate()


def eventually(condition: Any, seconds: float = 20.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)
