"""Processes are killed while they upload: what was acknowledged is there, and nothing is half there.

``T2_TEST_KILLS=200`` kills that many times, instead of a dozen.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from t2.core.digests import sha256
from t2.core.errors import RegistryError
from t2.core.references import parse_reference
from t2.registry.blobs.base import BlobStore
from t2.registry.blobs.local import LocalBlobs
from t2.registry.client.http import HttpRegistry
from t2.registry.client.retry import RetryPolicy
from t2.registry.db import migrate
from t2.registry.open import open_blobs, open_configured, open_database
from t2.registry.services.doctor import examine
from t2.registry.services.garbage import Policy, collect
from t2.registry.services.service import Service
from t2.registry.settings import ServerSettings, load_settings
from tests.registry import servers
from tests.registry.killed import FILES, acknowledged, upload

KILLS = int(os.environ.get("T2_TEST_KILLS", "12"))
SEED = int(os.environ.get("T2_TEST_SEED", "0"))
AT_ONCE = Policy(grace=timedelta(0))
LAST = ("before", "after")
FOLDER = [(point, when) for point in ("write", "fsync", "rename", "commit", "delete folder") for when in LAST]
BUCKET = [(point, when) for point in ("commit", "put") for when in LAST]


class Zygote:
    """The process that workers are forked from."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.registry.killed"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout

    def start(self, *jobs: dict[str, Any]) -> list[int]:
        self._in.write(json.dumps(jobs) + "\n")
        self._in.flush()
        pids: list[int] = json.loads(self._out.readline())
        return pids

    def wait(self) -> list[int]:
        """The wait statuses of what was started last."""
        statuses: list[int] = json.loads(self._out.readline())
        return statuses

    def close(self) -> None:
        self._in.close()
        self._process.wait()


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(pid: int) -> bool:
    """Kill a process; whether it lived."""
    lived = lives(pid)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return lived


def killed(statuses: list[int]) -> int:
    return sum(os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL for status in statuses)


def check(service: Service, path: Path, checked: int = 0) -> int:
    """What was acknowledged reads back, and the doctor, who reads every file, finds nothing but garbage.

    Returns how many were acknowledged, of which the first ``checked`` were looked up before.
    """
    known = acknowledged(path)
    for name, number, seed in known[checked:]:
        version = service.resolve(parse_reference(f"{name}@{number}"))
        assert version.digest == sha256(FILES[seed])
        assert service.download(version.digest) == FILES[seed]
    wrong = [finding for finding in examine(service.database, service.store, deep=True) if finding.wrong]
    assert wrong == []
    return len(known)


def sweep(service: Service, path: Path) -> Counter[str]:
    """A collection of everything collectable: it takes orphans alone."""
    for temporary in Path(service.store.location).rglob("*.tmp"):
        os.utime(temporary, (1, 1))
    versions = {version.digest for version in every_version(service)}
    removed = collect(service.database, service.store, service.actor, AT_ONCE)
    assert {item.kind for item in removed} <= {"blob", "object", "temporary"}
    assert not versions & {item.name for item in removed}
    check(service, path)
    assert list(examine(service.database, service.store, deep=True, grace=timedelta(0))) == []
    assert {info.digest for info in service.store.list()} == versions
    return Counter(item.kind for item in removed)


def every_version(service: Service) -> Iterator[Any]:
    cursor = None
    while True:
        page = service.list_experts(cursor=cursor, limit=200)
        for expert in page.items:
            yield from service.list_versions(parse_reference(expert.name).expert, limit=200).items  # type: ignore[arg-type]
        cursor = page.next
        if cursor is None:
            return


def test_an_embedded_registry(zygote: Zygote, tmp_path: Path) -> None:
    chosen = random.Random(SEED)
    kills = uploads = turn = 0
    points: Counter[str] = Counter()
    orphans: Counter[str] = Counter()
    while kills < KILLS * 3 // 4:
        folder = tmp_path / f"registry-{turn // 10}"
        settings = load_settings(database_url=f"sqlite:///{folder}/registry.db", blobs=str(folder / "blobs"))
        folder.mkdir(exist_ok=True)
        environment = environment_of(settings)
        path = folder / "acknowledged"
        database = open_database(settings)
        migrate.migrate(database)
        database.close()
        point, when = FOLDER[turn % len(FOLDER)]
        job: dict[str, Any] = {"kind": "upload", "environment": environment, "acknowledged": str(path)}
        other = {**job, "kind": "collect" if "delete" in point or turn % 3 == 0 else "upload", "seed": f"{turn}b"}
        dying = other if "delete" in point else job
        dying |= {"point": point, "when": when, "count": chosen.randint(1, 12)}
        if "delete" in point:
            litter(LocalBlobs(folder / "blobs"))
        pids = zygote.start({**job, "seed": f"{turn}a"}, other)
        # Every third time all die at random; otherwise the other dies soon after the one at its named point.
        end = time.monotonic() + (3.0 if turn % 3 else chosen.uniform(0.02, 0.7))
        while lives(pids[dying is other]) and time.monotonic() < end:
            time.sleep(0.005)
        lived = [kill(pid) for pid in pids]
        dead = killed(zygote.wait())
        kills += dead
        points["at random"] += sum(lived)
        points[f"{when} {point}"] += dead - sum(lived)
        with open_configured(settings) as service:
            uploads = check(service, path)
            if turn % 10 == 9 or kills >= KILLS * 3 // 4:
                orphans += sweep(service, path)
        turn += 1
    print(f"{kills} kills of embedded registries: {dict(points)}; orphans {dict(orphans)}")
    assert uploads > 0


