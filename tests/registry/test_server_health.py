"""What machines watch: health, readiness during faults, metrics, the log."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from t2.core.errors import UnavailableError
from t2.registry.blobs.local import LocalBlobs
from t2.registry.db import migrate
from t2.registry.db.database import Database
from t2.registry.server import health
from t2.registry.services.actor import Actor
from t2.registry.services.service import Service
from tests.registry.serving import bearer, client_of, embedded, eventually, token, upload


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Service, TestClient]]:
    monkeypatch.setattr(health, "FRESH_SECONDS", 0.0)
    with embedded(tmp_path) as pair:
        yield pair


def values(client: TestClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = client.get("/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_server_that_works_says_so(registry: tuple[Service, TestClient]) -> None:
    _, client = registry
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}


def test_readiness_names_the_store_when_it_fails_and_recovers_with_it(
    registry: tuple[Service, TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, client = registry
    broken = True

    def check(_: LocalBlobs) -> None:
        if broken:
            raise UnavailableError("the store s3://secret-bucket does not answer")

    monkeypatch.setattr(LocalBlobs, "check", check)
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["detail"] == "store: it cannot be reached or used"
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["retry-after"]
    assert client.get("/healthz").status_code == 200
    broken = False
    assert client.get("/readyz").status_code == 200


def test_readiness_does_not_wait_for_a_store_that_hangs(
    registry: tuple[Service, TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, client = registry
    wait = threading.Event()
    monkeypatch.setattr(health, "CHECK_SECONDS", 0.1)
    monkeypatch.setattr(LocalBlobs, "check", lambda _: wait.wait(30))
    for _ in range(6):  # more than there are threads for it
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert "store: " in answer.json()["detail"]
        assert client.get("/healthz").status_code == 200
    wait.set()
    eventually(lambda: client.get("/readyz").status_code == 200)


def test_readiness_names_the_database(postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(health, "CHECK_SECONDS", 30.0)
    database = Database(postgres_url)
    migrate.migrate(database)
    service = Service(database, LocalBlobs(tmp_path), Actor("cli", "test"))
    with client_of(service) as client:
        assert client.get("/readyz").status_code == 200
        migrate.migrate(database, migrate.revisions()[0])
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()["detail"]) == (503, "database: its schema is not this server's")
        migrate.migrate(database)
        assert client.get("/readyz").status_code == 200
        with monkeypatch.context() as patch:
            elsewhere = Database("postgresql://nobody:hunter2@127.0.0.1:1/none", timeout=1)
            patch.setattr(database, "engine", elsewhere.engine)
            answer = client.get("/readyz")
            assert (answer.status_code, answer.json()["detail"]) == (503, "database: it cannot be reached or used")
        assert client.get("/readyz").status_code == 200


def test_readiness_is_not_a_way_to_load_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[None] = []
    monkeypatch.setattr(LocalBlobs, "check", lambda _: asked.append(None))
    monkeypatch.setattr(health, "CHECK_SECONDS", 30.0)
    assert 0 < health.FRESH_SECONDS <= 1
    for fresh, looks in ((3600.0, 1), (0.0, 10)):
        monkeypatch.setattr(health, "FRESH_SECONDS", fresh)
        asked.clear()
        with embedded(tmp_path) as (_, client):
            for _ in range(10):
                assert client.get("/readyz").status_code == 200
        assert len(asked) == looks


def test_metrics_count_requests_by_route_and_never_by_name(registry: tuple[Service, TestClient]) -> None:
    _, client = registry
    version = upload(client, "team/secret-name")
    client.get("/v1/experts/team/secret-name")
    client.get("/v1/experts/team/absent-name")
    client.get(f"/v1/blobs/{version['digest']}")
    client.get("/nowhere/at-all")
    client.request("BREW", "/v1/experts")
    counted = values(client)

    def requests(method: str, route: str, status: str) -> float:
        labels = (("method", method), ("route", route), ("status", status))
        return counted.get(("t2_registry_requests_total", labels), 0)

    assert requests("GET", "/v1/experts/{namespace}/{name}", "200") == 1
    assert requests("GET", "/v1/experts/{namespace}/{name}", "404") == 1
    assert requests("GET", "unknown", "404") == 1
    assert requests("other", "/v1/experts", "405") == 1
    assert counted["t2_registry_uploads_total", ()] == 1
    assert counted["t2_registry_uploaded_bytes_total", ()] == version["size"]
    assert counted["t2_registry_downloaded_bytes_total", ()] == version["size"]
    assert counted["t2_registry_requests_running", ()] == 1  # the one that asks
    text = client.get("/metrics").text
    assert "secret-name" not in text
    assert "at-all" not in text
    assert "BREW" not in text
    assert client.get("/metrics").headers["content-type"].startswith("text/plain")


def test_two_applications_count_apart(tmp_path: Path) -> None:
    with embedded(tmp_path / "a") as (_, first), embedded(tmp_path / "b") as (_, second):
        upload(first)
        assert values(first)["t2_registry_uploads_total", ()] == 1
        assert values(second)["t2_registry_uploads_total", ()] == 0


def test_the_log_tells_each_request_without_its_query_and_in_one_line(
    registry: tuple[Service, TestClient], caplog: pytest.LogCaptureFixture
) -> None:
    service, client = registry
    caplog.set_level(logging.INFO)
    mine = token(service, "read")
    answer = client.get("/v1/experts?text=private", headers=mine)
    client.get("/v1/experts/a%0aFAKE%20LINE/b%1b", headers=mine)
    client.get("/v1/experts", headers=bearer("t2r_" + "ab" * 36))
    lines = [record.getMessage() for record in caplog.records if record.name == "t2.registry.access"]
    assert len(lines) == 3
    assert lines[0].startswith(f"{answer.headers['x-request-id']} GET /v1/experts 200 ")
    assert lines[0].endswith(" read")
    assert lines[2].split()[-1] == "-"
    everything = "\n".join(
        record.getMessage() for record in caplog.records if record.name.startswith(("t2.", "uvicorn"))
    )
    assert "private" not in everything
    assert "ab" * 36 not in everything
    assert all(line.isprintable() for line in lines)
