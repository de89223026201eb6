"""The collection of garbage takes what nobody can miss, and says so before."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from t2.core.digests import sha256
from t2.core.errors import ConflictError, NotFoundError
from t2.core.references import ExpertName, parse_name, parse_reference
from t2.registry.blobs.local import LocalBlobs
from t2.registry.db import models
from t2.registry.open import open_embedded
from t2.registry.services import blobs
from t2.registry.services.doctor import examine
from t2.registry.services.garbage import Policy, Removed, collect
from t2.registry.services.service import Service
from tests.registry.archives import edited, exported, find, imported
from tests.registry.registries import ACTOR, MATH, OTHER, STORAGES, age, contents, fill, log, registry
from tests.registry.samples import expert_bytes, run_bytes

NOW = timedelta(0)
AT_ONCE = Policy(grace=NOW, retention=timedelta(days=30), keys=timedelta(days=1))


@pytest.fixture(params=STORAGES)
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    with registry(request.param, tmp_path, request) as made:
        yield made


def gc(service: Service, policy: Policy = AT_ONCE) -> list[Removed]:
    """A collection, of which a dry run before told the same and did nothing."""
    before, entries = contents(service), log(service)
    told = collect(service.database, service.store, ACTOR, policy, dry_run=True)
    assert contents(service) == before
    assert log(service) == entries
    done = collect(service.database, service.store, ACTOR, policy)
    assert done == told
    assert collect(service.database, service.store, ACTOR, policy) == []
    assert not list(examine(service.database, service.store, deep=True, grace=NOW))
    return done


def stored(service: Service) -> set[str]:
    return {info.digest for info in service.store.list()}


def rows(service: Service) -> set[str]:
    with service.database.read() as session:
        return set(session.scalars(select(models.Blob.digest)))


def test_nothing_that_can_be_restored_goes(service: Service) -> None:
    fill(service)
    before = contents(service)
    assert gc(service) == []
    assert contents(service) == before


def test_bytes_without_a_version_go_and_others_stay(service: Service) -> None:
    fill(service)
    before = contents(service)
    rowless, unused = b"no row knows these bytes", b"no version has these bytes"
    with service.database.write() as session:
        blobs.reserve(session, sha256(unused), len(unused))
        blobs.reserve(session, sha256(b"never put"), 9)
    for data in (rowless, unused):
        service.store.put(sha256(data), data)
    removed = gc(service)
    assert {(item.kind, item.name, item.bytes) for item in removed} == {
        ("blob", sha256(b"never put"), 9),
        ("blob", sha256(unused), len(unused)),
        ("object", sha256(rowless), len(rowless)),
    }
    assert contents(service) == before
    scored = {sha256(run_bytes(answers=answers).partition(b"\n")[2]) for answers in (0, 1)}
    experts = {sha256(expert_bytes(seed, **extra)) for seed, extra in fields()}
    assert stored(service) == rows(service) == experts | scored


def fields() -> Iterator[tuple[int, dict[str, Any]]]:
    first = sha256(expert_bytes(0))
    yield from ((seed, {}) for seed in (0, 1, 2, 4))
    yield 3, {"kind": "mixture", "parents": ({"digest": first, "alpha": 0.5},)}


def test_samples_stay_while_one_run_has_them(service: Service) -> None:
    first, second = (service.push_run("team", run_bytes(seed)) for seed in range(2))
    assert first.samples_digest == second.samples_digest
    service.delete_run("team", first.digest)
    assert gc(service) == []
    service.delete_run("team", second.digest)
    assert gc(service) == [Removed("blob", first.samples_digest, first.samples_size)]
    assert stored(service) == set()
    assert service.push_run("team", run_bytes(0)).created


def test_what_is_younger_than_the_grace_stays(service: Service) -> None:
    data = b"an upload in the middle"
    with service.database.write() as session:
        blobs.reserve(session, sha256(data), len(data))
    service.store.put(sha256(data), data)
    service.store.put(sha256(b"x"), b"x")
    assert gc_leaves(service)
    age(service, "blob", "touched_at", 1)
    age(service, "blob", "created_at", 1)
    with service.database.write() as session:
        blobs.reserve(session, sha256(data), len(data))  # the same upload again
    assert gc_leaves(service)
    assert {info.digest for info in service.store.list()} == {sha256(data), sha256(b"x")}


def gc_leaves(service: Service) -> bool:
    return collect(service.database, service.store, ACTOR, Policy(grace=timedelta(minutes=5))) == []


def test_what_was_deleted_long_ago_is_purged_with_its_bytes(service: Service) -> None:
    fill(service)
    for table in ("version", "expert"):
        age(service, table, "deleted_at", 31)
    removed = gc(service)
    shared = sha256(expert_bytes(0))
    assert [(item.kind, item.name) for item in removed[:2]] == [("expert", str(OTHER)), ("version", f"{MATH}@3")]
    assert {item.name for item in removed[2:]} == {sha256(expert_bytes(2)), sha256(expert_bytes(4))}
    assert shared in stored(service)
    for version in ("team/math@1", "team/math@2"):
        service.download(service.resolve(parse_reference(version)).digest)
    with pytest.raises(NotFoundError):
        service.get_expert(OTHER)
    assert [entry["action"] for entry in log(service)[:3]] == ["gc", "version.purge", "expert.purge"]
    assert service.publish(MATH, expert_bytes(2)).version == 4
    purged = next(entry for entry in service.audit().items if entry.action == "expert.purge")
    # A number that once meant a content never means another.
    assert service.publish(OTHER, expert_bytes(5)).version == purged.detail["last"] + 1 > 1


@pytest.mark.parametrize("target", ["empty", "in use"])
@pytest.mark.parametrize("namespace", [None, "others"])
def test_purged_numbers_are_not_given_again_in_another_registry(
    service: Service, tmp_path: Path, target: str, namespace: str | None
) -> None:
    fill(service)
    for table in ("version", "expert"):
        age(service, table, "deleted_at", 31)
    gc(service)
    archive = exported(service, namespace)
    with open_embedded(tmp_path / "other") as other:
        if target == "in use":
            other.publish(parse_name("mine/own"), expert_bytes(21))  # so that the import skips the archive's log
            other.publish(OTHER, expert_bytes(22))
        imported(other, archive)
        assert other.publish(OTHER, expert_bytes(5)).version == 3
        if namespace is None:
            assert other.publish(MATH, expert_bytes(2)).version == 4
        again = exported(other)
    with open_embedded(tmp_path / "third") as third:
        imported(third, again)
        assert third.publish(OTHER, expert_bytes(6)).version == 4


def test_an_archive_without_purged_names_has_their_numbers_in_its_log(service: Service, tmp_path: Path) -> None:
    fill(service)
    age(service, "expert", "deleted_at", 31)
    gc(service)

    def as_before(lines: list[dict[str, Any]]) -> None:
        lines.remove(find(lines, "purged"))
        del find(lines, "end")["counts"]["purged"]

    archive = edited(exported(service), as_before)
    with open_embedded(tmp_path / "other") as other:
        other.publish(parse_name("mine/own"), expert_bytes(21))
        imported(other, archive)
        assert other.publish(OTHER, expert_bytes(5)).version == 3


def test_a_restored_expert_is_not_purged(service: Service) -> None:
    fill(service)
    age(service, "expert", "deleted_at", 31)
    service.restore(OTHER)
    assert gc(service) == []
    assert service.download(service.resolve(parse_reference("others/code")).digest) == expert_bytes(4)


def test_what_is_restored_after_it_was_looked_at_is_not_purged(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(service)
    age(service, "expert", "deleted_at", 31)
    age(service, "version", "deleted_at", 31)
    read = service.database.read

    @contextlib.contextmanager
    def overtaken() -> Iterator[Session]:
        monkeypatch.setattr(service.database, "read", read)
        with read() as session:
            yield session
        service.restore(OTHER)
        service.restore(MATH, 3)

    monkeypatch.setattr(service.database, "read", overtaken)
    assert collect(service.database, service.store, ACTOR, AT_ONCE) == []
    assert service.get_expert(OTHER).versions == 2
    assert service.resolve(parse_reference("team/math@3")).digest == sha256(expert_bytes(2))
    assert not list(examine(service.database, service.store, deep=True, grace=NOW))


def test_an_object_that_was_put_anew_since_the_list_stays(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    data = expert_bytes(0)
    service.store.put(sha256(data), data)
    old = [replace(info, modified=info.modified - timedelta(days=1)) for info in service.store.list()]
    monkeypatch.setattr(service.store, "list", lambda: iter(old))
    assert collect(service.database, service.store, ACTOR, Policy(grace=timedelta(hours=1))) == []
    assert service.store.get(sha256(data)) == data
    assert rows(service) == set()


def test_old_keys_of_uploads_go(service: Service) -> None:
    service.publish(MATH, expert_bytes(0), idempotency_key="k")
    service.publish(MATH, expert_bytes(0), idempotency_key="k2")
    age(service, "idempotency_key", "created_at", 2)
    assert gc(service) == [Removed("keys", "2")]
    with service.database.read() as session:
        assert session.scalars(select(models.IdempotencyKey)).all() == []


def test_an_upload_that_stalled_beyond_the_grace_begins_again(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = expert_bytes(0)
    put = service.store.put
    calls = []

    def put_slowly(digest: str, content: bytes) -> bool:
        done = put(digest, content)
        calls.append(digest)
        if len(calls) == 1:
            removed = collect(service.database, service.store, ACTOR, AT_ONCE)
            assert [item.kind for item in removed] == ["blob"]
            with service.database.write() as session:  # another upload of the same, which has not put its bytes yet
                blobs.reserve(session, digest, len(content))
        return done

    monkeypatch.setattr(service.store, "put", put_slowly)
    version = service.publish(MATH, data)
    assert len(calls) == 2
    assert service.download(version.digest) == data


def test_uploads_beside_collections_without_grace_lose_nothing(service: Service) -> None:
    files = [expert_bytes(seed) for seed in range(6)]
    swept: list[Removed] = []
    done = threading.Event()

    def upload(worker: int) -> int:
        acknowledged = 0
        for turn in range(200):
            if turn >= 12 and swept:
                break
            name = ExpertName("team", f"e{worker}-{turn}")
            with contextlib.suppress(ConflictError):  # collected three times in a row
                service.publish(name, files[turn % len(files)])
                acknowledged += 1
                service.delete(name)
        return acknowledged

    def sweep() -> None:
        while not done.is_set():
            swept.extend(collect(service.database, service.store, ACTOR, Policy(grace=NOW, retention=NOW)))

    with ThreadPoolExecutor(4) as pool:
        sweeper = pool.submit(sweep)
        try:
            assert sum(pool.map(upload, range(3))) > 20
        finally:
            done.set()
        sweeper.result()
    assert swept
    assert not [finding for finding in examine(service.database, service.store, deep=True) if finding.wrong]


def test_files_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    store = LocalBlobs(tmp_path / "blobs")
    digest = sha256(b"a")
    store.put(digest, b"a")
    folder = tmp_path / "blobs" / digest[:2]
    killed, living, foreign = (folder / f".{digest}.{tail}.tmp" for tail in ("k", "l", "f"))
    foreign = folder / ".notes.tmp"
    for path in (killed, living, foreign):
        path.write_bytes(b"half")
        os.utime(path, (1, 1))
    with registry_on(store, tmp_path) as service, living.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        policy = Policy(grace=timedelta(hours=1))
        for dry_run in (True, False):
            removed = collect(service.database, store, ACTOR, policy, dry_run=dry_run)
            assert removed == [Removed("temporary", str(killed))]
    assert not killed.exists()
    assert living.exists()
    assert foreign.exists()


def registry_on(store: LocalBlobs, folder: Path) -> Service:
    from t2.registry.open import open_embedded

    service = open_embedded(folder / "registry")
    service.store = store
    return service
