"""Places for work that takes much memory or time: so many at once, and others wait a little."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from t2.registry.server.problems import HttpError


class Places:
    """Lets at most ``count`` in at once."""

    def __init__(self, count: int, what: str) -> None:
        """Prepare; ``what`` names those inside, such as ``uploads``."""
        self._count, self._what = count, what
        self._free = asyncio.Semaphore(count)

    @asynccontextmanager
    async def one(self, wait: float) -> AsyncIterator[None]:
        """A place, within ``wait`` seconds.

        Raises:
            HttpError: none was free in time.
        """
        try:
            async with asyncio.timeout(wait):
                await self._free.acquire()
        except TimeoutError:
            raise HttpError(503, f"{self._count} {self._what} are running, the limit; try again in a second") from None
        try:
            yield
        finally:
            self._free.release()
