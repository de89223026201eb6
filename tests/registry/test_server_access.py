"""Access tokens over HTTP: who may do what, and from where."""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route
from starlette.testclient import TestClient

from t2.registry.db import models
from t2.registry.schemas import Scope
from t2.registry.server import auth
from t2.registry.server.app import OPERATIONS
from t2.registry.server.operations import Operation, OperationRoute
from t2.registry.services import audit
from t2.registry.services.service import Service
from tests.registry.serving import bearer, embedded, eventually, token, upload

SCOPES: tuple[Scope, ...] = ("read", "write", "admin")
WITHOUT_TOKEN = {"/healthz", "/readyz", "/metrics", "/v1/openapi.json"}


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[tuple[Service, TestClient]]:
    with embedded(tmp_path) as pair:
        yield pair


def address(operation: Operation) -> str:
    values = {"number": "1", "id": "99", "digest": "0" * 64, "fingerprint": "0" * 64}
    path = operation.path
    for name in ("namespace", "name", "number", "alias", "digest", "fingerprint", "id"):
        path = path.replace(f"{{{name}}}", values.get(name, "x"))
    return path


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, dict[Scope, dict[str, str]]]]:
    """A client, and the headers of a token of each scope."""
    with embedded(tmp_path_factory.mktemp("guarded")) as (service, client):
        yield client, {scope: token(service, scope) for scope in SCOPES}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.id)
def test_every_operation_needs_its_scope(
    guarded: tuple[TestClient, dict[Scope, dict[str, str]]], operation: Operation
) -> None:
    client, headers = guarded
    allowed = SCOPES[SCOPES.index(operation.scope) :]
    refused = client.request(operation.method, address(operation))
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"].startswith("Bearer")
    for scope in SCOPES:
        # No body: what may is refused for its body, what may not is refused before that is looked at.
        answer = client.request(operation.method, address(operation), headers=headers[scope])
        assert (answer.status_code == 403) is (scope not in allowed), (scope, answer.text)
        assert answer.status_code != 401


def test_changes_need_more_than_read_and_tokens_need_admin() -> None:
    for each in OPERATIONS:
        reads = each.method in ("GET", "HEAD")
        secret = each.path.startswith(("/v1/tokens", "/v1/audit"))
        assert each.scope == ("admin" if secret else "read" if reads else "write"), each.id


def test_there_is_no_route_without_a_scope_but_those_known(registry: tuple[Service, TestClient]) -> None:
    routes = registry[1].app.routes  # type: ignore[attr-defined]
    assert all(isinstance(route, Route | APIRoute) for route in routes)
    without = {route.path for route in routes if not isinstance(route, OperationRoute)}
    assert without == WITHOUT_TOKEN


def test_a_route_without_a_scope_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="scope"):
        OperationRoute("/v1/new", lambda: None)


def test_the_registry_is_open_until_the_first_token(registry: tuple[Service, TestClient]) -> None:
    _, client = registry
    upload(client)
    assert client.get("/v1/audit").json()["items"][0]["subject"] == "anonymous"
    made = client.post("/v1/tokens", json={"name": "first", "scopes": ["admin"]})
    assert made.status_code == 201
    assert client.get("/v1/experts").status_code == 401
    mine = bearer(made.json()["secret"])
    assert client.get("/v1/experts", headers=mine).status_code == 200
    # Revoked is not absent: nobody gets in by revoking the last one.
    assert client.delete("/v1/tokens/1", headers=mine).status_code == 200
    assert client.get("/v1/experts").status_code == 401
    assert client.get("/v1/experts", headers=mine).status_code == 401


