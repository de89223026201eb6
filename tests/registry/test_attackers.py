"""Clients that hold what others need: connections, memory, threads. Each is cut, refused or made to wait its turn.

``benchmarks/registry_attackers.py`` measures the same attacks at their full size.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import resource
import signal
import socket
import sqlite3
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr

from t2.core.curve import CurvePoint
from t2.core.errors import TooLargeError, UnavailableError
from t2.core.references import parse_name
from t2.registry.blobs.local import LocalBlobs
from t2.registry.db import migrate
from t2.registry.db.database import Database, WriterQueue
from t2.registry.open import open_embedded
from t2.registry.server import protocol, serve
from t2.registry.server.app import create_app
from t2.registry.server.limits import Addresses, Memory, Turns, Workspace, check_values, share_of
from t2.registry.server.problems import HttpError
from t2.registry.services.actor import Actor, Limits
from t2.registry.services.service import Service
from t2.registry.settings import ServerSettings
from tests.registry import cells
from tests.registry.samples import expert_bytes
from tests.registry.serving import bearer, client_of, embedded, eventually, process
from tests.registry.test_server_limits import UPLOAD, Exchange, endless, exchange, parts

MIB = 1024 * 1024


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with open_embedded(tmp_path) as service:
        yield service


@contextlib.contextmanager
def connection(url: str, data: bytes = b"", **options: Any) -> Iterator[socket.socket]:
    """A connection with a small receive buffer, on which something was sent."""
    where = urlsplit(url)
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.settimeout(30)
        made.connect((where.hostname, where.port))
        made.sendall(data)
        yield made


def is_open(made: socket.socket) -> bool:
    # TCP_INFO begins with the connection's state; 1 is established.
    return made.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 1


def request(method: str, path: str, *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


def get(url: str, path: str) -> tuple[int, dict[str, str], Any]:
    where = urlsplit(url)
    client = http.client.HTTPConnection(where.hostname or "", where.port, timeout=30)
    with contextlib.closing(client):
        client.request("GET", path)
        answer = client.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, json.loads(answer.read())


def with_curve(service: Service, points: int = 12_000) -> None:
    service.publish(parse_name("team/math"), expert_bytes(0))
    for start in range(0, points, 10_000):
        steps = range(start, min(points, start + 10_000))
        made = [CurvePoint(step=step, split="train", reward=step / 7, score=step / 9, seconds=1.5) for step in steps]
        service.add_points(parse_name("team/math"), 1, made)


LONG = request("GET", f"{UPLOAD}/1/curve") * 8


def test_a_reader_that_never_reads_is_cut(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SWEEP_SECONDS", 0.05)
    with_curve(service)
    with cells.serve(service, ServerSettings(stall_seconds=0.5)) as url, connection(url, LONG) as made:
        eventually(lambda: not is_open(made))


def test_a_reader_that_trickles_is_cut(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SWEEP_SECONDS", 0.05)
    with_curve(service)
    settings = ServerSettings(slow_seconds=0.5, slowest_rate=10**9)
    with cells.serve(service, settings) as url, connection(url, LONG) as made:

        def cut() -> bool:
            with contextlib.suppress(OSError):
                made.recv(1)
            return not is_open(made)

        eventually(cut)


def test_a_reader_that_is_slow_but_steady_gets_everything(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SWEEP_SECONDS", 0.05)
    with_curve(service)
    expected = service.curve_json(parse_name("team/math"), 1, split=None, points=None)
    settings = ServerSettings(slow_seconds=0.1, slowest_rate=1000, stall_seconds=20)
    with cells.serve(service, settings) as url, connection(url, LONG[: len(LONG) // 8]) as made:
        received = b""
        while not received.endswith(expected):
            part = made.recv(65536)
            assert part
            received += part
            threading.Event().wait(0.002)


def test_answers_are_counted_until_they_are_read_or_their_reader_is_cut(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "SWEEP_SECONDS", 0.05)
    with_curve(service)
    made: list[FastAPI] = []
    real = create_app

    def create(*arguments: Any) -> FastAPI:
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr(cells, "create_app", create)
    with cells.serve(service, ServerSettings(stall_seconds=1.0)) as url, connection(url, LONG):
        memory: Memory = made[0].state.memory
        eventually(lambda: memory.used > 100_000)
        eventually(lambda: memory.used == 0)


def test_more_reads_of_a_long_curve_than_memory_is_meant_for_wait_or_are_refused(service: Service) -> None:
    with_curve(service, 10)
    service = Service(service.database, service.store, service.actor, limits=Limits(points=20_000))
    small: dict[str, Any] = {"memory_bytes": 16 * MIB, "max_upload_bytes": 64 * 1024, "max_body_bytes": 64 * 1024}
    app = create_app(service, ServerSettings(**small, max_points=20_000, queue_seconds=0.05))

    async def scene() -> None:
        memory: Memory = app.state.memory
        others = memory.lease(("address", "10.0.0.1"))
        await others.promise(4 * MIB)
        third = memory.lease(("address", "10.0.0.2"))
        await third.promise(2 * MIB)
        refused = await exchange(app, parts(), path=f"{UPLOAD}/1/curve", method="GET")()
        assert (refused.status, refused.problem.code) == (503, "unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        others.release()
        assert (await exchange(app, parts(), path=f"{UPLOAD}/1/curve", method="GET")()).status == 200
        assert memory.used == 2 * MIB

    asyncio.run(scene())


@contextlib.asynccontextmanager
async def stalled(
    app: FastAPI, count: int, size: int, address: str, path: str = UPLOAD
) -> AsyncIterator[list[Exchange]]:
    """Requests whose bodies stop arriving after a number of bytes."""
    stop = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b" " * size
        await stop.wait()

    made = [exchange(app, body(), path=path) for _ in range(count)]
    for each in made:
        each._scope["client"] = (address, 1)
    tasks = [asyncio.create_task(each()) for each in made]
    while not all(each.read == size or task.done() for each, task in zip(made, tasks, strict=True)):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    yield made
    stop.set()
    await asyncio.gather(*tasks)


SMALL: dict[str, Any] = {
    "memory_bytes": 16 * MIB,
    "max_upload_bytes": MIB,
    "max_body_bytes": MIB,
    "queue_seconds": 0.05,
}


@pytest.mark.parametrize("path", [UPLOAD, "/v1/namespaces"])
def test_bodies_that_stall_are_counted_and_an_address_gets_its_share_of_the_memory(service: Service, path: str) -> None:
    app = create_app(service, ServerSettings(**SMALL, host="0.0.0.0"))
    mine = bearer(service.create_token("writer", ["write"]).secret)
    real = exchange

    def exchange_as(*arguments: Any, **options: Any) -> Exchange:
        return real(*arguments, **options, authorization=mine["Authorization"])

    async def scene() -> None:
        memory: Memory = app.state.memory
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "exchange", exchange_as)
            async with stalled(app, 20, 800_000, "10.0.0.1", path) as made:
                assert 4 * MIB < memory.used <= 5 * MIB  # half of what bodies and answers may have
                refused = [each for each in made if each.status]
                assert {each.status for each in refused} == {429}
                assert refused[0].problem.code == "too-many-requests"
                assert int(refused[0].headers["retry-after"]) >= 1
        other = real(app, parts(expert_bytes(0)), authorization=mine["Authorization"])
        assert (await other()).status == 201
        assert memory.used == 0

    asyncio.run(scene())


def test_a_token_has_one_share_from_however_many_addresses(service: Service) -> None:
    secret = service.create_token("writer", ["write"]).secret
    app = create_app(service, ServerSettings(**SMALL, host="0.0.0.0"))

    async def scene() -> None:
        stop = asyncio.Event()

        async def body() -> AsyncIterator[bytes]:
            yield b" " * 800_000
            await stop.wait()

        made = [exchange(app, body(), authorization=f"Bearer {secret}") for _ in range(20)]
        for i, each in enumerate(made):
            each._scope["client"] = (f"10.0.{i}.1", 1)
        tasks = [asyncio.create_task(each()) for each in made]
        pending = set(tasks)
        # On a busy machine the first refusals may be of requests that waited too long for their turn.
        while pending and 429 not in {each.status for each in made}:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        assert app.state.memory.used <= 5 * MIB
        assert pending
        stop.set()
        await asyncio.gather(*tasks)

    asyncio.run(scene())


def test_bodies_that_together_need_more_than_there_is_get_through_one_after_the_other() -> None:
    async def scene() -> None:
        memory = Memory(300, body=100, share=1.0, wait=30.0)
        done: list[int] = []

        async def upload(number: int) -> None:
            lease = memory.lease(("address", "a"))
            for _ in range(10):
                await lease.grow(10)
                await asyncio.sleep(0)
                assert memory.used <= 300
            lease.grown()
            await asyncio.sleep(0)
            done.append(number)
            lease.release()

        await asyncio.gather(*(upload(number) for number in range(20)))
        assert sorted(done) == [*range(20)]
        assert memory.used == 0

    asyncio.run(scene())


def test_an_answer_larger_than_all_memory_is_sent_while_there_is_no_other() -> None:
    async def scene() -> None:
        memory = Memory(300, body=100, share=0.5, wait=0.05)
        large, small = memory.lease(("address", "a")), memory.lease(("address", "b"))
        await large.promise(1000)
        with pytest.raises(HttpError):
            await small.promise(10)
        waiting = asyncio.create_task(small.promise(10))
        await asyncio.sleep(0)
        large.release()
        await waiting
        small.release()
        assert memory.used == 0

    asyncio.run(scene())


def test_work_waits_in_rotation_and_a_turn_is_never_lost() -> None:
    async def scene() -> None:
        turns = Turns(1, "things", 30.0)
        order: list[str] = []

        async def work(owner: str) -> None:
            async with turns.one(owner):
                order.append(owner)
                await asyncio.sleep(0)

        greedy = [asyncio.create_task(work("greedy")) for _ in range(6)]
        await asyncio.sleep(0)
        modest = asyncio.create_task(work("modest"))
        greedy[3].cancel()
        await asyncio.wait([*greedy, modest])
        assert order.index("modest") <= 3
        assert order.count("greedy") == 5
        impatient = Turns(1, "things", 0.01)
        async with impatient.one("a"):
            with pytest.raises(HttpError, match="1 things are running"):
                async with impatient.one("b"):
                    raise AssertionError
        async with impatient.one("b"):
            pass

    asyncio.run(scene())


def test_work_takes_memory_in_order_and_gives_it_back_when_given_up() -> None:
    async def scene() -> None:
        workspace = Workspace(100)

        async def work(size: int) -> None:
            async with workspace.hold(size):
                await asyncio.sleep(0)

        async with workspace.hold(80):
            waiting = [asyncio.create_task(work(size)) for size in (50, 500, 30)]
            await asyncio.sleep(0)
            waiting[0].cancel()
            await asyncio.sleep(0)
        await asyncio.wait(waiting)
        async with workspace.hold(100):
            pass

    asyncio.run(scene())


def curve_body(points: int, fields: int) -> bytes:
    item = "{" + ",".join(f'"{i}":1' for i in range(fields)) + "}"
    return ('{"points":[' + ",".join([item] * points) + "]}").encode()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (curve_body(9000, 60), 413),
        (curve_body(1000, 60), 422),  # few enough values, and then only the first point is looked at
        (curve_body(1, 50_000), 422),
        (b"[" * 90_000, 400),
        (b"[" * 200_000, 413),
        (b'{"a":' * 30_000, 400),
        (b'{"points":[' + b"{}," * 40_000 + b"{}]}", 422),
        (b"{" + b",".join(b'"%d":1' % i for i in range(60_000)) + b"}", 422),
        (b'{"points":[' + b"9" * 100_000 + b"]}", 400),
        (b'{"points":[' + b'"' * 3, 422),
    ],
)
def test_a_body_of_many_values_costs_little(service: Service, body: bytes, status: int) -> None:
    app = create_app(service, ServerSettings())

    async def scene() -> None:
        assert (await exchange(app, parts(expert_bytes(0)))()).status == 201
        done = await exchange(app, parts(body), path=f"{UPLOAD}/1/curve")()
        assert done.status == status
        assert len(done.problem.errors or ()) <= 20
        assert len(done.body) < 10_000
        assert app.state.memory.used == 0

    asyncio.run(scene())


def test_values_are_counted_before_a_body_is_read() -> None:
    check_values(b'{"a": [1, 2, 3]}', 4)
    with pytest.raises(TooLargeError, match="more than 3 values"):
        check_values(b'{"a": [1, 2, 3]}', 3)


def test_slow_uploads_do_not_keep_others_from_uploading(service: Service) -> None:
    app = create_app(service, ServerSettings(concurrent_uploads=2, queue_seconds=0.5))

    async def scene() -> None:
        async with stalled(app, 8, 100_000, "127.0.0.1"):
            assert (await exchange(app, parts(expert_bytes(0)))()).status == 201

    asyncio.run(scene())


def test_writers_that_wait_do_not_keep_others_from_reading(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    release, waiting = threading.Event(), threading.Semaphore(0)

    def describe(*_: Any) -> Any:
        waiting.release()
        assert release.wait(30)
        raise TooLargeError("enough")

    monkeypatch.setattr(Service, "describe_expert", describe)

    async def scene() -> None:
        app = create_app(service, ServerSettings(write_threads=2, read_threads=1, queue_seconds=1.0))
        path = "/v1/experts/team/math"
        asked = [exchange(app, parts(b'{"description": "x"}'), path=path, method="PATCH") for _ in range(8)]
        tasks = [asyncio.create_task(each()) for each in asked]
        for _ in range(2):
            await asyncio.to_thread(waiting.acquire)
        assert (await exchange(app, parts(), path="/v1/experts", method="GET")()).status == 200
        assert (await exchange(app, parts(), path="/healthz", method="GET")()).status == 200
        while sum(task.done() for task in tasks) < 6:
            await asyncio.wait([task for task in tasks if not task.done()], return_when=asyncio.FIRST_COMPLETED)
        release.set()
        await asyncio.gather(*tasks)
        assert sorted(each.status for each in asked) == [413] * 2 + [503] * 6

    asyncio.run(scene())


def test_writers_that_wait_for_the_database_leave_connections_for_reads(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'registry.db'}", pool=5, timeout=1.0)
    migrate.migrate(database)
    release = threading.Event()
    began = threading.Semaphore(0)

    def write() -> None:
        began.release()
        with contextlib.suppress(Exception), database.write():
            release.wait(30)

    threads = [threading.Thread(target=write) for _ in range(6)]
    for thread in threads:
        thread.start()
        began.acquire()
    try:
        for _ in range(3):
            with database.read() as session:
                session.connection().exec_driver_sql("SELECT 1")
    finally:
        release.set()
        for thread in threads:
            thread.join()
        database.close()


def test_writers_of_sqlite_write_in_the_order_in_which_they_came() -> None:
    queue, order = WriterQueue(), list[int]()

    def write(number: int) -> None:
        with queue.turn(60):
            order.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    with queue.turn(60):
        for number, thread in enumerate(threads):
            thread.start()
            eventually(lambda number=number: len(queue._waiting) > number)
    for thread in threads:
        thread.join()
    assert order == sorted(order)


def test_a_writer_that_gives_up_does_not_keep_others_from_writing() -> None:
    queue = WriterQueue()
    with queue.turn(60), pytest.raises(UnavailableError, match="kept the database"), queue.turn(0.01):
        pass
    with queue.turn(0.01):
        pass


def test_a_writer_waits_for_other_processes_only_for_what_is_left_of_its_time(tmp_path: Path) -> None:
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'registry.db'}", timeout=3.0)) as database:
        for _ in range(2):
            with database.write() as session:
                left = int(session.connection().exec_driver_sql("PRAGMA busy_timeout").scalar_one())
                assert 0 < left <= 3000


def test_a_writer_that_another_process_keeps_waiting_is_told_when_to_come_again(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'registry.db'}", timeout=0.2)
    migrate.migrate(database)
    service = Service(database, LocalBlobs(tmp_path / "blobs"), Actor("cli", "someone"))
    with (
        client_of(service) as client,
        contextlib.closing(sqlite3.connect(tmp_path / "registry.db", isolation_level=None)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        refused = upload_answer(client)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        other.execute("ROLLBACK")
        assert upload_answer(client).status_code == 201


def upload_answer(client: Any) -> Any:
    return client.post(UPLOAD, content=expert_bytes(0), headers={"Content-Type": "application/octet-stream"})


@contextlib.contextmanager
def crowded(service: Service, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[str]:
    monkeypatch.setattr(protocol, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(protocol, "LOOK_SECONDS", 0.0)
    with cells.serve(service, ServerSettings(**settings)) as url:
        yield url


@pytest.mark.parametrize("limit", ["max_connections", "connections_per_address"])
def test_partial_heads_make_room_for_whole_ones(service: Service, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    with crowded(service, monkeypatch, **{limit: 4}) as url, contextlib.ExitStack() as stack:
        made = [stack.enter_context(connection(url, request("GET", "/v1/experts")[:-2])) for _ in range(4)]
        for _ in range(3):
            assert get(url, "/v1/experts")[0] == 200
        eventually(lambda: not is_open(made[0]))  # the oldest went first
        assert is_open(made[3])


def test_when_all_connections_work_the_next_ones_are_refused_and_health_is_told(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, waiting = threading.Event(), threading.Semaphore(0)

    def listed(*_: Any, **__: Any) -> str:
        waiting.release()
        assert release.wait(30)
        return '{"items":[],"next":null}'

    monkeypatch.setattr(Service, "list_experts_json", listed)
    with crowded(service, monkeypatch, max_connections=2) as url, contextlib.ExitStack() as stack:
        asked = request("GET", "/v1/experts")
        made = [stack.enter_context(connection(url, asked)) for _ in range(2)]
        for _ in made:
            assert waiting.acquire(timeout=30)
        status, headers, told = get(url, "/v1/namespaces")
        assert (status, told["code"], headers["content-type"]) == (503, "unavailable", "application/problem+json")
        assert int(headers["retry-after"]) >= 1
        assert headers["connection"] == "close"
        for _ in range(protocol.RESERVE + 5):
            stack.enter_context(connection(url, request("GET", "/healthz")[:-2]))
        assert get(url, "/healthz")[0] == 200
        release.set()
        for each in made:
            assert each.recv(4096).startswith(b"HTTP/1.1 200")


@contextlib.contextmanager
def full(service: Service, **settings: Any) -> Iterator[tuple[str, FastAPI]]:
    """A server whose only connection is taken by a client that has just come."""
    made: list[FastAPI] = []
    real = create_app

    def create(*arguments: Any) -> FastAPI:
        made.append(real(*arguments))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "create_app", create)
        patch.setattr(protocol, "FRESH_SECONDS", 600.0)
        with (
            cells.serve(service, ServerSettings(max_connections=1, **settings)) as url,
            connection(url, b"GET"),
        ):
            eventually(lambda: get(url, "/healthz")[1].get("connection") == "close")  # the first one is taken in
            yield url, made[0]


def metric(app: FastAPI, name: str) -> float:
    lines = app.state.metrics.render().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def read_all(made: socket.socket) -> bytes:
    received = b""
    while part := made.recv(65536):
        received += part
    return received


def test_refused_connections_cost_no_request(service: Service) -> None:
    with full(service) as (url, app):
        requests = metric(app, "t2_registry_requests_total")
        before = metric(app, "t2_registry_connections_refused_total")
        for path in ("/v1/experts", "/healthzz", "/v1/%00"):
            assert get(url, path)[0] == 503
        assert metric(app, "t2_registry_connections_refused_total") == before + 3
        assert metric(app, "t2_registry_requests_total") == requests


def test_a_refused_client_that_still_sends_sees_the_refusal(service: Service) -> None:
    head = request("POST", UPLOAD, "Content-Type: application/octet-stream", "Content-Length: 4000000")
    with full(service) as (url, _), connection(url, head) as made:
        made.sendall(b"x" * 4_000_000)
        assert read_all(made).startswith(b"HTTP/1.1 503 ")


def test_health_is_told_beyond_the_limit_however_its_request_is_cut(service: Service) -> None:
    with full(service) as (url, _), connection(url) as made:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        whole = request("GET", "/healthz?x=1")
        for start in range(len(whole)):
            made.sendall(whole[start : start + 1])
        assert b"alive" in read_all(made)


def test_refused_clients_that_stay_make_room_for_the_next(service: Service) -> None:
    with full(service) as (url, _), contextlib.ExitStack() as stack:
        refused = [stack.enter_context(connection(url, b"POST / HTTP/1.1\r\n")) for _ in range(protocol.RESERVE + 5)]
        assert get(url, "/healthz")[0] == 200
        eventually(lambda: not is_open(refused[0]))


def test_answers_end_their_connections_only_while_there_are_as_many_as_may_be(service: Service) -> None:
    with cells.serve(service, ServerSettings(connections_per_address=2)) as url:
        assert "connection" not in get(url, "/healthz")[1]
        with connection(url, request("GET", "/healthz")) as made:
            assert b"alive" in made.recv(4096)
            assert get(url, "/healthz")[1]["connection"] == "close"


def test_several_connections_are_accepted_between_two_rounds_of_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[int, Any]] = []

    def run(_: Any, sockets: list[socket.socket]) -> None:
        for each in sockets:
            given.append((each.fileno(), each.getsockname()))
            each.close()

    monkeypatch.setattr(uvicorn.Server, "run", run)
    monkeypatch.setattr(serve, "settle", lambda: None)
    # The loggers' levels would stay for other tests.
    monkeypatch.setattr(uvicorn.Config, "configure_logging", lambda self: None)
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    with contextlib.closing(Database(url)) as database:
        migrate.migrate(database)
    serve.serve(database_url=SecretStr(url), blobs=str(tmp_path / "blobs"), port=0)
    assert len({handle for handle, _ in given}) > 1
    assert len({address for _, address in given}) == 1


def test_requests_that_do_not_wait_for_answers_are_few(service: Service) -> None:
    with cells.serve(service, ServerSettings()) as url, connection(url, request("GET", "/healthz") * 2000) as made:
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := made.recv(65536):
                received += part
        assert received.count(b"alive") <= protocol.PIPELINED + 1


def test_who_goes_on_sending_a_refused_body_is_cut(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SWEEP_SECONDS", 0.05)
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.2)
    service.create_token("someone", ["read"])
    head = request("POST", UPLOAD, "Content-Type: application/octet-stream", "Content-Length: 1000000")
    with cells.serve(service, ServerSettings()) as url, connection(url, head) as made:
        assert made.recv(4096).startswith(b"HTTP/1.1 401")

        def cut() -> bool:
            try:
                made.sendall(b"x")
            except OSError:
                return True
            return False

        eventually(cut)


def test_line_feeds_do_not_keep_an_idle_connection(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SWEEP_SECONDS", 0.05)
    with (
        cells.serve(service, ServerSettings(idle_seconds=1)) as url,
        connection(url, request("GET", "/healthz")) as made,
    ):
        assert b"alive" in made.recv(4096)

        def cut() -> bool:
            try:
                made.sendall(b"\r\n")
            except OSError:
                return True
            return not is_open(made)

        eventually(cut)


def test_readers_that_leave_are_a_line_each_in_the_log(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with_curve(service)
    with cells.serve(service, ServerSettings()) as url:
        for i in range(40):
            with connection(url, LONG if i % 2 else request("GET", "/v1/experts") * 3) as made:
                if i % 4 > 1:
                    made.recv(100)
                if i % 3:
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert get(url, "/healthz")[0] == 200
    lines = [record for record in caplog.records if record.name.startswith(("t2", "uvicorn", "asyncio"))]
    assert not [record for record in lines if record.exc_info or record.levelno >= logging.ERROR]
    gone = [record for record in lines if record.name == "t2.registry.access" and " 499 " in record.getMessage()]
    assert gone
    assert all("\n" not in record.getMessage() for record in lines)


def test_workers_end_with_a_parent_that_was_killed(postgres_url: str, tmp_path: Path) -> None:
    database = Database(postgres_url)
    migrate.migrate(database)
    database.close()
    config = tmp_path / "registry.toml"
    config.write_text(f'database_url = "{postgres_url}"\nblobs = "{tmp_path / "blobs"}"\ndatabase_pool = 4\n')
    with process("--workers", "2", "--config", str(config)) as (server, url):
        where = urlsplit(url)
        address = (where.hostname or "", where.port or 0)

        def answers() -> bool:
            with contextlib.suppress(OSError, http.client.HTTPException):
                return get(url, "/healthz")[0] == 200
            return False

        def port_is_free() -> bool:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(address)
                except OSError:
                    return False
                return True

        eventually(answers, seconds=120)
        server.send_signal(signal.SIGKILL)
        server.wait(timeout=60)
        eventually(port_is_free, seconds=180)  # a worker that has just begun first loads its modules


def test_a_disk_that_is_nearly_full_is_not_ready(tmp_path: Path) -> None:
    with embedded(tmp_path, min_free_bytes=2**62) as (_, client):
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert answer.json()["detail"] == "database: its disk is full, or nearly; store: its disk is full, or nearly"
        assert str(tmp_path) not in answer.text
    with embedded(tmp_path, min_free_bytes=0) as (_, client):
        assert client.get("/readyz").status_code == 200


def test_a_disk_that_takes_no_bytes_is_not_ready(tmp_path: Path) -> None:
    with embedded(tmp_path, min_free_bytes=0) as (_, client):
        assert client.get("/healthz").status_code == 200
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # empty files can still be made, as on a full disk
        try:
            answer = client.get("/readyz")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert answer.status_code == 503
        assert "store: it cannot be reached or used" in answer.json()["detail"]
        assert "database: it cannot be reached or used" in answer.json()["detail"]


def test_a_database_that_can_only_be_read_is_not_ready(postgres_url: str, tmp_path: Path) -> None:
    database = Database(postgres_url)
    migrate.migrate(database)
    with database.connect(write=False) as one:
        name = one.exec_driver_sql("SELECT current_database()").scalar()
        one.exec_driver_sql(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    database.close()
    with pytest.raises(Exception, match="can only be read"):
        Database(postgres_url).check_writable()


@pytest.mark.parametrize(
    ("client", "forwarded", "expected"),
    [
        (("9.9.9.9", 1), ["1.1.1.1"], "9.9.9.9"),  # only proxies are believed
        (("10.0.0.1", 1), ["1.1.1.1"], "1.1.1.1"),
        (("10.0.0.1", 1), ["6.6.6.6, 1.1.1.1"], "1.1.1.1"),  # what the client itself wrote comes first
        (("10.0.0.1", 1), ["6.6.6.6", "1.1.1.1, 10.0.0.2"], "1.1.1.1"),
        (("::ffff:10.0.0.1", 1), ["1.1.1.1"], "1.1.1.1"),
        (("10.0.0.1", 1), ["nonsense"], "10.0.0.1"),
        (("10.0.0.1", 1), [], "10.0.0.1"),
        (("2001:db8:1:2:3::4", 1), [], "2001:db8:1:2::/64"),
        (("::1", 1), [], "::1"),
        (None, ["1.1.1.1"], ""),
    ],
)
def test_the_address_that_a_share_is_counted_for(client: Any, forwarded: list[str], expected: str) -> None:
    assert Addresses(["10.0.0.0/8"]).of(client, forwarded) == expected


def test_one_host_has_one_share_in_ipv6() -> None:
    assert share_of("2001:db8::1") == share_of("2001:db8::ffff:2")
    assert share_of("2001:db8::1") != share_of("2001:db8:0:1::1")
    assert share_of("::ffff:1.2.3.4") == "1.2.3.4"


def test_uncounted_endless_bodies_are_still_refused(service: Service) -> None:
    with client_of(service) as client:
        app: Any = client.app
        assert asyncio.run(exchange(app, endless(MIB), path="/v1/namespaces")()).status == 413
        assert app.state.memory.used == 0
