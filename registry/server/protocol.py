"""Connections: uvicorn's HTTP protocol, bounded in time, size and number.

Why uvicorn and a subclass of its protocol, and not another server, tried with a head that trickles, a body that stops
and a client that reads nothing of a 50 MB answer:

* granian 2.8 bounds heads in time and size. A body that stops and a client that does not read stay for ever; an
  answer is handed over whole to its own buffers, so an application never knows when its memory is free again.
* hypercorn 0.18 bounds heads and pauses between reads (``read_timeout``). It waits for ever for a client to read, has
  no least rate, so a byte now and then is enough, and no limit of connections.
* uvicorn 0.54 itself bounds idle connections in time and all of them in number, and what is over the limit gets an
  answer. It has no deadline for heads, bodies and readers, and no limit of a head's size.

A proxy in front bounds heads and bodies, but a registry on a laptop or in a small team has none, and the proxy's own
connections need the rest. So these are here:

* **One sweep** a second over all connections closes those that wait for their client for too long: for the rest of a
  head, the next request, the rest of a refused body, or for it to read. Bodies that a handler reads have their deadline
  where they are read (:func:`t2.registry.server.bodies.read_parts`), because that has an answer.
* **When there are too many** connections, of one address or altogether, the one that has waited longest for its client
  is closed for the new one. Without such a one the new connection gets ``/healthz`` and status 503 only. That refusal
  is the same bytes for all and is sent before anything is parsed, so that refusing a thousand connections a second
  leaves the processor to others.
* **The head** of a request is bounded in size; so are requests that are sent without waiting for answers.

It relies on these of uvicorn's names: ``cycle`` with ``response_complete``, ``more_body`` and ``body``, ``pipeline``,
``app_state`` (what the application's lifespan yields) and the callbacks of httptools.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import socket
import struct
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from t2.registry.server.limits import Addresses, share_of
from t2.registry.server.log import log
from t2.registry.server.problems import problem

if TYPE_CHECKING:
    from t2.registry.server.metrics import Metrics
    from t2.registry.settings import ServerSettings

T = TypeVar("T")
CONNECTIONS = "t2.connections"
"""Key of the worker's :class:`Connections` in the lifespan's state."""
CONNECTION = "t2.connection"
"""Key of a request's :class:`Connection` in its ASGI scope."""
_CYCLE = "t2.cycle"
HEALTH = "/healthz"
"""Answered on every connection."""
_HEALTH_HEADS = tuple(f"{method} {HEALTH}{end}".encode() for method in ("GET", "HEAD") for end in " ?")
SWEEP_SECONDS = 0.25
"""Between two looks at all connections."""
REPORT_SECONDS = 10.0
"""At least between two lines of the log about refused connections."""
RESERVE = 128
"""Connections beyond the limit, which get ``/healthz`` or status 503."""
BATCH = 64
"""Connections that one look for those that would make room finds."""
LOOK_SECONDS = 0.1
"""Between looks for connections that would make room, unless one found many."""
FRESH_SECONDS = 0.5
"""A connection that has waited for its client for less does not make room for another."""
LINGER_SECONDS = 5.0
"""How long the rest of a body is thrown away after its answer; a client that still sends would not see the answer."""
PIPELINED = 16
"""Requests that a client may send before the answer to the first."""
UNSENT_BYTES = 256 * 1024
"""Bytes of an answer that wait in the kernel beside those on the way; more would hide that a client does not read."""
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
]
"""Of every answer."""


def _build_refusal() -> bytes:
    """The answer on a connection beyond the limit."""
    answer = problem(
        Request({"type": "http"}), 503, "the server has as many connections as it may; try again in a second"
    )
    headers = [*answer.raw_headers, *HEADERS, (b"cache-control", b"no-store"), (b"connection", b"close")]
    lines = [b"HTTP/1.1 503 Service Unavailable", *(name + b": " + value for name, value in headers), b"", b""]
    return b"\r\n".join(lines) + bytes(answer.body)


