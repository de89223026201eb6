"""Limits: of bodies while they stream, of uploads at once, of time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.types import Message

from t2.core.references import parse_name
from t2.registry.open import open_embedded
from t2.registry.server.app import CURVES, create_app
from t2.registry.server.problems import Problem
from t2.registry.services.service import Service
from t2.registry.settings import ServerSettings
from tests.registry.samples import expert_bytes, run_bytes

UPLOAD = "/v1/experts/team/math/versions"
LIMIT = 4096


class Exchange:
    """One request given to the application message by message, and its answer."""

    def __init__(self, app: FastAPI, method: str, path: str, headers: dict[str, str], parts: AsyncIterator[bytes]):
        self._app, self._parts = app, parts
        self._scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost"), *((k.encode(), v.encode()) for k, v in headers.items())],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self.read = 0
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""

    async def __call__(self) -> Exchange:
        await self._app(self._scope, self._receive, self._send)
        return self

    @property
    def problem(self) -> Problem:
        return Problem.model_validate_json(self.body)

    async def _receive(self) -> Message:
        part = await anext(self._parts, None)
        if part is None:
            return {"type": "http.request", "body": b"", "more_body": False}
        self.read += len(part)
        return {"type": "http.request", "body": part, "more_body": True}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {key.decode(): value.decode() for key, value in message["headers"]}
        else:
            self.body += message.get("body", b"")


async def parts(*given: bytes) -> AsyncIterator[bytes]:
    for each in given:
        yield each


async def endless(size: int = 1024) -> AsyncIterator[bytes]:
    while True:
        yield b"x" * size


def exchange(
    app: FastAPI, body: AsyncIterator[bytes], *, path: str = UPLOAD, method: str = "POST", **headers: str
) -> Exchange:
    kind = "application/octet-stream" if path == UPLOAD else "application/json"
    given = {"content-type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return Exchange(app, method, path, given, body)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with open_embedded(tmp_path) as service:
        yield service


def app_of(service: Service, **settings: Any) -> FastAPI:
    return create_app(service, ServerSettings(max_upload_bytes=LIMIT, max_body_bytes=1024, **settings))


@asynccontextmanager
async def blocked(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[[], Awaitable[Exchange]]]:
    """An upload that is in the middle of being stored; call it to let it end."""
    going, wait = threading.Event(), threading.Event()
    real = Service.publish

    def slowly(*arguments: Any, **options: Any) -> Any:
        going.set()
        assert wait.wait(30)
        return real(*arguments, **options)

    monkeypatch.setattr(Service, "publish", slowly)
    task = asyncio.create_task(exchange(app, parts(expert_bytes(0)))())
    await asyncio.to_thread(going.wait, 30)

    async def end() -> Exchange:
        wait.set()
        return await task

    yield end
    await end()


@pytest.mark.parametrize(("path", "limit"), [(UPLOAD, LIMIT), ("/v1/namespaces", 1024)])
def test_a_body_over_the_limit_is_not_read_on(service: Service, path: str, limit: int) -> None:
    done = asyncio.run(exchange(app_of(service), endless(), path=path)())
    assert done.status == 413
    assert done.problem.code == "too-large"
    assert str(limit) in done.problem.detail
    assert done.read <= limit + 1024
    # What is left of it is not the next request.
    assert done.headers["connection"] == "close"


@pytest.mark.parametrize(("path", "limit"), [(UPLOAD, LIMIT), ("/v1/namespaces", 1024)])
def test_a_body_that_says_it_is_over_the_limit_is_not_read_at_all(service: Service, path: str, limit: int) -> None:
    done = asyncio.run(exchange(app_of(service), endless(), path=path, content_length=str(limit + 1))())
    assert (done.status, done.read) == (413, 0)


def test_a_length_that_lies_does_not_help(service: Service) -> None:
    app = app_of(service)
    assert asyncio.run(exchange(app, endless(), content_length="10")()).status == 413
    for length in ("-1", "1e3", "0x10", "٣", ""):
        assert asyncio.run(exchange(app, endless(), content_length=length)()).status == 400, length


def test_nothing_is_read_from_who_may_not_write(service: Service) -> None:
    reader = service.create_token("reader", ["read"]).secret
    app = app_of(service)
    for headers, status in (({}, 401), ({"authorization": f"Bearer {reader}"}, 403)):
        done = asyncio.run(exchange(app, endless(), **headers)())
        assert (done.status, done.read) == (status, 0)


def test_an_upload_of_exactly_the_limit_is_taken(service: Service) -> None:
    data, other = expert_bytes(0, matrices=6), expert_bytes(1, matrices=6)
    app = create_app(service, ServerSettings(max_upload_bytes=len(data)))
    assert asyncio.run(exchange(app, parts(data[:10], data[10:]))()).status == 201
    assert asyncio.run(exchange(app, parts(other, b"x"))()).status == 413


def test_more_uploads_than_memory_is_meant_for_are_told_to_come_back(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        app = app_of(service, concurrent_uploads=1, queue_seconds=0.05)
        async with blocked(app, monkeypatch) as end:
            refused = await exchange(app, parts(expert_bytes(1)))()
            assert refused.status == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.problem.code == "unavailable"
            # Others are served meanwhile.
            assert (await exchange(app, parts(), path="/v1/experts", method="GET")()).status == 200
            assert (await end()).status == 201
        assert (await exchange(app, parts(expert_bytes(1)))()).status == 201

    asyncio.run(scene())


def test_an_upload_waits_for_its_turn(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        app = app_of(service, concurrent_uploads=1)
        async with blocked(app, monkeypatch) as end:
            second = asyncio.create_task(exchange(app, parts(expert_bytes(1)))())
            await asyncio.sleep(0.05)
            assert not second.done()
            assert (await end()).status == 201
        assert (await second).status == 201

    asyncio.run(scene())


def test_an_upload_that_fails_or_is_refused_leaves_its_place(service: Service) -> None:
    async def scene() -> None:
        app = app_of(service, concurrent_uploads=1)
        for body in (parts(b"nonsense"), endless(), parts(b"")):
            assert (await exchange(app, body)()).status in (413, 422)
        assert (await exchange(app, parts(expert_bytes(0)))()).status == 201

    asyncio.run(scene())


def test_a_body_that_stops_arriving_is_given_up(service: Service) -> None:

    async def stalled() -> AsyncIterator[bytes]:
        yield b"x" * 100
        await asyncio.sleep(60)

    done = asyncio.run(exchange(app_of(service, stall_seconds=0.05), stalled())())
    assert done.status == 408
    assert "100 bytes" in done.problem.detail
    assert done.headers["connection"] == "close"


@pytest.mark.parametrize("limit", ["body_seconds", "slow_seconds"])
def test_a_body_that_trickles_is_given_up(service: Service, limit: str) -> None:
    async def trickle() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.02)

    assert asyncio.run(exchange(app_of(service, **{limit: 0.1}), trickle())()).status == 408


def test_a_slow_body_that_keeps_to_the_slowest_rate_is_taken(service: Service) -> None:
    data = expert_bytes(0)

    async def slowly() -> AsyncIterator[bytes]:
        yield data[:1000]
        await asyncio.sleep(1.2)
        yield data[1000:]

    app = app_of(service, slow_seconds=1.0, slowest_rate=1)
    assert asyncio.run(exchange(app, slowly())()).status == 201


def test_few_curves_are_read_at_once(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, several = 0, 0, threading.Event()
    lock = threading.Lock()
    real = Service.curve_json

    def curve(*arguments: Any, **options: Any) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            if running > 1:
                several.set()
        several.wait(30)  # the first waits for company, so that none is alone by chance
        try:
            return real(*arguments, **options)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(Service, "curve_json", curve)

    async def scene() -> list[Exchange]:
        app = app_of(service)
        assert (await exchange(app, parts(expert_bytes(0)))()).status == 201
        wanted = [exchange(app, parts(), path=f"{UPLOAD}/1/curve", method="GET") for _ in range(30)]
        return await asyncio.gather(*(each() for each in wanted))

    assert {done.status for done in asyncio.run(scene())} == {200}
    assert 1 < most <= CURVES


def test_comparisons_take_turns_and_one_that_would_wait_long_is_told_to_come_back(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = service.push_run("team", run_bytes())
    query = f"baseline={run.digest}&candidate={run.digest}&margin=0.02".encode()
    going, wait = threading.Event(), threading.Event()
    real = Service.verdict

    def slowly(*arguments: Any) -> Any:
        going.set()
        assert wait.wait(30)
        return real(*arguments)

    monkeypatch.setattr(Service, "verdict", slowly)

    async def scene() -> None:
        app = app_of(service, queue_seconds=0.05)

        def asked() -> Exchange:
            made = exchange(app, parts(), path="/v1/verdict", method="GET")
            made._scope["query_string"] = query
            return made

        first = asyncio.create_task(asked()())
        await asyncio.to_thread(going.wait, 30)
        refused = await asked()()
        assert (refused.status, refused.problem.code) == (503, "unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await exchange(app, parts(), path="/v1/runs", method="GET")()).status == 200
        wait.set()
        assert (await first).status == 200
        assert (await asked()()).status == 200

    asyncio.run(scene())


def test_a_client_that_goes_leaves_its_place_and_nothing_behind(service: Service) -> None:
    async def scene() -> None:
        app = app_of(service, concurrent_uploads=1)
        gone = exchange(app, parts())
        messages: Iterator[Message] = iter(
            [{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}]
        )

        async def receive() -> Message:
            return next(messages)

        gone._receive = receive  # type: ignore[method-assign]
        assert (await gone()).status == 0
        assert (await exchange(app, parts(expert_bytes(0)))()).status == 201

    asyncio.run(scene())
    assert service.list_versions(parse_name("team/math")).items[0].version == 1


def test_a_page_and_a_curve_have_their_limits(service: Service) -> None:
    app = app_of(service)
    assert asyncio.run(exchange(app, parts(expert_bytes(0)))()).status == 201
    point = b'{"step":%d,"split":"train","reward":0,"score":0,"seconds":0}'
    many = b'{"points":[' + b",".join(point % step for step in range(10_001)) + b"]}"
    large = create_app(service, ServerSettings())
    done = asyncio.run(exchange(large, parts(many), path=f"{UPLOAD}/1/curve")())
    assert done.status == 422
    assert "10000" in done.problem.detail
