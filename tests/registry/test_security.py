"""One test a class of what went wrong in other registries of models; the CVE numbers are those of MLflow's.

Rules that have tests of their own: scopes, expiry, revocation and Host in ``test_server_access.py``, bodies that are
not read on in ``test_server_limits.py``, ranges in ``test_server_content.py``, what the log holds in
``test_server_health.py``, and messages of a server that starts in ``test_serve.py``.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import socket
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from t2.core.digests import sha256
from t2.registry.blobs.s3 import Credentials, S3Blobs
from t2.registry.db.database import Database
from t2.registry.schemas import MAX_PAGE
from t2.registry.server.app import OPERATIONS, create_app
from t2.registry.services.actor import Actor
from t2.registry.services.service import Service
from t2.registry.settings import ServerSettings
from tests.registry.samples import expert_bytes
from tests.registry.serving import BINARY, bearer, client_of, embedded, token, upload

VERSIONS = "/v1/experts/team/math/versions"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[tuple[Service, TestClient]]:
    with embedded(tmp_path) as pair:
        yield pair


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


TRAVERSALS = [
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "%252e%252e%252fetc%252fpasswd",
    "..%5c..%5cwindows%5cwin.ini",
    "%2fetc%2fpasswd",
    "file:%2f%2f%2fetc%2fpasswd",
    "C:%5cwindows",
    "a..%2fb",
    "..",
    "x%00.safetensors",
    "x%23%2f..%2f..%2fetc",
    "x;%2f..%2f..%2fetc",
    "x%3f%2f..%2f..",
    "%ef%bc%8e%ef%bc%8e%ef%bc%8fetc",
    "~root",
    "$HOME",
    "con%20",
    ".hidden",
    "-rf",
]


@pytest.mark.parametrize("name", TRAVERSALS)
def test_no_address_is_a_path(registry: tuple[Service, TestClient], tmp_path: Path, name: str) -> None:
    # Reading: CVE-2023-1177, CVE-2023-2356, CVE-2023-2780 (backslashes), CVE-2023-6909, CVE-2023-6977, CVE-2024-1483,
    # CVE-2024-1558, CVE-2024-1593 (";"), CVE-2024-1594, CVE-2024-2928 and CVE-2024-3848 (fragments).
    # Deleting and writing: CVE-2023-6753, CVE-2023-6831, CVE-2023-6975, CVE-2024-1560 (decoded twice).
    service, client = registry
    upload(client)
    before = files(tmp_path)
    for path in (
        f"/v1/blobs/{name}",
        f"/v1/experts/{name}/math/versions/1/content",
        f"/v1/experts/team/{name}/versions/1/content",
        f"/v1/experts/team/math/versions/{name}/content",
        f"/v1/lineage/{name}",
        f"/{name}",
        f"/v1/{name}",
    ):
        assert client.get(path).status_code in (404, 405, 422), path
        assert client.delete(path).status_code in (404, 405, 422), path
    for expert in (f"{name}/math", f"team/{name}"):
        path = f"/v1/experts/{expert}/versions"
        assert client.post(path, content=expert_bytes(1), headers=BINARY).status_code in (404, 405, 422), path
    assert files(tmp_path) == before
    assert [each.name for each in service.list_experts().items] == ["team/math"]


def test_what_is_stored_lies_under_its_digest_whatever_it_is_called(
    registry: tuple[Service, TestClient], tmp_path: Path
) -> None:
    # CVE-2023-6015, CVE-2023-6018, CVE-2023-6976, CVE-2025-11201: files written where, and called as, an upload says.
    service, client = registry
    data = expert_bytes(0, name="../../../../tmp/evil", task="../../x", domain="/etc/cron.d/x")
    path = f"{VERSIONS}?description=../../evil"
    assert client.post(path, content=data, headers={**BINARY, "Content-Disposition": "x"}).status_code == 201
    blobs = Path(service.store.location)
    assert {file for file in files(blobs) if file != "probe"} == {f"{sha256(data)[:2]}/{sha256(data)}"}
    assert not (tmp_path.parent / "evil").exists()


def test_a_download_cannot_be_named_by_who_uploads(registry: tuple[Service, TestClient]) -> None:
    _, client = registry
    data = expert_bytes(0, name='x"; filename="evil.exe')
    assert client.post(VERSIONS, content=data, headers=BINARY).status_code == 201
    header = client.get(f"{VERSIONS}/1/content").headers["content-disposition"]
    assert header == 'attachment; filename="team-math-1.safetensors"'


SCRIPT = "<script>alert(1)</script>"


def test_no_answer_is_a_page_that_runs(registry: tuple[Service, TestClient]) -> None:
    # CVE-2023-6568 (an error that repeats a header), CVE-2024-27132 and CVE-2024-27133 (recipes and data sets shown).
    _, client = registry
    data = expert_bytes(0, name=SCRIPT, task=SCRIPT, domain=SCRIPT, training={"note": SCRIPT})
    assert client.post(VERSIONS, content=data, headers=BINARY, params={"description": SCRIPT}).status_code == 201
    client.patch("/v1/experts/team/math", json={"description": SCRIPT})
    answers = [
        client.get(f"{VERSIONS}/1"),
        client.get(f"{VERSIONS}/1/content"),
        client.get("/v1/experts"),
        client.get(f"/v1/experts/{SCRIPT}"),
        client.get(f"/{SCRIPT}"),
        client.get("/v1/experts", params={SCRIPT: SCRIPT}),
        client.post(VERSIONS, content=b"x", headers={"Content-Type": f"text/html{SCRIPT}"}),
        client.post("/v1/namespaces", json={SCRIPT: 1}),
        client.request(SCRIPT.replace("/", ""), "/v1/experts"),
        client.get("/healthz"),
        client.get("/metrics"),
    ]
    for answer in answers:
        kind = answer.headers["content-type"].partition(";")[0]
        assert kind in ("application/json", "application/problem+json", "application/octet-stream", "text/plain")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
        if kind == "application/octet-stream":
            assert answer.headers["content-disposition"].startswith("attachment")
    assert SCRIPT not in client.get("/metrics").text


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_uploaded_is_ever_run(registry: tuple[Service, TestClient], tmp_path: Path) -> None:
    # CVE-2024-37052 to CVE-2024-37061: models whose loading runs what they hold; CVE-2023-6940: configurations.
    _, client = registry
    target = tmp_path / "ran"
    bomb = pickle.dumps(Bomb(target))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", bomb)
    good = expert_bytes(0)
    size = struct.unpack("<Q", good[:8])[0]
    yaml = b"!!python/object/apply:os.mkdir ['" + str(target).encode() + b"']"
    for data in (bomb, archive.getvalue(), good + bomb, good[: 8 + size] + bomb, yaml, b"\x80\x04." + good):
        answer = client.post(VERSIONS, content=data, headers=BINARY)
        assert answer.status_code == 422
        assert "is not a valid expert file" in answer.json()["detail"]
    assert not target.exists()
    assert client.get("/v1/experts").json()["items"] == []


def test_the_server_fetches_nothing_that_a_request_names(
    registry: tuple[Service, TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    # CVE-2023-6974, CVE-2025-52967: requests that the server makes for whoever asks.
    _, client = registry
    upload(client)
    asked: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address))
    url = "http://169.254.169.254/latest/meta-data"
    for data in (expert_bytes(1, task=url, training={"source": url}), json.dumps({"source": url}).encode()):
        client.post(VERSIONS, content=data, headers=BINARY, params={"description": url})
    client.post(VERSIONS, params={"source": url}, content=expert_bytes(2), headers=BINARY)
    client.get("/v1/resolve", params={"reference": url})
    client.get("/v1/experts", params={"base": url, "text": url})
    client.put(f"/v1/base-models/{'a' * 64}", json={"id": url, "targets": {"x": 1}})
    client.get("/v1/experts", headers={"X-Forwarded-Host": "evil", "X-Original-URL": url, "Forwarded": f"for={url}"})
    assert asked == []


def test_there_are_no_accounts_to_sign_up_for_and_no_passwords() -> None:
    # CVE-2023-6014, CVE-2025-1473 (signing up), CVE-2025-1474, CVE-2025-11200 (empty and weak passwords).
    for operation in OPERATIONS:
        for word in ("signup", "login", "user", "password", "session"):
            assert word not in operation.path
            assert word not in operation.id


def test_tokens_cannot_be_guessed_or_chosen(registry: tuple[Service, TestClient]) -> None:
    service, client = registry
    made = [service.create_token("same", ["read"]).secret for _ in range(3)]
    assert len({secret[4:68] for secret in made}) == 3
    assert all(len(secret) == 76 for secret in made)
    for wrong in (made[0][:-1] + "x", made[0].upper(), made[0][:68], made[0] + "0", "t2r_" + "0" * 64 + made[0][68:]):
        assert client.get("/v1/experts", headers=bearer(wrong)).status_code == 401
    admin = token(service, "admin")
    chosen = {"name": "x", "scopes": ["admin"], "secret": "t2r_mine"}
    assert client.post("/v1/tokens", json=chosen, headers=admin).status_code == 422
    assert "secret" not in client.get("/v1/tokens", headers=admin).text


def test_a_lesser_token_cannot_make_itself_greater(registry: tuple[Service, TestClient]) -> None:
    # CVE-2024-4263: deleting with the right to edit alone.
    service, client = registry
    upload(client)
    writer, reader = token(service, "write"), token(service, "read")
    for headers in (writer, reader):
        for method, path in (("POST", "/v1/tokens"), ("GET", "/v1/tokens"), ("DELETE", "/v1/tokens/1")):
            body = {"name": "x", "scopes": ["admin"]} if method == "POST" else None
            assert client.request(method, path, headers=headers, json=body).status_code == 403
    assert client.delete("/v1/experts/team/math", headers=reader).status_code == 403
    assert client.request("GET", "/v1/audit", headers=writer).status_code == 403
    for spoofed in ({"X-HTTP-Method-Override": "DELETE"}, {"X-Scope": "admin"}, {"X-Forwarded-User": "root"}):
        assert client.get("/v1/tokens", headers={**reader, **spoofed}).status_code == 403
    # A method given in any other way than as the method does nothing.
    client.post("/v1/experts/team/math?_method=DELETE", headers=writer)
    assert client.get("/v1/experts/team/math", headers=reader).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_web_page_cannot_change_a_registry_on_this_machine(
    registry: tuple[Service, TestClient], headers: dict[str, str]
) -> None:
    # CVE-2025-1473, CVE-2025-14279 (with the Host check): pages that a browser shows, and their requests.
    service, client = registry
    upload(client)
    for operation in OPERATIONS:
        if operation.method in ("GET", "HEAD"):
            continue
        path = operation.path.replace("{namespace}", "team").replace("{name}", "math").replace("{number}", "1")
        path = path.replace("{alias}", "x").replace("{fingerprint}", "a" * 64).replace("{id}", "1")
        assert client.request(operation.method, path, headers=headers).status_code == 403, operation.id
    assert client.get("/v1/experts/team/math").status_code == 200
    assert service.list_tokens() == []


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain"])
def test_what_a_form_can_send_is_not_taken(registry: tuple[Service, TestClient], kind: str) -> None:
    _, client = registry
    for path, data in (
        (VERSIONS, expert_bytes(0)),
        ("/v1/namespaces", b'{"name":"x"}'),
        ("/v1/tokens", b'{"name":"x","scopes":["admin"]}'),
    ):
        assert client.post(path, content=data, headers={"Content-Type": kind}).status_code == 415


def test_no_origin_may_read_by_default_and_those_that_may_are_named(tmp_path: Path) -> None:
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "GET"}
    with embedded(tmp_path / "none") as (_, client):
        for answer in (client.get("/v1/experts", headers=asked), client.options("/v1/experts", headers=asked)):
            assert not [name for name in answer.headers if name.startswith("access-control")]
        assert client.options("/v1/experts", headers=asked).status_code == 405
    with embedded(tmp_path / "one", cors_origins=("https://page.example",)) as (_, client):
        for method in ("GET", "OPTIONS"):
            answer = client.request(method, "/v1/experts", headers=asked)
            assert answer.is_success
            assert answer.headers["access-control-allow-origin"] == "https://page.example"
            assert answer.headers["vary"] == "Origin"
            assert "access-control-allow-credentials" not in answer.headers
            assert answer.headers["access-control-allow-methods"] == "GET, HEAD"
            other = client.request(method, "/v1/experts", headers={**asked, "Origin": "https://page.example.evil"})
            assert "access-control-allow-origin" not in other.headers
        assert client.post(VERSIONS, content=expert_bytes(0), headers={**BINARY, **asked}).status_code == 403


def test_no_request_costs_more_than_its_limit(registry: tuple[Service, TestClient]) -> None:
    # CVE-2025-0453 (batches in one request), CVE-2024-6838 (names without a limit).
    _, client = registry
    upload(client)
    assert client.get(f"/v1/experts?limit={MAX_PAGE + 1}").status_code == 422
    assert client.get("/v1/experts?" + "&".join("tag=a" for _ in range(11))).status_code == 422
    assert client.get("/v1/experts?" + "&".join("metric=a:1:" for _ in range(6))).status_code == 422
    assert client.post("/v1/graphql", json={"query": "{a}"}).status_code == 404
    for name in ("a" * 65, "a" * 5000):
        assert client.post("/v1/namespaces", json={"name": name}).status_code == 422
        assert client.post(f"/v1/experts/team/{name}/versions", content=b"", headers=BINARY).status_code == 422
        answer = client.post("/v1/tokens", json={"name": name, "scopes": ["read"]})
        assert answer.status_code == 422
    assert client.post("/v1/experts/team/math/tags", json={"add": [f"t{i}" for i in range(51)]}).status_code == 422
    assert client.patch("/v1/experts/team/math", json={"description": "x" * 4001}).status_code == 422
    metrics = {f"m{i}": 1.0 for i in range(101)}
    assert client.patch(f"{VERSIONS}/1/metrics", json=metrics).status_code == 422
    assert client.get(f"{VERSIONS}/1/content", headers={"Range": "bytes=" + ",".join(["0-"] * 1000)}).status_code == 200


@pytest.mark.parametrize(
    "text",
    ["a" * 64 + "!", "-" * 63 + "A", "a." * 32, "@" * 300, "a@" + "a" * 290, "a/" * 150, "a@sha256:" + "f" * 280],
)
def test_no_text_makes_a_pattern_run_away(registry: tuple[Service, TestClient], text: str) -> None:
    _, client = registry
    # One that backtracks would not end.
    assert client.get("/v1/resolve", params={"reference": text}).status_code == 422
    assert client.get("/v1/experts", params={"metric": text, "tag": text}).status_code == 422
    assert client.get("/v1/blobs/x", headers={"Range": f"bytes={text}", "If-None-Match": text}).status_code == 404
    assert client.get("/v1/experts", headers={"Host": text}).status_code == 421


def test_answers_are_never_compressed_and_compressed_uploads_are_not_taken(
    registry: tuple[Service, TestClient],
) -> None:
    _, client = registry
    version = upload(client)
    for path in ("/v1/experts", f"/v1/blobs/{version['digest']}", "/v1/openapi.json", "/metrics"):
        answer = client.get(path, headers={"Accept-Encoding": "gzip, br, zstd, deflate"})
        assert "content-encoding" not in answer.headers
    for kind in ("gzip", "br", "zstd", "gzip, gzip"):
        headers = {**BINARY, "Content-Encoding": kind}
        assert client.post(VERSIONS, content=expert_bytes(1), headers=headers).status_code == 415
        headers = {"Content-Type": "application/json", "Content-Encoding": kind}
        assert client.post("/v1/namespaces", content=b"{}", headers=headers).status_code == 415


def test_secrets_are_in_no_answer_and_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    settings = ServerSettings(
        database_url=SecretStr("postgresql://t2:hunter2@127.0.0.1:1/registry"),
        s3_access_key=SecretStr("AKIDEXAMPLE"),
        s3_secret_key=SecretStr("s3cr3t-key"),
        s3_endpoint="http://127.0.0.1:1",
    )
    database = Database("postgresql://t2:hunter2@127.0.0.1:1/registry", timeout=1)
    store = S3Blobs("bucket", endpoint="http://127.0.0.1:1", credentials=Credentials("AKIDEXAMPLE", "s3cr3t-key"))
    secret = "t2r_" + "5ec" * 24
    said = [repr(settings), str(settings), repr(store), repr(database), str(settings.model_dump())]
    service = Service(database, store, Actor("cli", "test"))
    with TestClient(
        create_app(service, settings), base_url="http://localhost", raise_server_exceptions=False
    ) as client:
        for path in ("/readyz", "/v1/experts", "/v1/blobs/" + "0" * 64, "/metrics", "/v1/openapi.json"):
            answer = client.get(path, headers=bearer(secret))
            said += [answer.text, str(answer.headers)]
        said.append(client.get("/readyz").text)
        said.append(client.get("/v1/experts").text)
    with embedded(tmp_path) as (embedded_service, client):
        admin = embedded_service.create_token("admin", ["admin"]).secret
        said += [client.get(path, headers=bearer(admin)).text for path in ("/v1/tokens", "/v1/audit", "/nowhere")]
        said.append(client.get("/v1/experts", headers={"Authorization": f"Basic {admin}"}).text)
        said.append(client.get(f"/v1/experts?token={admin}", headers=bearer(admin)).text)
    with client_of(Service(Database(f"sqlite:///{tmp_path / 'none.db'}"), store, Actor("cli", "x"))) as client:
        said.append(client.get("/v1/experts").text)
    said += [record.getMessage() + str(record.exc_info) for record in caplog.records if record.name.startswith("t2.")]
    everything = "\n".join(said)
    for word in ("hunter2", "s3cr3t-key", secret, admin):
        assert word not in everything
    # Nor does an answer name hosts or folders of the server.
    assert "127.0.0.1:1" not in "".join(answer for answer in said if '"code":"unavailable"' in answer)
