"""The cache of experts: it answers without a server, never with wrong bytes, and to many at once."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from t2.core.digests import sha256
from t2.core.errors import NotFoundError, UnavailableError
from t2.core.references import parse_name, parse_reference
from t2.registry.client.base import RegistryClient
from t2.registry.client.cache import ExpertCache, fetch
from t2.registry.client.http import HttpRegistry
from t2.registry.client.retry import RetryPolicy
from t2.registry.open import open_embedded
from tests.registry.cells import SETTINGS, serve
from tests.registry.samples import expert_bytes
from tests.registry.scripted import Scripted, html, problem, scripted

NAME = parse_name("team/math")
FIRST, SECOND = expert_bytes(1), expert_bytes(2)


class Down:
    """A registry at the address of another, which cannot be reached."""

    def __init__(self, server: Scripted, location: str) -> None:
        self._client = HttpRegistry(server.url, retries=RetryPolicy(attempts=1))
        self._client.location = location
        self._server = server

    def __enter__(self) -> RegistryClient:
        self._server.says(html(502))
        return self._client

    def __exit__(self, *_: object) -> None:
        self._client.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(open_embedded(tmp_path_factory.mktemp("server")), SETTINGS) as url:
        yield url


@pytest.fixture
def up(server: str) -> Iterator[HttpRegistry]:
    with HttpRegistry(server) as client:
        client.publish(NAME, FIRST)
        client.publish(NAME, SECOND)
        client.set_alias(NAME, "production", 1)
        yield client
        client.restore(NAME, 2)


@pytest.fixture
def cache(tmp_path: Path) -> ExpertCache:
    return ExpertCache(tmp_path / "cache")


@pytest.fixture
def down(up: HttpRegistry) -> Iterator[RegistryClient]:
    with scripted() as broken, Down(broken, up.location) as client:
        yield client


def test_what_is_pinned_by_digest_needs_no_request(up: HttpRegistry, cache: ExpertCache) -> None:
    digest = sha256(FIRST)
    cache.fetch(up, parse_reference(f"team/math@sha256:{digest}"))
    with scripted() as silent, HttpRegistry(silent.url) as client:
        for reference in (f"team/math@sha256:{digest}", f"@sha256:{digest}", f"other/name@sha256:{digest}"):
            got = cache.fetch(client, parse_reference(reference))
            assert got.data == FIRST
            assert got.version is None
        assert cache.download(client, digest) == FIRST
        assert silent.asked == []
    known = cache.fetch(up, parse_reference(f"team/math@sha256:{digest}"))
    assert known.version is not None
    assert known.version.reference == "team/math@1"
    assert known.remembered is not None


def test_names_are_asked_for_and_contents_are_not(up: HttpRegistry, cache: ExpertCache, server: str) -> None:
    assert cache.fetch(up, parse_reference("team/math")).data == FIRST
    up.set_alias(NAME, "production", 2)
    moved = cache.fetch(up, parse_reference("team/math"))
    assert moved.data == SECOND
    assert moved.remembered is None
    assert moved.version == up.resolve(parse_reference("team/math@2"))


def test_a_version_is_known_offline(
    up: HttpRegistry, down: RegistryClient, cache: ExpertCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.fetch(up, parse_reference("team/math@2"))
    cache.fetch(up, parse_reference("team/math@production"))
    for reference, data in [("team/math@2", FIRST), ("team/math@1", SECOND)][::-1]:
        got = cache.fetch(down, parse_reference(reference))
        assert got.data != data
        assert got.version is not None
        assert got.version.reference == reference
        assert got.remembered is not None
    assert caplog.records == []


def test_an_alias_is_taken_as_it_was_with_a_warning(
    up: HttpRegistry, down: RegistryClient, cache: ExpertCache, caplog: pytest.LogCaptureFixture
) -> None:
    for reference in ("team/math@production", "team/math"):
        cache.fetch(up, parse_reference(reference))
        up.set_alias(NAME, "production", 2)
        with caplog.at_level(logging.WARNING):
            got = cache.fetch(down, parse_reference(reference))
        up.set_alias(NAME, "production", 1)
        assert got.data == FIRST
        (record,) = caplog.records
        assert f"{reference} is taken as team/math@1, as the registry said on 20" in record.getMessage()
        assert "may have moved" in record.getMessage()
        caplog.clear()


def test_what_was_never_asked_for_is_unavailable_offline(
    up: HttpRegistry, down: RegistryClient, cache: ExpertCache
) -> None:
    cache.fetch(up, parse_reference("team/math@1"))
    for reference in ("team/math@2", "team/math", "team/math@production", f"@sha256:{sha256(SECOND)}"):
        with pytest.raises(UnavailableError):
            cache.fetch(down, parse_reference(reference))


def test_servers_are_told_apart(up: HttpRegistry, cache: ExpertCache) -> None:
    cache.fetch(up, parse_reference("team/math"))
    with (
        scripted() as broken,
        Down(broken, "https://another.example") as client,
        pytest.raises(UnavailableError),
    ):
        cache.fetch(client, parse_reference("team/math"))


def test_a_server_that_answers_is_believed(up: HttpRegistry, down: RegistryClient, cache: ExpertCache) -> None:
    cache.fetch(up, parse_reference("team/math@2"))
    up.delete(NAME, 2)
    with pytest.raises(NotFoundError, match="is deleted"):
        cache.fetch(up, parse_reference("team/math@2"))
    with pytest.raises(UnavailableError):
        cache.fetch(down, parse_reference("team/math@2"))
    with scripted() as refusing, HttpRegistry(refusing.url) as client:
        refusing.says(problem(404, "not-found", "there is no expert team/math"))
        with pytest.raises(NotFoundError):
            cache.fetch(client, parse_reference("team/math@1"))


@pytest.mark.parametrize("damage", [b"", b"x", FIRST[:-1], bytes(len(FIRST))])
def test_a_damaged_file_is_fetched_anew(
    up: HttpRegistry, down: RegistryClient, cache: ExpertCache, damage: bytes
) -> None:
    digest = sha256(FIRST)
    reference = parse_reference(f"@sha256:{digest}")
    cache.fetch(up, reference)
    (path,) = (cache.folder / "sha256").rglob(digest)
    path.write_bytes(damage)
    assert cache.fetch(up, reference).data == FIRST
    assert path.read_bytes() == FIRST
    path.write_bytes(damage)
    with pytest.raises(UnavailableError):
        cache.fetch(down, reference)
    assert not path.exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff", b'{"server": "x"}'])
def test_a_damaged_memory_is_no_memory(
    up: HttpRegistry, down: RegistryClient, cache: ExpertCache, damage: bytes
) -> None:
    cache.fetch(up, parse_reference("team/math@1"))
    for path in (cache.folder / "references").rglob("*.json"):
        path.write_bytes(damage)
    with pytest.raises(UnavailableError):
        cache.fetch(down, parse_reference("team/math@1"))
    assert cache.fetch(up, parse_reference("team/math@1")).data == FIRST


def test_a_cache_that_cannot_be_written_does_no_harm(up: HttpRegistry, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert ExpertCache(tmp_path / "file" / "cache").fetch(up, parse_reference("team/math")).data == FIRST


def test_a_folder_of_this_machine_is_not_cached(tmp_path: Path, cache: ExpertCache) -> None:
    with open_embedded(tmp_path / "registry") as client:
        client.publish(NAME, FIRST)
        got = cache.fetch(client, parse_reference("team/math"))
        assert got.data == FIRST
        assert got.version is not None
    assert not cache.folder.exists()


def test_it_lies_in_the_users_cache_folder(up: HttpRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "user"))
    digest = sha256(FIRST)
    assert fetch(up, parse_reference("team/math@1")).data == FIRST
    assert (tmp_path / "user" / "experts" / "sha256" / digest[:2] / digest).read_bytes() == FIRST


_WORKER = """
import sys
from pathlib import Path
from t2.core.digests import sha256
from t2.core.references import parse_reference
from t2.registry.client.cache import ExpertCache
from t2.registry.client.http import HttpRegistry
url, folder, digest = sys.argv[1:]
cache = ExpertCache(Path(folder))
path = Path(folder) / "sha256" / digest[:2] / digest
print("ready", flush=True)
sys.stdin.readline()
with HttpRegistry(url) as client:
    for turn in range(30):
        for reference in ("team/math", "@sha256:" + digest):
            data = cache.fetch(client, parse_reference(reference)).data
            assert sha256(data) == digest, len(data)
        if turn % 10 == 5:
            path.unlink(missing_ok=True)
"""


def test_many_processes_share_it(up: HttpRegistry, cache: ExpertCache) -> None:
    command = [sys.executable, "-c", _WORKER, up.location, str(cache.folder), sha256(FIRST)]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(b"\n")
        worker.stdin.flush()
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert (worker.returncode, errors) == (0, b"")
    assert [path for path in cache.folder.rglob("*") if path.name.endswith(".tmp")] == []


def test_what_was_remembered_for_another_reference_is_not_believed(
    up: HttpRegistry, down: RegistryClient, cache: ExpertCache
) -> None:
    first, second = parse_reference("team/math@1"), parse_reference("team/math@2")
    cache.fetch(up, first)
    cache._path(down.location, first).rename(cache._path(down.location, second))
    with pytest.raises(UnavailableError):
        cache.fetch(down, second)
