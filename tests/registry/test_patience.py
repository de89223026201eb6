"""A database that accepts what it is sent and never answers, as one that is stopped does."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy

from t2.core.errors import UnavailableError
from t2.registry.db import database as database_module
from t2.registry.db import migrate
from t2.registry.db.database import Database
from t2.registry.open import open_server
from t2.registry.settings import load_settings
from tests.registry.samples import expert_bytes
from tests.registry.serving import BINARY, client_of, eventually

SECONDS = 0.5


class Gate:
    """Passes bytes between clients and PostgreSQL, until it is shut: then it takes them and passes on none."""

    def __init__(self, url: str) -> None:
        parts = sqlalchemy.make_url(url)
        given = parts.query.get("host") or parts.host or "localhost"
        host, port = str(given), parts.port or 5432
        self._target: tuple[str, int] | str = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        at = {"host": "127.0.0.1", "port": self._listener.getsockname()[1], "query": {"sslmode": "disable"}}
        self.url = parts.set(**at).render_as_string(hide_password=False)
        self.open = threading.Event()
        self.open.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.open.set()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                family = socket.AF_UNIX if isinstance(self._target, str) else socket.AF_INET
                server = socket.socket(family)
                server.connect(self._target)
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.open.wait()
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def gate(postgres_url: str) -> Iterator[Gate]:
    database = Database(postgres_url)
    migrate.migrate(database)
    database.close()
    gate = Gate(postgres_url)
    yield gate
    gate.close()


def test_a_silent_database_ends_requests_and_is_told_and_comes_back(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t2.registry.db.database.SILENT_SECONDS", SECONDS)
    settings = load_settings(database_url=gate.url, blobs=str(tmp_path / "blobs"), database_timeout=2.0)
    upload = "/v1/experts/team/math/versions"
    with client_of(open_server(settings), database_timeout=2.0) as client:
        assert client.post(upload, content=expert_bytes(0), headers=BINARY).status_code == 201
        eventually(lambda: client.get("/readyz").status_code == 200)
        gate.open.clear()
        for answer in (client.get("/v1/experts"), client.post(upload, content=expert_bytes(1), headers=BINARY)):
            assert answer.status_code == 503
            assert answer.json()["code"] == "unavailable"
        ready = client.get("/readyz")
        assert ready.status_code == 503
        assert "database" in ready.json()["detail"]
        gate.open.set()
        eventually(lambda: client.post(upload, content=expert_bytes(2), headers=BINARY).status_code in (200, 201))
        assert client.get("/v1/experts").json()["items"][0]["versions"] >= 2


def test_a_statement_that_is_answered_late_is_waited_for(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2.registry.db.database.SILENT_SECONDS", SECONDS)
    database = Database(gate.url, timeout=1.0)
    try:
        with pytest.raises(UnavailableError, match="statement timeout"), database.read() as session:
            session.execute(sqlalchemy.text("SELECT pg_sleep(30)"))
        with database.read() as session:
            assert session.scalar(sqlalchemy.text("SELECT 1")) == 1
    finally:
        database.close()


def test_a_migration_may_take_longer_than_a_request(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2.registry.db.database.SILENT_SECONDS", 0.0)
    database = Database(gate.url, timeout=0.5)
    try:
        with psycopg.connect(gate.url) as blocker:
            blocker.execute("SELECT pg_advisory_lock(%s)", [migrate._LOCK])
            unlock = threading.Timer(1.5, lambda: blocker.execute("SELECT pg_advisory_unlock_all()"))
            unlock.start()
            migrate.migrate(database)
            unlock.join()
        assert migrate.current(database) == migrate.head()
    finally:
        database.close()


def test_connections_that_the_server_ended_while_they_lay_idle_are_replaced(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "IDLE_SECONDS", 0.0)
    with contextlib.closing(Database(postgres_url)) as database:
        one = sqlalchemy.text("SELECT 1")
        others = sqlalchemy.text(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )
        with contextlib.closing(Database(postgres_url)) as killer:
            for way in (database.read, database.write, database.glance):
                with way() as reader:
                    reader.execute(one)
                with killer.glance() as connection:
                    # Reads and writes have connections of their own.
                    assert connection.scalar(others) == (1 if way == database.read else 2)
                with way() as reader:
                    assert reader.scalar(one) == 1
