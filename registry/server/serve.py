"""Running the server: what is checked before it listens, and uvicorn's settings."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from t2.core.errors import ArgumentError
from t2.registry.db import migrate
from t2.registry.open import is_embedded, open_database, open_server
from t2.registry.server.app import create_app
from t2.registry.server.auth import is_loopback, may_be_open
from t2.registry.server.log import log
from t2.registry.server.metrics import SHARED
from t2.registry.server.protocol import RESERVE
from t2.registry.services import tokens
from t2.registry.settings import ServerSettings, load_settings

GRACE_SECONDS = 30
"""How long requests in work may take to end after SIGTERM."""
BACKLOG = 2048
"""Connections that wait to be accepted; beyond them the kernel lets clients wait for seconds before their next try."""
ACCEPTED = 16
"""Handles of the listening socket, and so connections accepted between two rounds of work.

uvloop accepts one connection of each handle in a round. With one handle, a new connection waits for as many rounds of
work as there are connections before it.
"""
GARBAGE = 20_000
"""Objects made and still there that set off a collection of the youngest; a page of a list makes thousands."""
TURN_SECONDS = 0.0005
"""How long a thread computes while others wait to; Python's own 5 ms are longer than most answers take."""
_SPARE_FILES = 200
"""Open files beside the connections: the database's, the store's, the listener, threads' own."""
_WORKER = "_T2_REGISTRY_WORKER"


def serve(file: Path | None = None, **overrides: Any) -> None:
    """Serve the registry until a signal ends it; prints the address first.

    Args:
        file: a TOML file of settings.
        overrides: settings of the command line.

    Raises:
        ArgumentError: a setting is wrong, or a public address is asked for while no token is usable.
        RegistryError: the database's schema is older or newer.
    """
    settings = load_settings(file, **overrides)
    prepare(settings)
    options: dict[str, Any] = {
        "host": settings.host,
        "backlog": BACKLOG,
        "log_config": log_config(settings.log_level),
        "log_level": settings.log_level,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "http": "t2.registry.server.protocol:Connection",
        "ws": "none",
        "lifespan": "on",
        "timeout_keep_alive": settings.idle_seconds,
        "timeout_graceful_shutdown": GRACE_SECONDS,
    }
    _allow_files(settings)
    listener = _bind(settings)
    port = listener.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"t2 registry on http://{host}:{port}"
    if settings.workers == 1:
        app = _build(settings)
        listener.listen(BACKLOG)  # whoever reads the address may connect
        print(address, flush=True)
        listeners = [listener, *(listener.dup() for _ in range(ACCEPTED - 1))]
        uvicorn.Server(uvicorn.Config(app, **options)).run(listeners)
    else:
        listener.close()  # uvicorn binds anew for its processes
        print(address, flush=True)
        os.environ[_WORKER] = json.dumps({"file": str(file) if file else None, "overrides": overrides})
        with tempfile.TemporaryDirectory(prefix="t2-registry-") as folder:
            os.environ[SHARED] = folder
            uvicorn.run("t2.registry.server.serve:worker", factory=True, port=port, workers=settings.workers, **options)


def prepare(settings: ServerSettings) -> None:
    """Check what must be so before the server listens; the embedded registry's own database is brought up to date.

    Raises:
        ArgumentError: others than this machine are meant to reach the server while no token is usable.
        RegistryError: the database's schema is older or newer.
    """
    database = open_database(settings)
    try:
        if is_embedded(settings) and migrate.current(database) != migrate.head():
            migrate.migrate(database)
        migrate.check_current(database)
        with database.read() as session:
            usable = tokens.any_usable(session)
    finally:
        database.close()
    if usable or may_be_open(settings.host, settings.allowed_hosts):
        return
    if not is_loopback(settings.host):
        raise ArgumentError(
            f"host {settings.host} can be reached from other machines and the registry has no usable access token: "
            "make one with t2 registry token create, or listen on 127.0.0.1"
        )
    foreign = next(name for name in settings.allowed_hosts if not is_loopback(name))
    raise ArgumentError(
        f"allowed_hosts has {foreign}, so others reach the server through a proxy, and the registry has no usable "
        "access token: make one with t2 registry token create, or leave allowed_hosts empty"
    )


def _allow_files(settings: ServerSettings) -> None:
    """Raise this process's limit of open files to what its connections need.

    Raises:
        ArgumentError: the system's own limit is lower.
    """
    needed = settings.max_connections + RESERVE + ACCEPTED + settings.database_pool + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ArgumentError(
            f"max_connections {settings.max_connections} needs {needed} open files and the system's limit is {hard}; "
            "lower max_connections, or raise the limit (ulimit -Hn)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _bind(settings: ServerSettings) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ArgumentError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}; choose another with "
            "--host or --port"
        ) from error
    return listener


def worker() -> FastAPI:
    """The application of one of several processes, which read the settings again."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    given = json.loads(os.environ[_WORKER])
    file = Path(given["file"]) if given["file"] else None
    settings = load_settings(file, **given["overrides"])
    return _build(settings)


def _build(settings: ServerSettings) -> FastAPI:
    app = create_app(open_server(settings), settings)
    app.state.openapi()  # takes a second of computing, for which the first requests would all wait
    settle()
    return app


def _end_with_parent() -> None:
    """Stop this worker when the process that started it is gone: nobody else would, and it holds the port."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    parent.join()
    log.warning("the parent process is gone, this worker ends")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS + 5)
    os._exit(1)  # what it waits for does not end


def settle() -> None:
    """Leave what is loaded to the end of the process out of the collection of cycles, and let threads take short turns.

    Otherwise some requests wait 50 ms and more while hundreds of thousands of objects are looked at that never go. And
    a thread that has its answer from the database waits until the one that computes gives way: an upload has a dozen
    answers, and with several uploads at once that came to more than all the work.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE)
    sys.setswitchinterval(TURN_SECONDS)


def log_config(level: str) -> dict[str, Any]:
    """Everything to standard error, a line each; requests are told by ``t2.registry.access``."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(message)s"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "loggers": {
            name: {"handlers": ["stderr"], "level": level.upper(), "propagate": False}
            for name in ("t2.registry", "uvicorn")
        },
    }