def test_a_token_made_elsewhere_closes_the_registry_soon(
    registry: tuple[Service, TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, client = registry
    monkeypatch.setattr(auth, "CACHE_SECONDS", 0.2)
    assert client.get("/v1/experts").status_code == 200
    service.create_token("first", ["admin"])
    eventually(lambda: client.get("/v1/experts").status_code == 401)


PROXIED = [
    {"Forwarded": "for=192.0.2.1"},
    {"X-Forwarded-For": "127.0.0.1"},
    {"X-Forwarded-Host": "localhost"},
    {"X-Forwarded-Proto": "https"},
    {"X-Real-IP": "127.0.0.1"},
    {"Via": "1.1 caddy"},
    {"CF-Connecting-IP": "127.0.0.1"},
]


@pytest.mark.parametrize("headers", PROXIED, ids=lambda each: next(iter(each)))
def test_through_a_proxy_of_this_machine_the_registry_is_never_open(
    registry: tuple[Service, TestClient], headers: dict[str, str]
) -> None:
    service, client = registry
    assert client.get("/v1/experts", headers=headers).status_code == 401
    body = {"name": "mine", "scopes": ["admin"]}
    answer = client.post("/v1/tokens", json=body, headers=headers)
    assert answer.status_code == 401
    assert "t2 registry token create" in answer.json()["detail"]
    assert service.list_tokens() == []
    assert client.get("/v1/experts").status_code == 200


@pytest.mark.parametrize(
    ("peer", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.9", 200),
        ("::1", 200),
        ("::ffff:127.0.0.1", 200),
        ("192.0.2.1", 401),
        ("::ffff:192.0.2.1", 401),
        ("2001:db8::1", 401),
        ("0.0.0.0", 401),
        ("localhost", 200),
        ("localhost.example", 401),
        (None, 401),  # a Unix socket, which another program may hand on
    ],
)
def test_the_registry_is_open_to_programs_of_this_machine_alone(
    registry: tuple[Service, TestClient], peer: str | None, status: int
) -> None:
    _, client = registry

    async def asked(scope: Any, receive: Any, send: Any) -> None:
        await client.app({**scope, "client": (peer, 1) if peer else None}, receive, send)

    assert TestClient(asked, base_url="http://localhost").get("/v1/experts").status_code == status


@pytest.mark.parametrize(
    ("hosts", "status"),
    [((), 200), (("localhost", "127.0.0.1"), 200), (("127.0.0.2", "[::1]"), 200), (("registry.example",), 401)],
)
def test_with_a_foreign_name_the_registry_is_never_open(tmp_path: Path, hosts: tuple[str, ...], status: int) -> None:
    with embedded(tmp_path, allowed_hosts=hosts) as (_, client):
        for host in ("localhost", "127.0.0.1:8470", "[::1]:8470"):
            assert client.get("/v1/experts", headers={"Host": host}).status_code == status
        if status == 401:
            assert client.get("/v1/experts", headers={"Host": "registry.example"}).status_code == 401


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("LOCALHOST:8470", True),
        ("127.0.0.1", True),
        ("127.8.8.8:1", True),
        ("::1", True),
        ("[::1]", True),
        ("[::1]:8470", True),
        ("::ffff:127.0.0.1", True),
        ("[::ffff:127.0.0.1]:80", True),
        ("0.0.0.0", False),
        ("::", False),
        ("[::1].evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("127.0.0.1:x", False),
        ("localhost.evil.example", False),
        ("localhost:80:80", False),
        ("192.0.2.1", False),
        ("::ffff:192.0.2.1", False),
        ("", False),
    ],
)
def test_what_is_this_machine_by_name_or_address(host: str, expected: bool) -> None:
    assert auth.is_loopback(host) is expected


def test_on_a_public_address_the_registry_is_never_open(tmp_path: Path) -> None:
    with embedded(tmp_path, host="0.0.0.0") as (service, client):
        assert client.get("/v1/experts").status_code == 401
        assert client.get("/v1/experts", headers=token(service, "read")).status_code == 200


def test_a_token_revoked_elsewhere_stops_soon(
    registry: tuple[Service, TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, client = registry
    monkeypatch.setattr(auth, "CACHE_SECONDS", 0.2)
    mine = token(service, "read")
    assert client.get("/v1/experts", headers=mine).status_code == 200
    service.revoke_token(1)
    eventually(lambda: client.get("/v1/experts", headers=mine).status_code == 401)
    assert "is revoked" in client.get("/v1/experts", headers=mine).json()["detail"]


def test_a_token_is_believed_for_five_seconds_at_most() -> None:
    assert auth.CACHE_SECONDS <= 5


def test_a_token_revoked_here_stops_at_once(registry: tuple[Service, TestClient]) -> None:
    service, client = registry
    admin, reader = token(service, "admin"), token(service, "read")
    assert client.get("/v1/experts", headers=reader).status_code == 200
    assert client.delete("/v1/tokens/2", headers=admin).json()["revoked_at"] is not None
    assert client.get("/v1/experts", headers=reader).status_code == 401


def test_a_change_of_tokens_outlives_what_was_being_looked_up(
    registry: tuple[Service, TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, client = registry
    authenticator: auth.Authenticator = client.app.state.authenticator  # type: ignore[attr-defined]
    real = service.database.read

    @contextlib.contextmanager
    def overtaken(change: Callable[[], object]) -> Iterator[None]:
        """The next look into the database sees it as it was before a change, and ends after it."""

        @contextlib.contextmanager
        def read() -> Iterator[Any]:
            monkeypatch.setattr(service.database, "read", real)
            with real() as session:
                yield session
            change()
            authenticator.forget()

        monkeypatch.setattr(service.database, "read", read)
        yield

    made: list[dict[str, str]] = []
    with overtaken(lambda: made.append(token(service, "read"))):
        client.get("/v1/experts")
    assert client.get("/v1/experts").status_code == 401
    with overtaken(lambda: service.revoke_token(1)):
        client.get("/v1/experts", headers=made[0])
    assert client.get("/v1/experts", headers=made[0]).status_code == 401


def test_a_token_stops_when_it_expires_even_while_it_is_believed(
    registry: tuple[Service, TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, client = registry
    monkeypatch.setattr(auth, "CACHE_SECONDS", 3600.0)
    mine = token(service, "read", days=1)
    assert client.get("/v1/experts", headers=mine).status_code == 200
    now = audit.now
    monkeypatch.setattr(audit, "now", lambda: now() + timedelta(hours=23))
    assert client.get("/v1/experts", headers=mine).status_code == 200
    monkeypatch.setattr(audit, "now", lambda: now() + timedelta(hours=25))
    assert client.get("/v1/experts", headers=mine).status_code == 401
    assert "expired" in client.get("/v1/experts", headers=mine).json()["detail"]


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Basic dXNlcjpwYXNz",
        "Bearer t2r_",
        "Bearer t2r_" + "0" * 72,
        "t2r_" + "0" * 72,
        "Bearer é",
        "Bearer " + "x" * 8000,
    ],
)
def test_what_is_no_token_is_refused_also_while_the_registry_is_open(
    registry: tuple[Service, TestClient], header: str
) -> None:
    answer = registry[1].get("/v1/experts", headers=[(b"authorization", header.encode("latin-1"))])
    assert answer.status_code == 401
    assert header[7:] not in answer.text or len(header) < 12


def test_two_tokens_in_one_request_are_refused(registry: tuple[Service, TestClient]) -> None:
    service, client = registry
    mine = token(service, "read")["Authorization"]
    assert client.get("/v1/experts", headers=[("Authorization", mine), ("Authorization", mine)]).status_code == 401


def test_tokens_are_compared_in_constant_time_and_looked_up_by_their_hash(
    registry: tuple[Service, TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, client = registry
    secret = token(service, "read")["Authorization"].removeprefix("Bearer ")
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert client.get("/v1/experts", headers=bearer(secret)).status_code == 200
    assert len(compared) == 2  # the checksum, and the hash
    with service.database.read() as session:
        (row,) = session.query(models.Token).all()
        assert secret not in repr(vars(row))
    assert compared[1] == (row.hash.encode(), row.hash.encode())


def test_the_last_use_is_recorded_once_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "CACHE_SECONDS", 0.0)
    with embedded(tmp_path) as (service, client):
        mine = token(service, "read")

        def used() -> datetime | None:
            return service.list_tokens()[0].last_used_at

        assert used() is None
        client.get("/v1/experts", headers=mine)
        eventually(lambda: used() is not None)
        first = used()
        assert first is not None
        for _ in range(3):
            client.get("/v1/experts", headers=mine)
        authenticator: auth.Authenticator = client.app.state.authenticator  # type: ignore[attr-defined]
        authenticator._recorder.submit(lambda: None).result()  # after whatever was to be recorded
        assert used() == first
        with service.database.write() as session:
            session.query(models.Token).update({"last_used_at": audit.now() - timedelta(minutes=2)})
        client.get("/v1/experts", headers=mine)
        eventually(lambda: first < (used() or first))


def test_who_did_it_is_the_tokens_name(registry: tuple[Service, TestClient]) -> None:
    service, client = registry
    mine = service.create_token("nightly build", ["write"])
    version = upload(client, headers=bearer(mine.secret))
    assert version["created_by"] == "api:nightly build"
    assert {entry.subject for entry in service.audit().items if entry.action == "version.create"} == {"nightly build"}


@pytest.mark.parametrize("name", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[::1].x", ""])
def test_on_loopback_only_its_own_names_are_answered(tmp_path: Path, name: str) -> None:
    with embedded(tmp_path, allowed_hosts=("registry.internal",)) as (service, client):
        client.headers.update(token(service, "read"))
        for good in ("localhost", "localhost:8470", "127.0.0.1:1", "[::1]", "[::1]:8470", "REGISTRY.internal:80"):
            assert client.get("/v1/experts", headers={"Host": good}).status_code == 200, good
        assert client.get("/v1/experts", headers={"Host": name}).status_code == 421
        assert client.get("/healthz", headers={"Host": name}).status_code == 421
        for both in (("localhost", name), (name, "localhost"), ("localhost", "localhost")):
            assert client.get("/v1/experts", headers=[("Host", each) for each in both]).status_code == 421


def test_on_a_public_address_the_names_are_those_that_are_set(tmp_path: Path) -> None:
    with embedded(tmp_path / "a", host="0.0.0.0") as (_, client):
        assert client.get("/healthz", headers={"Host": "anything"}).status_code == 200
    with embedded(tmp_path / "b", host="0.0.0.0", allowed_hosts=("a.example",)) as (_, client):
        assert client.get("/healthz", headers={"Host": "a.example"}).status_code == 200
        assert client.get("/healthz", headers={"Host": "b.example"}).status_code == 421