_REFUSAL = _build_refusal()


class Connections:
    """The open connections of a worker."""

    def __init__(self, settings: ServerSettings, addresses: Addresses, metrics: Metrics) -> None:
        self.settings = settings
        self._addresses, self._metrics = addresses, metrics
        self._open: dict[Connection, str | None] = {}
        """With the address whose share they are in; None for trusted proxies."""
        self._of: Counter[str] = Counter()
        self._surplus: dict[Connection, None] = {}
        """The oldest first."""
        self._refused: dict[Connection, None] = {}
        """Those of the surplus that have their refusal, and may still send what nobody reads."""
        self._refusals, self._reported_at = 0, 0.0
        """Connections that were refused since the log said so, and when that was."""
        self._stalled: dict[str | None, deque[Connection]] = {}
        """Who would make room, by address, as found at the last look; the one that has waited longest first."""
        self._looked_until: dict[str | None, float] = {}
        """Until when nobody is looked for who would make room, by address."""
        self._sweeping: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Connection) -> None:
        """Take in a new connection, and close another one where there are too many."""
        client = connection.client
        address = None if client is None or self._addresses.is_proxy(client[0]) else share_of(client[0])
        self._open[connection] = address
        if address is not None:
            self._of[address] += 1
        if self._sweeping is None:
            self._sweeping = connection.loop.call_later(SWEEP_SECONDS, self._sweep, connection.loop)
        if address is not None and self._of[address] > self.settings.connections_per_address:
            self._make_room(connection, address)
        elif len(self._open) > self.settings.max_connections:
            self._make_room(connection, None)

    def is_crowded(self, connection: Connection) -> bool:
        """Whether there are as many connections as may be, of its address or altogether."""
        address = self._open.get(connection)
        of_address = 0 if address is None else self._of[address]
        return of_address >= self.settings.connections_per_address or len(self._open) >= self.settings.max_connections

    def remove(self, connection: Connection) -> None:
        """Forget a connection."""
        if connection in self._open:
            address = self._open.pop(connection)
            self._surplus.pop(connection, None)
            self._refused.pop(connection, None)
            if address is not None:
                self._of[address] -= 1
                if not self._of[address]:
                    del self._of[address]
                    self._looked_until.pop(address, None)
                    self._stalled.pop(address, None)

    def refuse(self, connection: Connection) -> None:
        """Note that a connection has its refusal."""
        self._count_refusal()
        self._refused[connection] = None

    def _count_refusal(self) -> None:
        self._metrics.refused()
        self._refusals += 1

    def _make_room(self, new: Connection, address: str | None) -> None:
        now = new.loop.time()
        longest = self._find_stalled(new, address, now)
        if longest is not None:
            longest.cut()
            return
        new.surplus = True
        self._surplus[new] = None
        if len(self._surplus) > RESERVE:
            oldest = next(iter(self._refused or self._surplus))
            if oldest not in self._refused:
                self._count_refusal()
            oldest.cut()

    def _find_stalled(self, new: Connection, address: str | None, now: float) -> Connection | None:
        """The connection that has waited longest for its client, of one address or of all; None without one."""
        stalled = self._stalled.setdefault(address, deque())
        if not stalled and now >= self._looked_until.get(address, 0.0):
            waits = [
                (since, each)
                for each, its_address in self._open.items()
                if each is not new and not each.surplus and (address is None or its_address == address)
                if (since := each.waits_since(now)) is not None
            ]
            stalled.extend(each for _, each in heapq.nsmallest(BATCH, waits, key=itemgetter(0)))
            if len(stalled) < BATCH:
                # Who makes a thousand connections a second does not make the server look at all others as often.
                self._looked_until[address] = now + LOOK_SECONDS
        while stalled:
            found = stalled.popleft()
            if found in self._open and found.waits_since(now) is not None:
                return found
        return None

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for each in [*self._open]:
            if each.is_overdue(now):
                each.cut()
        if self._refusals and now - self._reported_at > REPORT_SECONDS:
            log.warning("%d connections were refused, as there were too many", self._refusals)
            self._refusals, self._reported_at = 0, now
        self._sweeping = loop.call_later(SWEEP_SECONDS, self._sweep, loop) if self._open else None


