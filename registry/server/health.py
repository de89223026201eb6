"""Whether the server lives, and whether it can do its work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from t2.core.errors import T2Error, UnavailableError
from t2.registry.db import migrate
from t2.registry.server.log import log
from t2.registry.services.service import Service

CHECK_SECONDS = 2.0
"""How long database and store may take to answer."""
FRESH_SECONDS = 0.5
"""How long an answer is given again: nobody loads the database by asking."""
_HANGING = 4


class Readiness:
    """Checks database, schema and store, each in threads of its own, so that one that hangs is told as such."""

    def __init__(self, service: Service) -> None:
        self._checks: dict[str, Callable[[], None]] = {
            "database": lambda: migrate.check_current(service.database),
            "store": lambda: service.store.check(),
        }
        self._threads = {name: ThreadPoolExecutor(_HANGING, f"check-{name}") for name in self._checks}
        self._running = dict.fromkeys(self._checks, 0)
        self._probe: asyncio.Task[dict[str, str]] | None = None
        self._until = 0.0

    async def __call__(self) -> dict[str, str]:
        """What is wrong with which part; empty when nothing is."""
        if self._probe is None or (self._probe.done() and time.monotonic() >= self._until):
            self._probe = asyncio.create_task(self._check_all())
        return await asyncio.shield(self._probe)

    def close(self) -> None:
        """Let the threads end; those that hang are not waited for."""
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)

    async def _check_all(self) -> dict[str, str]:
        found = await asyncio.gather(*(self._check(name) for name in self._checks))
        self._until = time.monotonic() + FRESH_SECONDS
        return {name: failure for name, failure in zip(self._checks, found, strict=True) if failure is not None}

    async def _check(self, name: str) -> str | None:
        if self._running[name] >= _HANGING:
            return "earlier checks hang"
        self._running[name] += 1
        future = asyncio.wrap_future(self._threads[name].submit(self._checks[name]))
        future.add_done_callback(lambda _: self._ended(name))
        try:
            await asyncio.wait_for(asyncio.shield(future), CHECK_SECONDS)
        except TimeoutError:
            future.add_done_callback(lambda late: late.cancelled() or late.exception())
            return f"no answer within {CHECK_SECONDS:g} s"
        except UnavailableError as error:
            # Its own text may name hosts and folders, so only the log has it.
            log.warning("not ready: %s: %s", name, error)
            return "it cannot be reached or used"
        except T2Error as error:
            log.warning("not ready: %s: %s", name, error)
            return "its schema is not this server's" if name == "database" else "it refuses"
        return None

    def _ended(self, name: str) -> None:
        self._running[name] -= 1
