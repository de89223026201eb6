"""Real parts for the registry's tests, started once a session: PostgreSQL and an S3 store."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.registry import servers


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a PostgreSQL server's maintenance database."""
    # Not in pytest's folder: as root the server runs as another user, whom the next run of pytest shuts out of there.
    with tempfile.TemporaryDirectory(prefix="t2-postgres-") as folder, servers.postgres(Path(folder)) as url:
        yield url


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """URL of a fresh, empty PostgreSQL database."""
    with servers.new_database(postgres_server) as url:
        yield url


@pytest.fixture(scope="module")
def postgres_module_url(postgres_server: str) -> Iterator[str]:
    """As ``postgres_url``, shared by a module."""
    with servers.new_database(postgres_server) as url:
        yield url


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.S3]:
    """An S3 server; ``bucket()`` makes a fresh bucket in it."""
    with servers.s3(tmp_path_factory.mktemp("s3")) as server:
        yield server
