"""An open loop of HTTP requests: sent when their time has come, however long the answers before take.

A request's latency counts from the time it was due, not from when a connection was free for it, so a server that stops
for a second is seen to keep two hundred requests waiting and not one ("coordinated omission"). The client is bare
asyncio, because it shares the processors with what it measures.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    """One GET request.

    Attributes:
        kind: under which it is counted.
        path: with its query, quoted.
    """

    kind: str
    path: str


@dataclass
class Result:
    """What a run of the loop found.

    Attributes:
        latencies: seconds from due to answered, by kind, of the answers with status 200.
        errors: how many were answered otherwise or not at all, by kind and reason.
        seconds: from the first due time to the last answer.
        late: the largest delay, in seconds, with which the loop itself sent a request for which a connection was free.
    """

    latencies: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    late: float = 0.0


class _Connection(asyncio.Protocol):
    """One kept connection, with at most one request on it."""

    def __init__(self, loop: _Loop) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._wanted = -1
        self.request: Request | None = None
        self.due = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self, request: Request, due: float, raw: bytes) -> None:
        assert self._transport is not None
        self.request, self.due = request, due
        self._transport.write(raw)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._wanted < 0:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._buffer[:end]).lower()
            at = head.find(b"content-length:")
            length = head[at + 15 :].split(b"\r\n", 1)[0] if at >= 0 else b"0"
            self._wanted = end + 4 + int(length)
        if len(self._buffer) >= self._wanted:
            status = int(self._buffer[9:12])
            self._buffer.clear()
            self._wanted = -1
            self._loop.answered(self, status)

    def connection_lost(self, exc: Exception | None) -> None:
        self._loop.lost(self)


class _Loop:
    def __init__(self, host: str, port: int, headers: dict[str, str]) -> None:
        self._address = host, port
        self._tail = f" HTTP/1.1\r\nHost: {host}:{port}\r\n".encode()
        self._tail += b"".join(f"{name}: {value}\r\n".encode() for name, value in headers.items()) + b"\r\n"
        self._free: deque[_Connection] = deque()
        self._waiting: deque[tuple[float, Request]] = deque()
        self._open = 0
        self._done = asyncio.Event()
        self._left = 0
        self._began = 0.0
        self.result = Result()

    async def run(self, requests: Sequence[Request], rate: float, connections: int) -> Result:
        self._left = len(requests)
        for _ in range(connections):
            await self._connect()
        self._began = time.perf_counter()
        for i, request in enumerate(requests):
            due = i / rate
            pause = due - self._now()
            if pause > 0:
                await asyncio.sleep(pause)
            if self._free:
                self.result.late = max(self.result.late, self._now() - due)
                self._send(self._free.popleft(), request, due)
            else:
                self._waiting.append((due, request))
        await self._done.wait()
        self.result.seconds = self._now()
        return self.result

    def answered(self, connection: _Connection, status: int) -> None:
        request = connection.request
        assert request is not None
        if status == 200:
            self.result.latencies.setdefault(request.kind, []).append(self._now() - connection.due)
        else:
            self._failed(request, f"status {status}")
        connection.request = None
        self._count()
        if self._waiting:
            due, following = self._waiting.popleft()
            self._send(connection, following, due)
        else:
            self._free.append(connection)

    def lost(self, connection: _Connection) -> None:
        if connection.request is not None:
            self._failed(connection.request, "connection lost")
            self._count()
        if connection in self._free:
            self._free.remove(connection)
        if self._left:
            self._connecting = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        _, connection = await asyncio.get_running_loop().create_connection(lambda: _Connection(self), *self._address)
        if self._waiting:
            due, request = self._waiting.popleft()
            self._send(connection, request, due)
        else:
            self._free.append(connection)

    def _send(self, connection: _Connection, request: Request, due: float) -> None:
        connection.send(request, due, b"GET " + request.path.encode() + self._tail)

    def _failed(self, request: Request, reason: str) -> None:
        key = f"{request.kind}: {reason}"
        self.result.errors[key] = self.result.errors.get(key, 0) + 1

    def _count(self) -> None:
        self._left -= 1
        if not self._left:
            self._done.set()

    def _now(self) -> float:
        return time.perf_counter() - self._began


def run_open_loop(
    host: str, port: int, requests: Sequence[Request], *, rate: float, connections: int, headers: dict[str, str]
) -> Result:
    """Send requests at a steady rate over kept connections, and wait for all answers.

    Args:
        rate: requests a second.
        connections: how many; a request that finds none free waits, which counts.
        headers: sent with every request.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        return asyncio.run(_Loop(host, port, headers).run(requests, rate, connections))
    finally:
        gc.enable()
        gc.unfreeze()


def percentile(sorted_values: Sequence[float], share: float) -> float:
    """The smallest value that a share of all do not exceed."""
    return sorted_values[min(len(sorted_values) - 1, max(0, -int(-share * len(sorted_values) // 1) - 1))]
