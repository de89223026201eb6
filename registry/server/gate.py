"""What every request passes on its way in and every answer on its way out; plain ASGI, because all pay for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from t2.registry.server.log import access, log, new_request_id, subject
from t2.registry.server.metrics import METHODS, Metrics
from t2.registry.server.problems import hidden, problem

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_GONE = 499
"""Logged and counted for a client that went before its answer."""
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
]
_NO_STORE = (b"cache-control", b"no-store")


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Gate:
    """Checks the Host and the origin, names the request, and counts, logs and protects its answer."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, *, hosts: Sequence[str] | None, origins: Sequence[str] = ()
    ) -> None:
        """Wrap an application.

        Args:
            hosts: names that the server may be called by; None for any.
            origins: whose pages may read; ``*`` is all of them. Credentials of a browser are never let through.
        """
        self._app = app
        self._metrics = metrics
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
        started = False
        headers = Headers(scope=scope)
        reading = self._origin_headers(headers.get("origin"))

        async def answer(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                sent: list[tuple[bytes, bytes]] = message["headers"]
                sent += _HEADERS
                sent += reading
                sent.append((b"x-request-id", name))
                if not any(key == b"cache-control" for key, _ in sent):
                    sent.append(_NO_STORE)
                if status in (408, 413):
                    # The rest of the body is not read.
                    sent.append((b"connection", b"close"))
            await send(message)

        try:
            refusal = self._refusal(Request(scope), headers)
            if refusal is not None:
                await refusal(scope, receive, answer)
            else:
                await self._app(scope, receive, answer)
        except ClientDisconnect:
            status = _GONE
        except Exception:  # noqa: BLE001 - the last place where a defect can become an answer
            log.exception("%s failed", name.decode())
            if not started:
                request = Request(scope)
                await problem(request, 500, hidden(request, 500))(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - began
            self._metrics.ended(scope["method"], _template(scope), status, seconds)
            self._log(scope, status, seconds, name)

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
