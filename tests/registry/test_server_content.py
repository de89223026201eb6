"""Downloads over HTTP: ranges, conditions, headers, presigned URLs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import update
from starlette.testclient import TestClient

from t2.core.digests import sha256
from t2.registry.blobs.s3 import Credentials, S3Blobs
from t2.registry.db import models
from t2.registry.server import content
from t2.registry.services.service import Service
from tests.registry.samples import expert_bytes, run_bytes
from tests.registry.servers import S3
from tests.registry.serving import BINARY, client_of, embedded, upload

DATA = expert_bytes()
DIGEST = sha256(DATA)
BLOB = f"/v1/blobs/{DIGEST}"
VERSION = "/v1/experts/team/math/versions/1/content"
SIZE = len(DATA)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with embedded(tmp_path) as (_, client):
        upload(client)
        yield client


def test_samples_are_a_download_too(client: TestClient) -> None:
    data = run_bytes()
    run = client.post("/v1/runs/team", content=data, headers=BINARY)
    assert (run.status_code, client.post("/v1/runs/team", content=data, headers=BINARY).status_code) == (201, 200)
    samples = data.partition(b"\n")[2]
    digest = run.json()["samples_digest"]
    address = f"/v1/runs/team/{run.json()['digest']}/samples"
    for path, name in ((address, f"team-{run.json()['digest']}"), (f"/v1/blobs/{digest}", digest)):
        answer = client.get(path)
        assert (answer.status_code, answer.content) == (200, samples)
        assert answer.headers["etag"] == f'"{digest}"'
        assert answer.headers["content-disposition"] == f'attachment; filename="{name}.jsonl"'
    part = client.get(address, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, samples[10:20])
    assert client.get(address, headers={"If-None-Match": f'"{digest}"'}).status_code == 304
    assert client.head(address).headers["content-length"] == str(len(samples))


@pytest.mark.parametrize(
    ("address", "filename", "caching"),
    [
        (BLOB, f"{DIGEST}.safetensors", "private, max-age=31536000, immutable"),
        (VERSION, "team-math-1.safetensors", "private, no-cache"),
    ],
)
def test_a_download_is_the_file_and_says_how_to_keep_it(
    client: TestClient, address: str, filename: str, caching: str
) -> None:
    answer = client.get(address)
    assert answer.status_code == 200
    assert answer.content == DATA
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-length"] == str(SIZE)
    assert answer.headers["etag"] == f'"{DIGEST}"'
    assert answer.headers["cache-control"] == caching
    assert answer.headers["content-disposition"] == f'attachment; filename="{filename}"'
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "content-encoding" not in answer.headers
    head = client.head(address)
    assert head.status_code == 200
    assert head.content == b""
    assert {name: head.headers[name] for name in ("etag", "content-length", "accept-ranges")} == {
        name: answer.headers[name] for name in ("etag", "content-length", "accept-ranges")
    }


@pytest.mark.parametrize("tag", [f'"{DIGEST}"', f'W/"{DIGEST}"', f'"other", "{DIGEST}"', "*"])
def test_what_the_client_has_is_not_sent_again(client: TestClient, tag: str) -> None:
    answer = client.get(BLOB, headers={"If-None-Match": tag})
    assert answer.status_code == 304
    assert answer.content == b""
    assert answer.headers["etag"] == f'"{DIGEST}"'


def test_another_tag_is_another_content(client: TestClient) -> None:
    assert client.get(BLOB, headers={"If-None-Match": f'"{"0" * 64}"'}).status_code == 200


@pytest.mark.parametrize(
    ("wanted", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=10-19", 10, 19),
        ("bytes=10-", 10, SIZE - 1),
        ("bytes=-7", SIZE - 7, SIZE - 1),
        (f"bytes=-{SIZE * 2}", 0, SIZE - 1),
        (f"bytes=5-{SIZE * 10}", 5, SIZE - 1),
    ],
)
def test_one_range_is_sent(client: TestClient, wanted: str, first: int, last: int) -> None:
    answer = client.get(BLOB, headers={"Range": wanted})
    assert answer.status_code == 206
    assert answer.content == DATA[first : last + 1]
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{SIZE}"


@pytest.mark.parametrize(
    "wanted",
    ["bytes=0-1,4-5", "bytes=0-,0-,0-", "bytes=5-2", "bytes=", "bytes=a-b", "lines=1-2", "bytes=-", "bytes=0-1,"],
)
def test_other_ranges_are_passed_over(client: TestClient, wanted: str) -> None:
    answer = client.get(BLOB, headers={"Range": wanted})
    assert answer.status_code == 200
    assert answer.content == DATA


@pytest.mark.parametrize("wanted", [f"bytes={SIZE}-", "bytes=-0", "bytes=9999999999999999999-"])
def test_a_range_outside_of_the_content_is_refused(client: TestClient, wanted: str) -> None:
    answer = client.get(BLOB, headers={"Range": wanted})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{SIZE}"
    assert answer.json()["code"] == "range-not-satisfiable"


def test_a_range_of_a_content_that_changed_is_not_sent(client: TestClient) -> None:
    same = client.get(BLOB, headers={"Range": "bytes=0-1", "If-Range": f'"{DIGEST}"'})
    assert same.status_code == 206
    for other in ('"other"', f'W/"{DIGEST}"', "Wed, 21 Oct 2026 07:28:00 GMT"):
        assert client.get(BLOB, headers={"Range": "bytes=0-1", "If-Range": other}).status_code == 200


def test_a_deleted_content_is_gone_until_it_is_restored(client: TestClient) -> None:
    assert client.delete("/v1/experts/team/math").status_code == 204
    for address in (BLOB, VERSION):
        assert client.get(address, headers={"If-None-Match": "*"}).status_code == 404
    assert client.post("/v1/experts/team/math/restore").status_code == 204
    assert client.get(BLOB).content == DATA


def test_damaged_bytes_are_not_served(tmp_path: Path) -> None:
    with embedded(tmp_path) as (service, client):
        upload(client)
        (blob,) = Path(service.store.location).glob(f"*/{DIGEST}")
        for damage in (DATA[:-1], DATA[:-1] + bytes([DATA[-1] ^ 1]), None):
            if damage is None:
                blob.unlink()
            else:
                blob.write_bytes(damage)
            answer = client.get(BLOB)
            assert answer.status_code == 500
            assert answer.json()["code"] == "internal-error"
            assert str(tmp_path) not in answer.text


def test_a_large_file_is_sent_in_parts_and_memory_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "CHUNK_BYTES", 100)
    with embedded(tmp_path) as (_, client):
        upload(client)
        for _ in range(3):
            assert client.get(BLOB).content == DATA
        assert client.get(BLOB, headers={"Range": "bytes=50-349"}).content == DATA[50:350]
        assert client.app.state.memory.used == 0  # type: ignore[attr-defined]


def test_downloads_go_to_the_store_where_that_is_set(tmp_path: Path, s3_server: S3) -> None:
    with embedded(tmp_path) as (service, _):
        credentials = Credentials(s3_server.access_key, s3_server.secret_key)
        store = S3Blobs(s3_server.bucket(), endpoint=s3_server.endpoint, credentials=credentials)
        with client_of(Service(service.database, store, service.actor), presign=True) as client:
            upload(client)
            for address in (BLOB, VERSION):
                answer = client.get(address)
                assert answer.status_code == 307
                assert answer.headers["cache-control"] == "no-store"
                assert answer.headers["location"].startswith(s3_server.endpoint)
                assert s3_server.secret_key not in answer.headers["location"]
                assert client.head(address).headers["content-length"] == str(SIZE)
                assert client.get(address, headers={"If-None-Match": f'"{DIGEST}"'}).status_code == 304


def test_a_file_of_another_size_than_its_row_says_is_not_served(tmp_path: Path) -> None:
    with embedded(tmp_path) as (service, client):
        upload(client)
        with service.database.write() as session:
            session.execute(update(models.Blob).values(size=SIZE - 1))
        assert client.get(BLOB).status_code == 500
        assert client.get(BLOB, headers={"Range": "bytes=0-9"}).status_code == 500
