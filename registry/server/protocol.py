"""How a connection speaks HTTP: as uvicorn does with h11, without waiting, and without waiting for ever."""

from __future__ import annotations

import asyncio
import socket

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0
"""How long a client may take for the head of a request, from the connection or the head's first byte on."""


class PromptProtocol(H11Protocol):
    """Sends the parts of an answer as they come, and closes connections on which no request comes.

    The head and the body are written apart. With Nagle's algorithm the body waits for the client to confirm the head,
    40 ms on Linux; asyncio turns that off only for sockets made with an explicit protocol number, which uvicorn's own
    are not.

    uvicorn waits for ever for a head that is not whole, and anybody could hold all connections so, without a token.
    """

    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as H11Protocol has it
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget_head()

    def _await_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _give_up(self) -> None:
        self._head = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()
