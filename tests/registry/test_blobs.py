"""The blob stores keep what they are given, under its digest: a folder and a bucket do the same."""

from __future__ import annotations

import base64
import hashlib
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from t2.core import files
from t2.core.digests import sha256
from t2.core.errors import ArgumentError, NotFoundError, RegistryError, UnavailableError
from t2.core.files import sync_folder
from t2.registry.blobs import local, s3
from t2.registry.blobs.base import BlobStore
from t2.registry.blobs.local import LocalBlobs
from t2.registry.blobs.s3 import Credentials, S3Blobs
from t2.registry.open import open_blobs
from t2.registry.settings import load_settings
from tests.registry.faults import Faults, store_proxy
from tests.registry.servers import S3, free_port

DATA = os.urandom(5000)
DIGEST = sha256(DATA)


class Case:
    """A store, and a way to what lies in it that is not the store's."""

    def __init__(self, store: BlobStore, read: Callable[[str], bytes], write: Callable[[str, bytes], object]) -> None:
        self.store = store
        self.read = read
        self.write = write

    @staticmethod
    def key(digest: str) -> str:
        return f"{digest[:2]}/{digest}"


def s3_blobs(server: S3, bucket: str, prefix: str = "") -> S3Blobs:
    credentials = Credentials(server.access_key, server.secret_key)
    return S3Blobs(bucket, prefix, endpoint=server.endpoint, credentials=credentials)


def listed(store: BlobStore) -> list[str]:
    return [info.digest for info in store.list()]


@pytest.fixture(params=["folder", "bucket", "bucket with prefix"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    folder = tmp_path / "blobs"
    if request.param == "folder":

        def write(key: str, data: bytes) -> None:
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(data)

        return Case(LocalBlobs(folder), lambda key: (folder / key).read_bytes(), write)
    server: S3 = request.getfixturevalue("s3_server")
    bucket = server.bucket()
    prefix = "team/experts/" if "prefix" in request.param else ""
    client = server.client()
    return Case(
        s3_blobs(server, bucket, prefix),
        lambda key: client.get_object(Bucket=bucket, Key=prefix + key)["Body"].read(),
        lambda key, data: client.put_object(Bucket=bucket, Key=prefix + key, Body=data),
    )


def test_what_is_put_is_there(case: Case) -> None:
    before = datetime.now(UTC) - timedelta(seconds=5)
    assert case.store.info(DIGEST) is None
    assert case.store.put(DIGEST, DATA) is True
    assert case.store.get(DIGEST) == DATA
    info = case.store.info(DIGEST)
    assert info is not None
    assert (info.digest, info.size) == (DIGEST, len(DATA))
    assert before < info.modified < datetime.now(UTC) + timedelta(seconds=5)
    assert case.read(case.key(DIGEST)) == DATA


def test_the_same_bytes_again_change_nothing(case: Case) -> None:
    case.store.put(DIGEST, DATA)
    before = case.store.info(DIGEST)
    assert case.store.put(DIGEST, DATA) is False
    assert case.store.info(DIGEST) == before
    assert [info.digest for info in case.store.list()] == [DIGEST]


def test_bytes_of_a_wrong_size_are_replaced(case: Case) -> None:
    case.store.put(DIGEST, DATA)
    case.write(case.key(DIGEST), DATA[:100])
    assert case.store.put(DIGEST, DATA) is True
    assert case.store.get(DIGEST) == DATA


def test_wrong_bytes_of_the_right_size_are_replaced(case: Case) -> None:
    for wrong in (bytes(len(DATA)), DATA[::-1]):
        case.write(case.key(DIGEST), wrong)
        assert case.store.put(DIGEST, DATA) is True
        assert case.read(case.key(DIGEST)) == DATA
        assert case.store.put(DIGEST, DATA) is False


def test_damaged_bytes_are_never_given_out(case: Case) -> None:
    case.store.put(DIGEST, DATA)
    case.write(case.key(DIGEST), DATA[:-1] + bytes([DATA[-1] ^ 1]))
    with pytest.raises(RegistryError, match=r"damaged.*backup") as caught:
        case.store.get(DIGEST)
    assert caught.value.status == 500


def test_a_blob_that_is_not_there(case: Case) -> None:
    with pytest.raises(NotFoundError, match=DIGEST):
        case.store.get(DIGEST)
    case.store.delete(DIGEST)
    assert list(case.store.list()) == []


def test_delete(case: Case) -> None:
    case.store.put(DIGEST, DATA)
    case.store.delete(DIGEST)
    assert case.store.info(DIGEST) is None
    with pytest.raises(NotFoundError):
        case.store.get(DIGEST)
    assert case.store.put(DIGEST, DATA) is True


def test_the_list_has_every_blob_and_nothing_else(case: Case) -> None:
    blobs = {sha256(data): data for data in (bytes([i]) * (i + 1) for i in range(30))}
    for digest, data in blobs.items():
        case.store.put(digest, data)
    case.store.check()
    case.write("notes.txt", b"not a blob")
    case.write(f"zz/{DIGEST}", b"a blob in a folder that is not its own")
    assert {info.digest: info.size for info in case.store.list()} == {key: len(data) for key, data in blobs.items()}


def test_only_digests_are_keys(case: Case) -> None:
    for name in ("../../etc/passwd", DIGEST.upper(), f"{DIGEST}\n", "", DIGEST[:-1]):
        calls: list[Callable[[], object]] = [
            partial(case.store.put, name, DATA),
            partial(case.store.get, name),
            partial(case.store.info, name),
            partial(case.store.delete, name),
        ]
        for call in calls:
            with pytest.raises(RegistryError, match="is not a digest"):
                call()


def test_many_threads_put_the_same_and_other_bytes(case: Case) -> None:
    blobs = [os.urandom(2000) for _ in range(8)]
    barrier = threading.Barrier(8)

    def put_all(start: int) -> None:
        barrier.wait()
        for i in range(len(blobs)):
            data = blobs[(start + i) % len(blobs)]
            case.store.put(sha256(data), data)
            assert case.store.get(sha256(data)) == data

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put_all, range(8)))
    assert {info.digest for info in case.store.list()} == {sha256(data) for data in blobs}


