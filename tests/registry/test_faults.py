"""A server whose database and store fail a fifth of their calls loses nothing, lies never, and recovers.

``T2_TEST_FAULT_SECONDS=60`` lets it suffer for a minute, with delays of 5 s, instead of some seconds with shorter ones.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest

from t2.core.digests import sha256
from t2.core.errors import UnavailableError
from t2.core.references import ExpertName, parse_reference
from t2.registry.blobs.s3 import Credentials, S3Blobs
from t2.registry.db import migrate
from t2.registry.open import open_configured, open_database
from t2.registry.services.doctor import examine
from t2.registry.services.garbage import Policy, collect
from t2.registry.settings import ServerSettings, load_settings
from tests.registry import servers
from tests.registry.faults import Faults, database_proxy, store_proxy
from tests.registry.samples import expert_bytes
from tests.registry.serving import process

SECONDS = float(os.environ.get("T2_TEST_FAULT_SECONDS", "4"))
DELAY = 5.0 if SECONDS >= 30 else 0.5
THREADS = 6


@dataclass
class Faulty:
    """A server behind faults, and the way to its parts around them."""

    url: str
    database: Faults
    store: Faults
    settings: ServerSettings


@pytest.fixture
def faulty(postgres_url: str, s3_server: servers.S3) -> Iterator[Faulty]:
    database, store = Faults(delay=DELAY), Faults(delay=DELAY, seed=1)
    settings = load_settings(
        database_url=postgres_url,
        blobs=f"s3://{s3_server.bucket()}/experts",
        s3_endpoint=s3_server.endpoint,
        s3_access_key=s3_server.access_key,
        s3_secret_key=s3_server.secret_key,
    )
    made = open_database(settings)
    migrate.migrate(made)
    made.close()
    with database_proxy(postgres_url, database) as url, store_proxy(s3_server.endpoint, store) as endpoint:
        environment = {
            "DATABASE_URL": url,
            "BLOBS": settings.blobs,
            "S3_ENDPOINT": endpoint,
            "S3_ACCESS_KEY": s3_server.access_key,
            "S3_SECRET_KEY": s3_server.secret_key,
            "LOG_LEVEL": "error",
        }
        prefixed = {f"T2_REGISTRY_{name}": value for name, value in environment.items()}
        with process(**prefixed) as (_, address):
            yield Faulty(address, database, store, settings)


@dataclass
class Answer:
    status: int
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Load:
    """One thread of a mixed load, and what it was told.

    Attributes:
        uploaded: digest by (name, version).
        alias: where the alias may point: where the last acknowledged move put it, or one of unknown outcome after it.
    """

    url: str
    number: int
    statuses: Counter[str] = field(default_factory=Counter)
    uploaded: dict[tuple[str, int], bytes] = field(default_factory=dict)
    alias: set[int | None] = field(default_factory=lambda: {None})

    def run(self, until: float) -> None:
        chosen = random.Random(self.number)
        turn = 0
        while time.monotonic() < until:
            turn += 1
            self.step(chosen, turn)

    def step(self, chosen: random.Random, turn: int) -> None:
        name = f"fault/t{self.number}"
        mine = [version for _, version in self.uploaded]
        what = chosen.random()
        if what < 0.35 or not mine:
            data = expert_bytes(self.number * 100_000 + turn)
            answer = self.call(
                "upload", "POST", f"/v1/experts/{name}/versions", data, {"Idempotency-Key": f"{self.number}-{turn}"}
            )
            if answer is not None:
                version = answer.json
                assert version["digest"] == sha256(data)
                self.uploaded[name, version["version"]] = data
        elif what < 0.6:
            version = chosen.choice(mine)
            answer = self.call("read", "GET", f"/v1/experts/{name}/versions/{version}/content")
            if answer is not None:
                assert answer.body == self.uploaded[name, version]
        elif what < 0.8:
            version = chosen.choice(mine)
            body = json.dumps({"version": version, "reason": "r"}).encode()
            path = f"/v1/experts/{name}/aliases/production"
            answer = self.call("alias", "PUT", path, body, {"Content-Type": "application/json"})
            self.alias = {version} if answer is not None else self.alias | {version}
        else:
            answer = self.call("list", "GET", f"/v1/experts/{name}/versions?limit=200")
            if answer is not None:
                listed = {item["version"]: item["digest"] for item in answer.json["items"]}
                assert all(
                    listed[version] == sha256(data) for (_, version), data in self.uploaded.items() if version in listed
                )
                assert len(listed) == 200 or set(mine) <= set(listed)

    def call(
        self, what: str, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Answer | None:
        """An answer of success, or None after an error told as one."""
        given = {"Content-Type": "application/octet-stream", **(headers or {})}
        answer, kind = request(self.url, method, path, body, given if body is not None else headers)
        self.statuses[f"{what} {answer.status}"] += 1
        if answer.status < 300:
            return answer
        assert kind == "application/problem+json", (answer.status, kind, answer.body[:300])
        assert answer.json["status"] == answer.status == 503, answer.body
        assert answer.json["code"] == "unavailable"
        assert b"secret" not in answer.body
        assert b"Traceback" not in answer.body
        return None


def request(
    url: str, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[Answer, str | None]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return Answer(answer.status, answer.read()), answer.getheader("Content-Type")
    finally:
        connection.close()


def ready(url: str) -> int:
    return request(url, "GET", "/readyz")[0].status


def becomes(url: str, status: int, seconds: float) -> float:
    """Seconds until the server is ready, or not."""
    begin = time.monotonic()
    while ready(url) != status:
        assert time.monotonic() - begin < seconds, f"no {status} from /readyz after {seconds} s"
        time.sleep(0.1)
    return time.monotonic() - begin


def test_a_fifth_of_all_calls_fails(faulty: Faulty) -> None:
    loads = [Load(faulty.url, number) for number in range(THREADS)]
    failures: list[BaseException] = []

    def run(load: Load, until: float) -> None:
        try:
            load.run(until)
        except BaseException as error:  # noqa: BLE001 - told by the test
            failures.append(error)

    assert ready(faulty.url) == 200
    faulty.database.rate = faulty.store.rate = 0.2
    until = time.monotonic() + SECONDS
    threads = [threading.Thread(target=run, args=(load, until)) for load in loads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    faulty.database.rate = faulty.store.rate = 0.0
    if failures:
        raise failures[0]
    recovered = becomes(faulty.url, 200, 15)
    begin = time.monotonic()
    chosen = random.Random(0)
    for load in loads:
        before = load.statuses.copy()
        for turn in range(5):
            load.step(chosen, 10_000 + turn)
        assert not [kind for kind in load.statuses - before if kind.endswith("503")]
    statuses = sum((load.statuses for load in loads), Counter())
    print(f"faults: database {dict(faulty.database.struck)} of {faulty.database.calls} transactions, ", end="")
    print(f"store {dict(faulty.store.struck)} of {faulty.store.calls} requests")
    print(f"answers {dict(sorted(statuses.items()))}; ready after {recovered:.1f} s, ", end="")
    print(f"{5 * THREADS} calls in {time.monotonic() - begin:.1f} s")
    assert sum(faulty.database.struck.values()) > 5
    assert sum(faulty.store.struck.values()) > 5
    assert statuses["upload 201"] > 5
    assert statuses["read 200"] > 5
    with open_configured(faulty.settings) as service:
        for load in loads:
            for (name, number), data in load.uploaded.items():
                assert service.download(service.resolve(parse_reference(f"{name}@{number}")).digest) == data
            aliases = service.list_aliases(ExpertName("fault", f"t{load.number}"))
            assert (aliases[0].version if aliases else None) in load.alias
        wrong = [finding for finding in examine(service.database, service.store, deep=True) if finding.wrong]
        assert wrong == []
        removed = collect(service.database, service.store, service.actor, Policy(grace=timedelta(0)))
        assert {item.kind for item in removed} <= {"blob", "object"}
        assert list(examine(service.database, service.store, deep=True, grace=timedelta(0))) == []


def test_readiness_tells_the_truth(faulty: Faulty) -> None:
    for number, (part, kind) in enumerate(itertools.product(("database", "store"), ("error", "reset"))):
        assert ready(faulty.url) == 200
        faults: Faults = getattr(faulty, part)
        faults.kinds, faults.rate = (kind,), 1.0
        becomes(faulty.url, 503, 10)
        for _ in range(5):
            assert ready(faulty.url) == 503
        load = Load(faulty.url, number)
        load.call("upload", "POST", "/v1/experts/a/b/versions", expert_bytes(0))
        assert load.statuses == {"upload 503": 1}
        assert request(faulty.url, "GET", "/healthz")[0].status == 200
        faults.rate = 0.0
        becomes(faulty.url, 200, 10)
        for turn in range(6):
            load.step(random.Random(turn), turn)
        assert load.statuses["upload 503"] == 1
        assert not [name for name in load.statuses if name.endswith("503") and name != "upload 503"]


def test_a_body_that_breaks_off_is_read_again(s3_server: servers.S3) -> None:
    faults = Faults(kinds=("late reset",))
    data = expert_bytes(0)
    with store_proxy(s3_server.endpoint, faults) as endpoint:
        credentials = Credentials(s3_server.access_key, s3_server.secret_key)
        store = S3Blobs(s3_server.bucket(), endpoint=endpoint, credentials=credentials, timeout=5)
        store.put(sha256(data), data)
        faults.rate = 0.4
        got = 0
        for _ in range(20):
            with contextlib.suppress(UnavailableError):
                assert store.get(sha256(data)) == data
                got += 1
        assert got > 10
        assert faults.struck["late reset"] > 3
