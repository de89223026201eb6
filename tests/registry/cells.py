"""The registries that the conformance tests run on: each kind of storage, by each client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from t2.registry.blobs.base import BlobStore
from t2.registry.blobs.local import LocalBlobs
from t2.registry.client.base import RegistryClient
from t2.registry.db import migrate
from t2.registry.db.database import Database
from t2.registry.services.actor import Actor, Limits
from t2.registry.services.service import Service

LIMITS = Limits(upload_bytes=200_000, points=12_000, lineage_nodes=12)
"""Small ones, so that tests reach them."""


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
        storage: ``sqlite+folder``, ``postgres+folder`` or ``postgres+s3``.
        access: ``embedded`` or ``http``.
    """
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(_database(storage, folder, request))
        service = Service(database, _blobs(storage, folder, request), Actor("embedded", "tester"), limits=LIMITS)
        yield Cell(service, service)


@contextlib.contextmanager
def _database(storage: str, folder: Path, request: pytest.FixtureRequest) -> Iterator[Database]:
    with contextlib.ExitStack() as stack:
        url = f"sqlite:///{folder / 'registry.db'}"
        if storage.startswith("postgres"):
            from tests.registry import servers

            url = stack.enter_context(servers.new_database(request.getfixturevalue("postgres_server")))
        database = Database(url)
        migrate.migrate(database)
        try:
            yield database
        finally:
            database.close()


def _blobs(storage: str, folder: Path, request: pytest.FixtureRequest) -> BlobStore:
    return LocalBlobs(folder / "blobs")
