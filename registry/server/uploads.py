"""Uploads: read within the worker's memory, checked and stored in their turn."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.requests import Request

from t2.registry.server.bodies import read_parts
from t2.registry.server.limits import LEASE, Lease, Turns, Workspace, finish
from t2.registry.server.metrics import Metrics
from t2.registry.server.operations import BINARY, check_type
from t2.registry.settings import ServerSettings

T = TypeVar("T")

WORK_FACTOR = 3
"""Bytes that checking and storing a file take beside it, for each of its own."""


class Uploads:
    """Reads bodies of uploads; a slow one keeps the bytes that have arrived and no thread."""

    def __init__(self, settings: ServerSettings, workspace: Workspace, metrics: Metrics) -> None:
        self._settings, self._workspace, self._metrics = settings, workspace, metrics
        self._turns = Turns(settings.concurrent_uploads, "uploads", settings.queue_seconds)
        self._threads = ThreadPoolExecutor(settings.concurrent_uploads, "upload")

    async def take(self, request: Request, use: Callable[[bytes], T]) -> T:
        """Read the body and give it to ``use`` in a thread.

        Raises:
            HttpError: too many uploads have been running for a while, or the body is of another type.
            TooLargeError: the body is over the limit.
        """
        check_type(request, BINARY)
        parts = await read_parts(request, self._settings.max_upload_bytes, self._settings)
        size = sum(map(len, parts))
        lease: Lease = request.scope[LEASE]

        def work() -> T:
            data = b"".join(parts)
            parts.clear()
            return use(data)

        async with self._turns.one(lease.owner), self._workspace.hold(WORK_FACTOR * size):
            done = await finish(self._threads, work)
        self._metrics.uploaded(size)
        return done

    def close(self) -> None:
        """Wait for the uploads that are being stored."""
        self._threads.shutdown()
