"""Whether the server lives, and whether it can do its work."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from t2.core.errors import T2Error, UnavailableError
from t2.registry.blobs.local import LocalBlobs
from t2.registry.db import migrate
from t2.registry.server.log import log
from t2.registry.services.service import Service

CHECK_SECONDS = 2.0
"""How long database and store may take to answer."""
FRESH_SECONDS = 0.5
"""How long an answer is given again: nobody loads the database by asking."""
_HANGING = 4


class _FullError(UnavailableError):
    """A disk has too little space left."""


def _check_space(folder: Path | None, least: int) -> None:
    if folder is None:
        return
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent  # the first upload makes it
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UnavailableError(f"cannot look at {folder}: {error.strerror or error}") from error
    if free < least:
        raise _FullError(f"the disk of {folder} has {free} bytes left, less than min_free_bytes {least}; free space")


class Readiness:
    """Checks database, schema, store and the space on their disks, each in threads of its own.

    A check that hangs is then reported as such.
    """

    def __init__(self, service: Service, min_free_bytes: int) -> None:
        """Prepare; ``min_free_bytes`` is the least free space on the disks that the server writes to by itself."""
        database, store = service.database, service.store
        database_disk = Path(database.engine.url.database or "").parent if database.is_sqlite else None
        store_disk = Path(store.location) if isinstance(store, LocalBlobs) else None

        def check_database() -> None:
            migrate.check_current(database)
            database.check_writable()
            _check_space(database_disk, min_free_bytes)

        def check_store() -> None:
            store.check()
            _check_space(store_disk, min_free_bytes)

        self._checks: dict[str, Callable[[], None]] = {"database": check_database, "store": check_store}
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
        except _FullError as error:
            log.warning("not ready: %s: %s", name, error)
            return "its disk is full, or nearly"
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