def test_a_presigned_url_gives_the_bytes_to_anyone_who_has_it(s3_server: S3) -> None:
    store = s3_blobs(s3_server, s3_server.bucket(), "p")
    store.put(DIGEST, DATA)
    url = store.url(DIGEST, 60, 'math"\r\n; evil.safetensors')
    assert url is not None
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == DATA
    assert "attachment%3B%20filename%3D%22math_____evil.safetensors%22" in url
    assert s3_server.secret_key not in url
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(url.replace(DIGEST, sha256(b"another")))
    assert LocalBlobs(Path("unused")).url(DIGEST, 60, "x") is None


def test_more_blobs_than_one_page_of_a_bucket(s3_server: S3) -> None:
    bucket = s3_server.bucket()
    store = s3_blobs(s3_server, bucket)
    digests = {sha256(str(i).encode()) for i in range(1100)}
    for digest in digests:  # as a backup that is copied back
        path = s3_server.folder / bucket / digest[:2] / digest
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    assert {info.digest for info in store.list()} == digests


def test_a_store_that_is_away(s3_server: S3, tmp_path: Path) -> None:
    credentials = Credentials("who", "a-secret-nobody-may-see")
    away = S3Blobs("b", endpoint=f"http://127.0.0.1:{free_port()}", credentials=credentials)
    stranger = S3Blobs(s3_server.bucket(), endpoint=s3_server.endpoint, credentials=credentials)
    nowhere = s3_blobs(s3_server, "no-such-bucket")
    (tmp_path / "file").touch()
    for store in (away, stranger, nowhere, LocalBlobs(tmp_path / "file")):
        calls: list[Callable[[], object]] = [
            store.check,
            partial(store.put, DIGEST, DATA),
            partial(listed, store),
        ]
        for call in calls:
            with pytest.raises(UnavailableError) as caught:
                call()
            assert "secret" not in str(caught.value)
            assert store.location in str(caught.value)
            assert "\n" not in str(caught.value)


