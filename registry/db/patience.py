"""Connections to PostgreSQL that end when the server stays silent."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import psycopg


class PatientConnection(psycopg.Connection[Any]):
    """A connection that is closed when the server sends nothing for too long.

    A server's own timeouts do not help where it is stopped or hangs, nor those of TCP: the kernel under it goes on to
    acknowledge what it is sent.

    Attributes:
        silence: seconds without a sign of the server after which it is given up; None to wait for ever.
    """

    silence: float | None = None

    def wait(self, gen: Generator[Any, Any, Any], *arguments: Any, **options: Any) -> Any:
        """Wait for the server, as all of the driver's methods do.

        Raises:
            psycopg.OperationalError: it was silent for too long; the connection is closed.
        """
        if self.silence is not None:
            gen = self._while_it_speaks(gen, self.silence)
        return super().wait(gen, *arguments, **options)

    def _while_it_speaks(self, gen: Generator[Any, Any, Any], silence: float) -> Generator[Any, Any, Any]:
        try:
            wanted = next(gen)
            heard = time.monotonic()
            while True:
                ready = yield wanted  # 0 when the driver looked and there was nothing, some times a second
                if ready:
                    heard = time.monotonic()
                elif time.monotonic() - heard > silence:
                    self.pgconn.finish()
                    raise psycopg.OperationalError(f"the server has said nothing for {silence:g} s")
                wanted = gen.send(ready)
        except StopIteration as end:
            return end.value
