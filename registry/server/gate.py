"""What every request passes on its way in and every answer on its way out; plain ASGI, because all pay for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from t2.registry.server.limits import LEASE, Addresses, Memory
from t2.registry.server.log import access, log, new_request_id, subject
from t2.registry.server.metrics import METHODS, Metrics
from t2.registry.server.problems import HttpError, hidden, problem
from t2.registry.server.protocol import CONNECTION, HEADERS, Connection

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
PIECE = 64 * 1024
"""Bytes of an answer that are given to the connection at once."""
_GONE = 499
"""Logged and counted for a client that went before its answer."""
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_NO_STORE = (b"cache-control", b"no-store")


class Gate:
    """Checks the Host and the origin, names the request, and counts, logs and protects its answer."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        memory: Memory,
        addresses: Addresses,
        *,
        hosts: Sequence[str] | None,
        origins: Sequence[str] = (),
    ) -> None:
        """Wrap an application.

        Args:
            memory: what requests and answers may hold.
            addresses: knows which address a request counts for.
            hosts: names that the server may be called by; None for any.
            origins: whose pages may read; ``*`` is all of them. Credentials of a browser are never let through.
        """
        self._app = app
        self._metrics, self._memory, self._addresses = metrics, memory, addresses
        self._hosts = frozenset(host.lower() for host in hosts) if hosts is not None else None
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        self._metrics.began()
        name = new_request_id(scope).encode()
        status = _GONE
        started = ended = failed = False
        headers = Headers(scope=scope)
        reading = self._origin_headers(headers.get("origin"))
        connection: Connection | None = scope.get(CONNECTION)
        address = self._addresses.of(scope.get("client"), headers.getlist("x-forwarded-for"))
        scope[LEASE] = lease = self._memory.lease(("address", address))
        if connection is not None:
            receive, send = connection.watched(receive), connection.watched(send)
        head: Message | None = None
        no_room: HttpError | None = None

        async def answer(message: Message) -> None:
            nonlocal head, no_room, ended
            if message["type"] == "http.response.start":
                head = message  # kept back until the memory for what follows is there
                return
            if head is not None:
                if not message.get("more_body", False):
                    try:
                        lease.keep(len(message.get("body", b"")))
                    except HttpError as error:
                        no_room = error  # not raised: the framework takes the answer for begun
                        return
                await begin(head)
                head = None
            await self._send(message, send, connection)
            ended = not message.get("more_body", False)

        async def begin(message: Message) -> None:
            nonlocal status, started
            status, started = message["status"], True
            sent: list[tuple[bytes, bytes]] = message["headers"]
            sent += HEADERS
            sent += reading
            sent.append((b"x-request-id", name))
            if not any(key == b"cache-control" for key, _ in sent):
                sent.append(_NO_STORE)
            # The rest of a body that is refused is not read.
            if status in (408, 413) or (connection is not None and connection.is_last):
                sent.append((b"connection", b"close"))
            await send(message)

        try:
            refusal = self._refusal(Request(scope), headers)
            if refusal is not None:
                await refusal(scope, receive, answer)
            else:
                await self._app(scope, receive, answer)
                if no_room is not None:
                    await problem(Request(scope), no_room.status, str(no_room))(scope, receive, answer)
        except ClientDisconnect:
            pass
        except asyncio.CancelledError:  # the server's end, for which it has waited
            if connection is None:
                raise
        except Exception:  # noqa: BLE001 - the last place where a defect can become an answer
            failed = True
            log.exception("%s failed", name.decode())
            if not started:
                request = Request(scope)
                await problem(request, 500, hidden(request, 500))(scope, receive, answer)
        finally:
            lease.release()
            if not ended:
                status = status if failed else _GONE
                if connection is not None:
                    connection.give_up(scope)
            seconds = time.perf_counter() - began
            self._metrics.ended(scope["method"], _template(scope), status, seconds)
            self._log(scope, status, seconds, name)

    async def _send(self, message: Message, send: Send, connection: Connection | None) -> None:
        """Send a part of an answer, in pieces, so that of a whole one little lies in the connection's own buffer.

        Raises:
            ClientDisconnect: the client went, or was cut off for not reading.
        """
        body: bytes = message.get("body", b"")
        if len(body) <= PIECE:
            if connection is not None:
                connection.sent += len(body)
            await send(message)
            return
        for start in range(0, len(body), PIECE):
            if connection is not None:
                connection.sent += min(PIECE, len(body) - start)
            more = start + PIECE < len(body) or message.get("more_body", False)
            await send({"type": "http.response.body", "body": body[start : start + PIECE], "more_body": more})

    def _refusal(self, request: Request, headers: Headers) -> Response | None:
        hosts = headers.getlist("host")
        if self._hosts is not None and (len(hosts) != 1 or _name(hosts[0]) not in self._hosts):
            return problem(
                request, 421, "the server is not called by the name in Host; the setting allowed_hosts adds names"
            )
        origin = headers.get("origin")
        if request.method in _SAFE:
            if request.method == "OPTIONS" and self._allows(origin) and "access-control-request-method" in headers:
                return Response(status_code=204)
            return None
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") or origin is not None:
            return problem(request, 403, "a web page of another origin may not change the registry")
        return None

    def _allows(self, origin: str | None) -> bool:
        return origin is not None and ("*" in self._origins or origin in self._origins)

    def _origin_headers(self, origin: str | None) -> list[tuple[bytes, bytes]]:
        if not self._origins:
            return []
        if not self._allows(origin):
            return [(b"vary", b"Origin")]
        assert origin is not None
        return [
            (b"vary", b"Origin"),
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-allow-methods", b"GET, HEAD"),
            (b"access-control-allow-headers", b"Authorization, If-None-Match, Range"),
            (b"access-control-expose-headers", b"Content-Range, ETag, Retry-After, X-Request-Id"),
        ]

    def _log(self, scope: Scope, status: int, seconds: float, name: bytes) -> None:
        # The path as it was sent, still quoted, so that no name breaks the line; the query may hold anything.
        path = scope.get("raw_path", b"").partition(b"?")[0][:300].decode("ascii", "backslashreplace")
        method = scope["method"] if scope["method"] in METHODS else "other"
        access.info("%s %s %s %d %.1f ms %s", name.decode(), method, path, status, seconds * 1000, subject(scope))


def _name(host: str) -> str:
    """A Host header without its port."""
    name, colon, port = host.lower().rpartition(":")
    return name if colon and (port.isdecimal() or not port) else host.lower()


def _template(scope: dict[str, Any] | Scope) -> str:
    route = scope.get("route")
    return route.path if isinstance(route, APIRoute) else "unknown"