def test_the_settings_choose_the_store(s3_server: S3, tmp_path: Path) -> None:
    bucket = s3_server.bucket()
    settings = load_settings(
        blobs=f"s3://{bucket}/a/b/",
        s3_endpoint=s3_server.endpoint,
        s3_access_key=s3_server.access_key,
        s3_secret_key=s3_server.secret_key,
    )
    store = open_blobs(settings)
    store.put(DIGEST, DATA)
    assert store.location == f"s3://{bucket}/a/b"
    path = s3_server.folder / bucket / "a" / "b" / DIGEST[:2] / DIGEST
    assert path.read_bytes() == DATA
    assert open_blobs(load_settings(blobs=str(tmp_path / "x"))).location == str(tmp_path / "x")
    for wrong in ("s3://", "s3:///prefix", "gs://bucket"):
        with pytest.raises(ArgumentError, match="s3://bucket/prefix"):
            open_blobs(load_settings(blobs=wrong))
    with pytest.raises(ArgumentError, match="s3_endpoint"):
        open_blobs(load_settings(blobs="s3://b", s3_endpoint="not a url"))


def test_a_store_that_knows_neither_conditions_nor_checksums(s3_server: S3) -> None:
    refused = []

    def refuse(method: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
        unknown = [name for name in ("If-None-Match", "x-amz-checksum-sha256") if name in headers]
        if unknown:
            refused.append(unknown[0])
        return (501, "NotImplemented") if unknown else None

    with store_proxy(s3_server.endpoint, Faults(), refuse) as endpoint:
        store = S3Blobs(
            s3_server.bucket(), endpoint=endpoint, credentials=Credentials(s3_server.access_key, s3_server.secret_key)
        )
        assert store.put(DIGEST, DATA) is True
        assert store.get(DIGEST) == DATA
        assert set(refused) == {"If-None-Match", "x-amz-checksum-sha256"}
        refused.clear()
        assert store.put(sha256(b"x"), b"x") is True
        assert refused == []


def test_a_store_that_keeps_other_bytes_than_it_gets_acknowledges_nothing(s3_server: S3) -> None:
    bucket, other = s3_server.bucket(), s3_server.client()

    def damage(method: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
        if method != "PUT":
            return None
        other.put_object(Bucket=bucket, Key=f"{DIGEST[:2]}/{DIGEST}", Body=DATA[::-1])
        return 201, "Stored"

    with store_proxy(s3_server.endpoint, Faults(), damage) as endpoint:
        store = S3Blobs(bucket, endpoint=endpoint, credentials=Credentials(s3_server.access_key, s3_server.secret_key))
        with pytest.raises(UnavailableError, match="does not hold the bytes that were just put"):
            store.put(DIGEST, DATA)


@pytest.mark.parametrize("stored", [DATA, DATA[::-1]])
def test_the_checksum_of_a_store_that_keeps_one_spares_the_reading(s3_server: S3, stored: bytes) -> None:
    bucket = s3_server.bucket()
    s3_server.client().put_object(Bucket=bucket, Key=f"{DIGEST[:2]}/{DIGEST}", Body=stored)
    asked: list[str] = []

    def listen(method: str, headers: Mapping[str, str]) -> None:
        asked.append(method)
        assert method != "HEAD" or headers["x-amz-checksum-mode"] == "ENABLED"

    def tell_checksum(parsed: dict[str, object], **_: object) -> None:
        parsed["ChecksumSHA256"] = base64.b64encode(hashlib.sha256(stored).digest()).decode()

    with store_proxy(s3_server.endpoint, Faults(), listen) as endpoint:
        store = S3Blobs(bucket, endpoint=endpoint, credentials=Credentials(s3_server.access_key, s3_server.secret_key))
        store._client.meta.events.register("after-call.s3.HeadObject", tell_checksum)
        assert store.put(DIGEST, DATA) is (stored != DATA)
        assert asked == (["HEAD"] if stored == DATA else ["HEAD", "PUT"])
        assert store.get(DIGEST) == DATA


def test_a_store_that_refuses_to_be_asked_for_checksums_is_read(s3_server: S3) -> None:
    refused = []

    def refuse(method: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
        if "x-amz-checksum-mode" not in headers:
            return None
        refused.append(method)
        return 400, "InvalidArgument"

    with store_proxy(s3_server.endpoint, Faults(), refuse) as endpoint:
        credentials = Credentials(s3_server.access_key, s3_server.secret_key)
        store = S3Blobs(s3_server.bucket(), endpoint=endpoint, credentials=credentials)
        assert store.put(DIGEST, DATA) is True
        assert store.put(DIGEST, DATA) is False
        assert store.info(DIGEST) is not None
        assert 1 <= len(refused) <= 2  # until a request without the header has succeeded


@pytest.mark.parametrize("left", ["whole", "cut", "wrong"])
def test_a_store_that_creates_an_object_once(s3_server: S3, left: str) -> None:
    whole, stored = left == "whole", {"whole": DATA, "cut": DATA[:9], "wrong": DATA[::-1]}[left]
    bucket = s3_server.bucket()
    other = s3_server.client()

    def refuse(method: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
        if method != "PUT" or "If-None-Match" not in headers:
            return None
        # Another writer comes first.
        other.put_object(Bucket=bucket, Key=f"{DIGEST[:2]}/{DIGEST}", Body=stored)
        return 412, "PreconditionFailed"

    with store_proxy(s3_server.endpoint, Faults(), refuse) as endpoint:
        credentials = Credentials(s3_server.access_key, s3_server.secret_key)
        store = S3Blobs(bucket, endpoint=endpoint, credentials=credentials)
        if whole:
            assert store.put(DIGEST, DATA) is False
        else:
            with pytest.raises(UnavailableError, match="try again"):
                store.put(DIGEST, DATA)
            assert store.put(DIGEST, DATA) is True
        assert store.get(DIGEST) == DATA


def test_a_damaged_file_of_the_same_size_is_replaced(tmp_path: Path) -> None:
    store = LocalBlobs(tmp_path)
    data = b"the bytes of an expert"
    digest = sha256(data)
    assert store.put(digest, data)
    (tmp_path / digest[:2] / digest).write_bytes(b"x" * len(data))
    assert store.put(digest, data)
    assert store.get(digest) == data


def test_what_is_acknowledged_is_synced_also_where_another_upload_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []

    def sync(folder: Path) -> None:
        synced.append(folder)
        sync_folder(folder)

    monkeypatch.setattr(local, "sync_folder", sync)
    monkeypatch.setattr(files, "sync_folder", sync)
    store = LocalBlobs(tmp_path)
    data = b"the bytes of an expert"
    digest = sha256(data)
    entry, folder = tmp_path / digest[:2], tmp_path
    # A folder is new at most once; that its entry is durable another process cannot know.
    for of, made, expected in ((store, True, [entry, folder]), (store, False, [entry])):
        synced.clear()
        assert of.put(digest, data) is made
        assert synced == expected
    synced.clear()
    assert not LocalBlobs(tmp_path).put(digest, data)
    assert synced == [entry, folder]


def test_a_file_made_this_moment_is_not_swept_whatever_is_asked_for(tmp_path: Path) -> None:
    store = LocalBlobs(tmp_path)
    digest = sha256(b"")
    left = tmp_path / digest[:2] / f".{digest}.x.tmp"
    left.parent.mkdir()
    left.touch()
    soon = time.time() + 3600
    os.utime(left, (soon, soon))
    later = datetime.fromtimestamp(soon + 3600, UTC)
    assert store.sweep(later, dry_run=False) == []
    assert left.exists()
    os.utime(left, (soon - 7200, soon - 7200))
    assert store.sweep(later, dry_run=False) == [str(left)]
    assert not left.exists()


def test_an_object_larger_than_any_expert_is_not_read(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    store = s3_blobs(s3_server, s3_server.bucket())
    store.put(DIGEST, DATA)
    monkeypatch.setattr(s3, "MAX_FILE_BYTES", len(DATA))
    assert store.get(DIGEST) == DATA
    monkeypatch.setattr(s3, "MAX_FILE_BYTES", len(DATA) - 1)
    with pytest.raises(RegistryError, match="is damaged"):
        store.get(DIGEST)
