"""What the server refuses, and that every error has the one shape of RFC 9457."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from t2.registry.server.app import OPERATIONS
from t2.registry.server.examples import DETAILS
from t2.registry.server.problems import TITLES, Problem
from tests.registry.samples import expert_bytes
from tests.registry.serving import BINARY, embedded, upload

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with embedded(tmp_path_factory.mktemp("errors")) as (_, client):
        upload(client)
        yield client


def problem(answer: Any, status: int) -> Problem:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    told = Problem.model_validate_json(answer.content)
    assert told.status == status
    assert (told.code, told.title) == TITLES[status]
    assert told.type == f"urn:t2:problem:{told.code}"
    assert told.request_id == answer.headers["x-request-id"]
    assert "\n" not in told.detail
    return told


@pytest.mark.parametrize(
    ("method", "address", "options", "status", "says"),
    [
        ("GET", "/nowhere", {}, 404, "/nowhere"),
        ("GET", "/v1/experts/", {}, 404, "/v1/openapi.json"),
        ("GET", "/v1/experts/team/nobody", {}, 404, "no expert team/nobody"),
        ("GET", "/v1/experts/team/math/versions/9", {}, 404, "no version 9"),
        ("GET", "/v1/resolve?reference=team/math@prod", {}, 404, "no alias prod"),
        ("GET", "/v1/lineage/xyz", {}, 404, "64 hex digits"),
        ("GET", "/v1/base-models/xyz", {}, 404, "xyz"),
        ("PUT", "/v1/experts", {}, 405, "PUT"),
        ("GET", "/v1/experts?limi=3", {}, 422, "did you mean 'limit'?"),
        ("GET", "/v1/experts?limit=3&limit=4", {}, 422, "query.limit: it is given twice"),
        ("GET", "/v1/experts/team/math?limit=3", {}, 422, "query.limit: there is no such parameter"),
        ("GET", "/v1/experts?limit=0", {}, 422, "query.limit"),
        ("GET", "/v1/experts?limit=201", {}, 422, "200"),
        ("GET", "/v1/experts?kind=adapter", {}, 422, "query.kind"),
        ("GET", "/v1/experts?text=%00", {}, 422, "NUL"),
        ("GET", "/v1/experts?cursor=abc", {}, 422, "begin again without one"),
        ("GET", "/v1/experts?metric=score", {}, 422, "query.metric"),
        ("GET", "/v1/experts?metric=score:1e999:", {}, 422, "NAME:MIN:MAX"),
        ("GET", "/v1/experts/Team/math", {}, 422, "path.namespace"),
        ("GET", "/v1/experts/team/a..b", {}, 422, "not an expert's name"),
        ("GET", "/v1/experts/team/math/versions/0", {}, 422, "path.number"),
        ("GET", "/v1/experts/team/math/versions/99999999999999999999", {}, 422, "path.number"),
        ("GET", "/v1/resolve?reference=a/b/c", {}, 422, "not an expert's name"),
        ("POST", "/v1/namespaces", {"json": {"name": "x", "descripton": "y"}}, 422, "did you mean 'description'?"),
        ("POST", "/v1/namespaces", {"json": {"description": "y"}}, 422, "body.name: Field required"),
        ("POST", "/v1/namespaces", {"json": ["x"]}, 422, "body"),
        ("POST", "/v1/namespaces", {"json": {"name": 3}}, 422, "body.name"),
        ("POST", "/v1/namespaces", {"content": b"{", "headers": JSON}, 422, "it is not JSON"),
        ("POST", "/v1/namespaces", {"content": b"", "headers": JSON}, 422, "body: Field required"),
        ("POST", "/v1/namespaces", {"content": b"\xff", "headers": JSON}, 400, "body"),
        ("POST", "/v1/namespaces", {"content": b"[" * 100_000, "headers": JSON}, 400, "body"),
        ("POST", "/v1/namespaces", {"content": b'{"name":"x"}'}, 415, "application/json"),
        ("POST", "/v1/namespaces", {"json": {"name": "team"}}, 409, "exists already"),
        ("PATCH", "/v1/experts/team/math", {"json": {"description": "\x00"}}, 422, "body.description"),
        ("PATCH", "/v1/experts/team/math", {"json": {"description": "x" * 4001}}, 422, "4000"),
        (
            "PATCH",
            "/v1/experts/team/math/versions/1/metrics",
            {"content": b'{"a": NaN}', "headers": JSON},
            422,
            "finite",
        ),
        ("PATCH", "/v1/experts/team/math/versions/1/metrics", {"json": {"": 1}}, 422, "pattern"),
        ("PUT", "/v1/experts/team/math/aliases/Prod", {"json": {"version": 1}}, 422, "path.alias"),
        ("PUT", "/v1/experts/team/math/aliases/prod", {"json": {"version": 7}}, 404, "no version 7"),
        ("POST", "/v1/tokens", {"json": {"name": "x", "scopes": ["root"]}}, 422, "body.scopes.0"),
        ("POST", "/v1/experts/team/math/versions", {"content": b"x", "headers": BINARY}, 422, "not a valid expert"),
        ("POST", "/v1/experts/team/math/versions", {"content": b"x"}, 415, "application/octet-stream"),
        ("POST", "/v1/experts/team/math/versions", {"content": b"", "headers": BINARY}, 422, "not a valid expert"),
        (
            "POST",
            "/v1/experts/team/math/versions",
            {"content": expert_bytes(1), "headers": {**BINARY, "Content-Encoding": "gzip"}},
            415,
            "compressed",
        ),
        (
            "POST",
            "/v1/experts/team/math/versions",
            {"content": expert_bytes(1), "headers": {**BINARY, "Idempotency-Key": "a b"}},
            422,
            "header.idempotency-key",
        ),
    ],
)
def test_each_mistake_has_its_status_and_says_what_is_wrong(
    client: TestClient, method: str, address: str, options: dict[str, Any], status: int, says: str
) -> None:
    assert says in problem(client.request(method, address, **options), status).detail


def test_an_upload_repeated_under_its_key_does_nothing_more(client: TestClient) -> None:
    path, data = "/v1/experts/team/repeated/versions", expert_bytes(7)
    headers = {**BINARY, "Idempotency-Key": "0b1f7c52"}
    first = client.post(path, content=data, headers=headers)
    assert (first.status_code, first.json()["created"]) == (201, True)
    again = client.post(path, content=data, headers=headers)
    assert again.status_code in (200, 201)
    assert again.json()["version"] == 1
    same = client.post(path, content=data, headers=BINARY)
    assert (same.status_code, same.json()["created"]) == (200, False)
    assert "another upload" in problem(client.post(path, content=expert_bytes(8), headers=headers), 409).detail
    assert len(client.get(path).json()["items"]) == 1


def test_several_mistakes_are_told_together(client: TestClient) -> None:
    told = problem(client.get("/v1/experts?limit=0&kind=x&deleted=maybe"), 422)
    assert told.errors is not None
    assert [fault.where for fault in told.errors] == ["query.kind", "query.deleted", "query.limit"]
    assert told.detail.endswith("(and 2 more)")


def test_a_defect_is_told_without_details_and_logged_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with embedded(tmp_path) as (service, client):
        monkeypatch.setattr(type(service), "list_namespaces", lambda *_, **__: 1 / 0)
        told = problem(client.get("/v1/namespaces"), 500)
        assert "division" not in json.dumps(told.model_dump())
        assert told.request_id in told.detail
    (record,) = [each for each in caplog.records if each.name == "t2.registry" and each.levelname == "ERROR"]
    assert told.request_id in record.getMessage()
    assert record.exc_info is not None


def test_the_method_that_is_possible_is_told(client: TestClient) -> None:
    assert "GET" in client.put("/v1/versions").headers["allow"]


def test_every_status_has_a_code_a_title_and_an_example() -> None:
    assert TITLES.keys() == DETAILS.keys()
    assert len({code for code, _ in TITLES.values()}) == len(TITLES)
    assert {status for each in OPERATIONS for status in each.errors} <= TITLES.keys()
