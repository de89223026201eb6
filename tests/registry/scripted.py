"""A real HTTP server on this machine that answers as it is told, faults among the answers."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

RESET = "reset"
"""Take the request and cut the connection."""
CUT = "cut"
"""Begin an answer and cut the connection."""
SILENT = "silent"
"""Take the request and say nothing."""
DRIP = "drip"
"""Answer without end, a byte at a time."""


@dataclass(frozen=True)
class Asked:
    """A request as it arrived; header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    """An answer."""

    status: int = 200
    body: bytes = b"{}"
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})


def reply(value: Any, status: int = 200) -> Reply:
    """JSON."""
    return Reply(status, json.dumps(value).encode())


def problem(status: int, code: str, detail: str, **headers: str) -> Reply:
    """An error as a registry tells it."""
    body = json.dumps({"type": f"urn:t2:problem:{code}", "status": status, "code": code, "detail": detail})
    return Reply(status, body.encode(), {"Content-Type": "application/problem+json", **headers})


def html(status: int) -> Reply:
    """An answer of some other server's."""
    return Reply(status, b"<html><body>nginx</body></html>", {"Content-Type": "text/html; charset=utf-8"})


class Scripted:
    """The server: its address, what it was asked, and what it says next; the last answer is repeated."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.asked: list[Asked] = []
        self.script: list[Reply | str] = []
        self.stopping = threading.Event()

    def says(self, *replies: Reply | str) -> None:
        self.script = list(replies)

    @property
    def paths(self) -> Sequence[str]:
        return [asked.path for asked in self.asked]

    def next(self) -> Reply | str:
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]


@contextlib.contextmanager
def scripted() -> Iterator[Scripted]:
    """Start one on a free port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            state.asked.append(Asked(self.command, self.path, headers, body))
            said = state.next()
            if isinstance(said, Reply):
                self.send_response(said.status)
                for name, value in said.headers.items():
                    self.send_header(name, value)
                if said.status != 204:
                    self.send_header("Content-Length", str(len(said.body)))
                self.end_headers()
                self.wfile.write(said.body)
                return
            self.close_connection = True
            if said == SILENT:
                state.stopping.wait(30)
            elif said == DRIP:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                with contextlib.suppress(OSError):
                    while not state.stopping.is_set():
                        self.wfile.write(b" ")
                        time.sleep(0.02)
            elif said == CUT:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
            else:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815 - http.server's names

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    state = Scripted(server.server_port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        state.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()
