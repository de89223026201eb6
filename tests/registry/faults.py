"""Proxies that stand before a PostgreSQL and an S3 server, and fail some of the calls that go through."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import psycopg.conninfo

_RESET = struct.pack("ii", 1, 0)
_STATEMENTS = 12
"""A transaction's fault comes at one of its first so many statements."""


@dataclass
class Faults:
    """How often and how calls fail; may be changed at any time.

    Attributes:
        rate: share of calls, of transactions for a database and of requests for a store.
        kinds: of which one is drawn: ``error``, ``reset``, ``delay``; and those that strike after the call took effect,
            ``late error`` and ``late reset``.
        delay: seconds.
        struck: how often each came.
    """

    rate: float = 0.0
    kinds: tuple[str, ...] = ("error", "reset", "delay", "late error", "late reset")
    delay: float = 5.0
    seed: int = 0
    struck: Counter[str] = field(default_factory=Counter)
    calls: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._lock = threading.Lock()

    def draw(self) -> str | None:
        """The fault of the next call, None for most."""
        with self._lock:
            self.calls += 1
            if self._random.random() >= self.rate:
                return None
            return self._random.choice(self.kinds)

    def position(self) -> int:
        """At which of a transaction's statements its fault comes; at the first where all fail."""
        with self._lock:
            return self._random.randrange(_STATEMENTS) if self.rate < 1 else 0

    def strike(self, kind: str) -> None:
        with self._lock:
            self.struck[kind] += 1


@contextmanager
def database_proxy(url: str, faults: Faults) -> Iterator[str]:
    """A PostgreSQL URL that leads to the database of another through faults."""
    parts = psycopg.conninfo.conninfo_to_dict(url)
    host, port = str(parts.get("host") or "localhost"), int(parts.get("port") or 5432)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def connect() -> socket.socket:
            if host.startswith("/"):
                upstream = socket.socket(socket.AF_UNIX)
                upstream.connect(f"{host}/.s.PGSQL.{port}")
                return upstream
            return socket.create_connection((host, port))

        def accept() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=_relay, args=(client, connect(), faults), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        secret = f":{parts['password']}" if parts.get("password") else ""
        here = f"127.0.0.1:{listener.getsockname()[1]}"
        yield f"postgresql://{parts.get('user', 'postgres')}{secret}@{here}/{parts['dbname']}"
        listener.shutdown(socket.SHUT_RDWR)


def _relay(client: socket.socket, upstream: socket.socket, faults: Faults) -> None:
    """Pass bytes both ways; what the client sends is looked at."""
    muted = threading.Event()

    def back() -> None:
        with contextlib.suppress(OSError):
            while data := upstream.recv(65536):
                if not muted.is_set():
                    client.sendall(data)
        _reset(client)

    threading.Thread(target=back, daemon=True).start()
    pending: str | None = None
    left = 0
    with contextlib.suppress(OSError):
        while data := client.recv(65536):
            if b"BEGIN" in data and pending is None:
                pending = faults.draw()
                left = faults.position() if pending else 0
            if pending is not None and (left == 0 or b"COMMIT" in data):
                kind, pending = pending, None
                faults.strike(kind)
                if kind == "delay":
                    time.sleep(faults.delay)
                else:
                    muted.set()
                    if kind.startswith("late"):
                        upstream.sendall(data)
                        time.sleep(0.05)
                    if kind.endswith("error"):
                        client.sendall(_fatal())
                        time.sleep(0.05)
                    break
            elif pending is not None:
                left -= 1
            elif faults.rate >= 1:
                break
            upstream.sendall(data)
    _reset(client)
    _reset(upstream)


def _fatal() -> bytes:
    """PostgreSQL's message of an administrator who ends a session."""
    fields = b"SFATAL\0VFATAL\0C57P01\0Mterminating connection due to administrator command\0\0"
    return b"E" + struct.pack("!i", len(fields) + 4) + fields


def _reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@contextmanager
def store_proxy(
    endpoint: str, faults: Faults, refuse: Callable[[str, Mapping[str, str]], tuple[int, str] | None] | None = None
) -> Iterator[str]:
    """The URL of an S3 endpoint that leads to another through faults.

    Args:
        refuse: given a request's method and headers, the status and code that it is refused with, or None.
    """
    where = urlsplit(endpoint).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def relay(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            refusal = refuse(self.command, dict(self.headers)) if refuse is not None else None
            if refusal is not None:
                self.tell(*refusal)
                return
            fault = faults.draw()
            if fault is not None:
                faults.strike(fault)
            if fault == "delay":
                time.sleep(faults.delay)
            if fault in {"error", "reset"}:
                self.fail(fault)
                return
            upstream = http.client.HTTPConnection(where, timeout=60)
            try:
                headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
                upstream.request(self.command, self.path, body=body or None, headers=headers)
                answer = upstream.getresponse()
                content = answer.read()
            except (OSError, http.client.HTTPException):
                self.fail("reset")
                return
            finally:
                upstream.close()
            if fault == "late error":
                self.fail(fault)
                return
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in {"transfer-encoding", "connection", "content-length"}:
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
            if answer.status != 204:
                self.send_header("Content-Length", length or "0")
            self.end_headers()
            if fault == "late reset":
                self.wfile.write(content[: len(content) // 2])
                self.fail(fault)
            elif self.command != "HEAD":
                self.wfile.write(content)

        def fail(self, fault: str) -> None:
            self.close_connection = True
            if fault.endswith("reset"):
                _reset(self.connection)
                return
            self.tell(*random.choice([(500, "InternalError"), (503, "SlowDown"), (503, "ServiceUnavailable")]))

        def tell(self, status: int, code: str) -> None:
            content = f"<Error><Code>{code}</Code><Message>secret-of-the-store</Message></Error>".encode()
            self.send_response_only(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    for method in ("GET", "PUT", "HEAD", "DELETE", "POST"):
        setattr(Handler, f"do_{method}", Handler.relay)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
