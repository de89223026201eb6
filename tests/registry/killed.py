"""A process that others are forked from, to be killed while they work on a registry.

Run as ``python -m tests.registry.killed``: it reads jobs as lines of JSON, forks a process for each, answers with its
pid, and with its wait status once it is gone. A worker kills itself at a named point where its job says so; nothing of
that is in the product.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy.engine.default import DefaultDialect

from t2.core.errors import ConflictError, RegistryError
from t2.core.references import ExpertName
from t2.registry.blobs.local import LocalBlobs
from t2.registry.blobs.s3 import S3Blobs
from t2.registry.open import open_configured
from t2.registry.server.serve import serve
from t2.registry.services.garbage import Policy, collect
from t2.registry.settings import ServerSettings
from tests.registry.samples import expert_bytes

POINTS: dict[str, tuple[Any, str]] = {
    "write": (tempfile, "mkstemp"),
    "fsync": (os, "fsync"),
    "rename": (os, "replace"),
    "commit": (DefaultDialect, "do_commit"),
    "put": (S3Blobs, "_put"),
    "delete folder": (LocalBlobs, "delete"),
    "delete bucket": (S3Blobs, "delete"),
}
"""Where a worker may kill itself: a function, before or after its n-th call."""

FILES = [expert_bytes(seed) for seed in range(48)]
UPLOADS = 40


def main() -> None:
    """Fork a worker for each job."""
    for line in sys.stdin:
        jobs = json.loads(line)
        pids = []
        for job in jobs:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    work(job)
                    code = 0
                except RegistryError as error:
                    print(error, file=sys.stderr)
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitpid(pid, 0)[1] for pid in pids]), flush=True)


def work(job: dict[str, Any]) -> None:
    """Do a job; ``point``, ``when`` and ``count`` say where to die."""
    sys.stdin = open(os.devnull)  # noqa: SIM115, PTH123 - for the life of the process
    if job.get("point"):
        arm(*POINTS[job["point"]], job["when"], job["count"])
    os.environ.update(job["environment"])
    if job["kind"] == "serve":
        for stream in (1, 2):
            os.dup2(os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        serve(None)
        return
    with open_configured(ServerSettings()) as service:
        if job["kind"] == "collect":
            while True:
                collect(service.database, service.store, service.actor, Policy(grace=timedelta(0)))
        publish = service.publish
        threads = [threading.Thread(target=upload, args=(publish, job, thread)) for thread in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def upload(publish: Callable[..., Any], job: dict[str, Any], thread: int) -> None:
    """Upload experts, and write down what was acknowledged; the same content goes under many names at once."""
    chosen = random.Random(f"{job['seed']}-{thread}")
    acknowledged = os.open(job["acknowledged"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for turn in range(UPLOADS):
        seed = chosen.randrange(len(FILES))
        name = ExpertName("kill", f"e{chosen.randrange(6)}" if turn % 2 else f"w{job['seed']}-{thread}-{turn}")
        with contextlib.suppress(ConflictError):  # others were quicker, three times
            version = publish(name, FILES[seed], idempotency_key=f"{job['seed']}-{thread}-{turn}")
            os.write(acknowledged, f"{json.dumps([version.name, version.version, seed])}\n".encode())


def arm(owner: Any, name: str, when: str, count: int) -> None:
    """Replace a function by one that kills this process at its n-th call."""
    original = getattr(owner, name)
    lock = threading.Lock()
    left = count

    def die(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if last and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, die)


def acknowledged(path: Path) -> list[tuple[str, int, int]]:
    """Name, version and seed of everything acknowledged; only a last line can be cut."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [tuple(json.loads(line)) for line in lines]


if __name__ == "__main__":
    main()