def environment_of(settings: ServerSettings) -> dict[str, str]:
    given = {"database_url": settings.database_url.get_secret_value(), "blobs": settings.blobs}
    if settings.s3_access_key is not None and settings.s3_secret_key is not None:
        given |= {
            "s3_endpoint": settings.s3_endpoint or "",
            "s3_access_key": settings.s3_access_key.get_secret_value(),
            "s3_secret_key": settings.s3_secret_key.get_secret_value(),
        }
    return {f"T2_REGISTRY_{name.upper()}": value for name, value in given.items()}


def test_a_server(zygote: Zygote, tmp_path: Path, postgres_url: str, s3_server: servers.S3) -> None:
    chosen = random.Random(SEED)
    settings = load_settings(
        database_url=postgres_url,
        blobs=f"s3://{s3_server.bucket()}/experts",
        s3_endpoint=s3_server.endpoint,
        s3_access_key=s3_server.access_key,
        s3_secret_key=s3_server.secret_key,
    )
    database = open_database(settings)
    migrate.migrate(database)
    database.close()
    path, wanted = tmp_path / "acknowledged", max(1, KILLS // 4)
    kills = turn = uploads = 0
    points: Counter[str] = Counter()
    orphans: Counter[str] = Counter()
    while kills < wanted:
        log = tmp_path / f"log-{turn}"
        environment = {**environment_of(settings), "T2_REGISTRY_PORT": "0"}
        job: dict[str, Any] = {"kind": "serve", "environment": environment, "log": str(log)}
        named = turn % 2 == 0
        point, when = BUCKET[turn // 2 % len(BUCKET)]
        if named:
            # Preparing the server commits a few times.
            job |= {"point": point, "when": when, "count": chosen.randint(1, 12) + 6 * (point == "commit")}
        jobs = [job]
        if turn % 5 == 1:
            litter(open_blobs(settings))
            late = LAST[turn // 5 % 2]
            death = {"point": "delete bucket", "when": late, "count": chosen.randint(1, 12)}
            jobs.append({"kind": "collect", "environment": environment, **death})
        pid, *collector = zygote.start(*jobs)
        url = address(log, pid)
        if url is not None:
            upload_over_http(url, turn, path, pid, None if named else chosen.uniform(0.05, 1.0))
        lived = kill(pid)
        for other in collector:
            end = time.monotonic() + 3
            while lives(other) and time.monotonic() < end:
                time.sleep(0.005)
            points[f"{late} delete bucket" if not kill(other) else "at random"] += 1
        kills += killed(zygote.wait())
        points[f"{when} {point}" if named and not lived else "at random"] += 1
        with open_configured(settings) as service:
            uploads = check(service, path, uploads)
            if turn % 10 == 9 or kills >= wanted:
                orphans += sweep(service, path)
        turn += 1
    print(f"{kills} kills of a server: {dict(points)}; {uploads} acknowledged; orphans {dict(orphans)}")
    assert uploads > 0


def litter(store: BlobStore) -> None:
    """Bytes that no row knows, for a collection to find."""
    for _ in range(12):
        data = os.urandom(20)
        store.put(sha256(data), data)


def address(log: Path, pid: int) -> str | None:
    """Where a server listens; None where it died before."""
    while lives(pid):
        if log.exists() and " on http://" in log.read_text():
            return log.read_text().split(" on ")[1].split()[0]
        time.sleep(0.05)
    return None


def upload_over_http(url: str, turn: int, path: Path, pid: int, seconds: float | None) -> None:
    """Upload from three threads until the server is gone; it is killed after so many seconds."""
    job = {"seed": turn, "acknowledged": str(path)}
    with HttpRegistry(url, timeout=20, retries=RetryPolicy(attempts=1)) as client:

        def run(thread: int) -> None:
            with suppress(RegistryError):
                upload(client.publish, job, thread)

        threads = [threading.Thread(target=run, args=(thread,)) for thread in range(3)]
        for thread in threads:
            thread.start()
        if seconds is not None:
            time.sleep(seconds)
            kill(pid)  # the threads notice
        for thread in threads:
            thread.join()