class Connection(HttpToolsProtocol):
    """One connection.

    The head and the body of an answer are written apart. With Nagle's algorithm the body waits for the client to
    confirm the head, 40 ms on Linux; asyncio turns that off only for sockets made with an explicit protocol number,
    which uvicorn's own are not.

    Attributes:
        surplus: there were too many when it came; it gets ``/healthz`` or a refusal.
        sent: bytes of answers that were given to it.
        lost: it is closed.
    """

    surplus = False
    sent = 0
    _beginning: bytes | None = b""
    """Bytes of the first request while it may be one for ``/healthz``; kept for surplus connections only."""
    _refused_at: float | None = None
    lost = False
    _table: Connections
    _is_new = True
    """Whether no request has come yet."""
    _in_head = True
    """Whether a head is awaited or arrives; the trailer of a chunked body is not a head."""
    _head_began: float | None = None
    _fed = 0
    """Bytes that came since the head began, and with it."""
    _told = 0
    """Bytes of the head's parts that are whole."""
    _quiet_since = 0.0
    """When it was made, or its last answer was given to it."""
    _heard_at = 0.0
    """When bytes last came."""
    _left = 0
    """Bytes of answers that had left it when it was last looked at, and when."""
    _looked_at = 0.0
    _moved_at = 0.0
    """When an answer last moved on."""
    _blocked = 0.0
    """Seconds for which answers have waited for the client, and bytes that left meanwhile."""
    _drained = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        self._table = self.app_state[CONNECTIONS]
        super().connection_made(transport)
        self._quiet_since = self._heard_at = self._looked_at = self._moved_at = self.loop.time()
        self._table.add(self)
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family != socket.AF_UNIX and not self.lost:
            milliseconds = int(self._table.settings.stall_seconds * 1000)
            # What lies in the kernel when the connection is closed goes as well when nobody reads it.
            options = {"TCP_NODELAY": 1, "TCP_USER_TIMEOUT": milliseconds, "TCP_NOTSENT_LOWAT": UNSENT_BYTES}
            for name, value in options.items():
                if hasattr(socket, name):
                    with contextlib.suppress(OSError):  # it may be closed already
                        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._table.remove(self)
        super().connection_lost(exc)

    def cut(self) -> None:
        """Close it at once; what it has not sent yet is dropped."""
        self._table.remove(self)
        if self.lost:
            return
        with contextlib.suppress(RuntimeError, OSError):  # it may be closed already
            if self._unsent:
                # Reset: otherwise the kernel keeps what it has of the answer until the client reads it.
                connection = self.transport.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()

    def give_up(self, scope: Scope) -> None:
        """Close it, as its last request gets no whole answer; uvicorn would take that for a defect."""
        scope[_CYCLE].disconnected = True
        self.cut()

    @property
    def is_gone(self) -> bool:
        """Whether nothing can be sent any more."""
        return self.lost or self.transport.is_closing()

    def watched(self, call: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
        """uvicorn's ``receive`` or ``send``, where the end of the connection is a client that went and no defect.

        uvloop's transports raise RuntimeError from the moment in which they are closed; uvicorn learns of it later.
        """

        async def run(*arguments: Any) -> T:
            if self.is_gone:
                raise ClientDisconnect
            try:
                return await call(*arguments)
            except (RuntimeError, OSError) as error:
                if self.is_gone:
                    raise ClientDisconnect from error
                raise

        return run

    @property
    def is_last(self) -> bool:
        """Whether its next answer has to be its last one, so that others have their turn."""
        return self.surplus or self._table.is_crowded(self)

    @property
    def answered(self) -> bool:
        """Whether its last request has its whole answer."""
        # uvicorn does not say that it is None before the first request.
        return self.cycle is None or self.cycle.response_complete  # type: ignore[redundant-expr]

    def waits_since(self, now: float) -> float | None:
        """Since when it has waited for its client; None while it works, or has waited for a moment only."""
        since: float | None = None
        if self._unsent:
            since, least = self._moved_at, FRESH_SECONDS
        elif self.answered:
            since, least = self._quiet_since, FRESH_SECONDS
        elif self.cycle.more_body and not self.cycle.body and not self.pipeline:
            since, least = self._heard_at, FRESH_SECONDS
        return since if since is not None and now - since >= least else None

    def is_overdue(self, now: float) -> bool:
        """Whether it has waited for its client for too long; looked at once in a sweep."""
        settings = self._table.settings
        if self._refused_at is not None:
            return now - self._refused_at > LINGER_SECONDS
        if self._reads_too_slowly(now):
            return True
        if self._unsent or not self.answered:
            # The head of another request, after one that is still being answered, has its time afterwards.
            return False
        waited = now - self._quiet_since
        if not self._in_head:  # the rest of a body whose answer is out
            return waited > LINGER_SECONDS
        if self._head_began is not None or self._is_new:
            return now - max(self._head_began or 0.0, self._quiet_since) > settings.head_seconds
        return waited > settings.idle_seconds

    def _reads_too_slowly(self, now: float) -> bool:
        settings = self._table.settings
        unsent, since = self._unsent, now - self._looked_at
        left = self.sent - unsent
        moved = left > self._left or not unsent
        if moved:
            self._moved_at = now
        if unsent:
            self._blocked += since
            self._drained += max(0, left - self._left)
        elif self.answered:
            self._blocked, self._drained = 0.0, 0
        self._left, self._looked_at = left, now
        owed = (self._blocked - settings.slow_seconds) * settings.slowest_rate
        return now - self._moved_at > settings.stall_seconds or self._drained < owed

    @property
    def _unsent(self) -> int:
        return self.transport.get_write_buffer_size()

    def _refuse(self, data: bytes) -> None:
        """Answer the first bytes of a surplus connection with a refusal."""
        self._refused_at = self.loop.time()
        self._table.refuse(self)
        self.transport.write(_REFUSAL)
        if data.startswith((b"GET ", b"HEAD ")) and data.endswith(b"\r\n\r\n"):
            self.transport.close()
        else:
            # Closed while the client still sends, the connection would be reset, and the client not see the answer.
            self.transport.write_eof()

    def data_received(self, data: bytes) -> None:
        if self._refused_at is not None:
            return
        if self.surplus and self._beginning is not None:
            data, self._beginning = self._beginning + data, None
            if any(head.startswith(data) for head in _HEALTH_HEADS):
                self._beginning = data
                return
            if not data.startswith(_HEALTH_HEADS):
                self._refuse(data)
                return
        self._heard_at = self.loop.time()
        whole = self._in_head  # else the first bytes are of a body
        super().data_received(data)
        if whole and self._head_began is not None:
            self._fed += len(data)
            if self._fed > self._table.settings.max_head_bytes and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[CONNECTION] = self  # type: ignore[literal-required]  # for the gate
        self._fed = self._told = 0
        self._is_new, self._in_head, self._head_began = False, True, self._heard_at

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        if self._in_head:  # what follows a chunked body is no header, whatever its name
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._head_began = False, None
        if len(self.pipeline) >= PIPELINED:
            raise ValueError("too many requests wait for their answers")  # as in _count
        super().on_headers_complete()
        self.scope[_CYCLE] = self.cycle  # type: ignore[literal-required]

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True

    def on_response_complete(self) -> None:
        self._quiet_since = self.loop.time()
        super().on_response_complete()

    def _count(self, size: int) -> None:
        self._told += size
        if self._told > self._table.settings.max_head_bytes:
            raise ValueError("the head is too large")  # the parser stops, and uvicorn answers 400
