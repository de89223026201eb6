"""How a connection speaks HTTP: as uvicorn does with httptools, without waiting, and without waiting for ever."""

from __future__ import annotations

import asyncio
import socket

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 20.0
"""How long a client may take for the head of a request, from the connection or the head's first byte on."""
HEAD_BYTES = 32 * 1024
"""Of a request's first line and headers."""


class PromptProtocol(HttpToolsProtocol):
    """Sends the parts of an answer as they come, and bounds the head of a request in time and size.

    The head and the body of an answer are written apart. With Nagle's algorithm the body waits for the client to
    confirm the head, 40 ms on Linux; asyncio turns that off only for sockets made with an explicit protocol number,
    which uvicorn's own are not.

    uvicorn waits for ever for a head that is not whole, and anybody could hold all connections so, without a token; and
    the parser takes a head of any size.
    """

    _waiting: asyncio.TimerHandle | None = None
    _fed = 0
    """Bytes that came since the head began, and with it."""
    _told = 0
    """Bytes of the head's parts that are whole."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._waiting is not None:
            self._fed += len(data)
            if self._fed > HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._fed = self._told = 0
        if self._waiting is None:
            self._await_head()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        if self._waiting is not None:  # what follows a chunked body is no header, whatever its name
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._forget_head()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget_head()

    def _count(self, size: int) -> None:
        self._told += size
        if self._told > HEAD_BYTES:
            raise ValueError("the head is too large")  # the parser stops, and uvicorn answers 400

    def _await_head(self) -> None:
        self._waiting = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _forget_head(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        # uvicorn does not say that it is None before the first request.
        if self.cycle is not None and not self.cycle.response_complete:  # type: ignore[redundant-expr]
            self._await_head()  # the head of another request after one that is still being answered
        else:
            self._waiting = None
            self.transport.close()
