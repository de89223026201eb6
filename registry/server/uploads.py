"""Uploads: as many at once as memory is meant for, each within its limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import anyio
from starlette.requests import Request

from t2.registry.server.bodies import read_body
from t2.registry.server.metrics import Metrics
from t2.registry.server.operations import BINARY, check_type
from t2.registry.server.places import Places

T = TypeVar("T")

WAIT_SECONDS = 5.0
"""How long an upload waits for its turn, unread, before it is told to come back."""


class Uploads:
    """Holds at most ``concurrent`` bodies of at most ``limit`` bytes in memory."""

    def __init__(self, concurrent: int, limit: int, metrics: Metrics) -> None:
        self._limit = limit
        self._places = Places(concurrent, "uploads")
        self._metrics = metrics
        self._threads = anyio.CapacityLimiter(concurrent)

    async def take(self, request: Request, use: Callable[[bytes], T]) -> T:
        """Read the body and give it to ``use`` in a thread of its own.

        Raises:
            HttpError: too many uploads have been running for a while, or the body is of another type.
            TooLargeError: the body is over the limit.
        """
        check_type(request, BINARY)
        async with self._places.one(WAIT_SECONDS):
            data = await read_body(request, self._limit)
            # Not to be given up when the client goes: the work would go on without counting as an upload.
            done = await anyio.to_thread.run_sync(use, data, limiter=self._threads)
            self._metrics.uploaded(len(data))
            return done
