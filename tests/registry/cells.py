"""The registries that the conformance tests run on: each kind of storage, by each client."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn

from t2.registry.blobs.base import BlobStore
from t2.registry.blobs.local import LocalBlobs
from t2.registry.blobs.s3 import Credentials, S3Blobs
from t2.registry.client.base import RegistryClient
from t2.registry.client.http import HttpRegistry
from t2.registry.db import migrate
from t2.registry.db.database import Database
from t2.registry.server.app import create_app
from t2.registry.server.protocol import Connection
from t2.registry.services.actor import Actor, Limits
from t2.registry.services.service import Service
from t2.registry.settings import ServerSettings, load_settings
from tests.registry import servers

LIMITS = Limits(upload_bytes=200_000, points=12_000, lineage_nodes=12, compared_bytes=40_000)
"""Small ones, so that tests reach them."""
SETTINGS = load_settings(max_upload_bytes=LIMITS.upload_bytes, max_points=LIMITS.points, concurrent_uploads=16)


@dataclass(frozen=True)
class Cell:
    """One registry and a client of it.

    Attributes:
        client: what the tests speak to.
        service: the registry behind it, for what no client can do.
    """

    client: RegistryClient
    service: Service


@contextlib.contextmanager
def open_cell(storage: str, access: str, folder: Path, request: pytest.FixtureRequest) -> Iterator[Cell]:
    """Start one.

    Args:
        storage: ``sqlite+folder`` or ``postgres+s3``.
        access: ``embedded`` or ``http``.
    """
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(open_database(storage.partition("+")[0], folder, request))
        service = Service(database, _blobs(storage, folder, request), Actor("embedded", "tester"), limits=LIMITS)
        if access == "embedded":
            yield Cell(service, service)
            return
        secret = service.create_token("conformance", ["admin"]).secret
        url = stack.enter_context(serve(service, SETTINGS))
        yield Cell(stack.enter_context(HttpRegistry(url, secret)), service)


@contextlib.contextmanager
def serve(service: Service, settings: ServerSettings) -> Iterator[str]:
    """The URL of a server that runs in a thread, on a free port of this machine."""
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            create_app(service, settings),
            log_config=None,
            access_log=False,
            lifespan="on",
            http=Connection,
            timeout_keep_alive=settings.idle_seconds,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            for _ in range(600):
                assert thread.is_alive(), "the server did not start"
                if server.started:
                    break
                time.sleep(0.05)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def open_database(kind: str, folder: Path, request: pytest.FixtureRequest) -> Iterator[Database]:
    """A new database with the registry's tables: ``sqlite`` or ``postgres``."""
    with contextlib.ExitStack() as stack:
        url = f"sqlite:///{folder / 'registry.db'}"
        if kind == "postgres":
            url = stack.enter_context(servers.new_database(request.getfixturevalue("postgres_server")))
        database = Database(url)
        migrate.migrate(database)
        try:
            yield database
        finally:
            database.close()


def _blobs(storage: str, folder: Path, request: pytest.FixtureRequest) -> BlobStore:
    if storage == "sqlite+folder":
        return LocalBlobs(folder / "blobs")
    server: servers.S3 = request.getfixturevalue("s3_server")
    credentials = Credentials(server.access_key, server.secret_key)
    return S3Blobs(server.bucket(), "t2", endpoint=server.endpoint, credentials=credentials)
