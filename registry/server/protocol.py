"""How a connection speaks HTTP: as uvicorn does with h11, and without waiting."""

from __future__ import annotations

import asyncio
import socket

from uvicorn.protocols.http.h11_impl import H11Protocol


class PromptProtocol(H11Protocol):
    """Sends the parts of an answer as they come.

    The head and the body are written apart. With Nagle's algorithm the body waits for the client to confirm the head,
    40 ms on Linux; asyncio turns that off only for sockets made with an explicit protocol number, which uvicorn's own
    are not.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as H11Protocol has it
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)
