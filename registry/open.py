"""Ways to a registry: a folder, a server's settings, or a URL."""

from __future__ import annotations

import getpass
from pathlib import Path

from t2.core.errors import RegistryError
from t2.registry.blobs.base import BlobStore
from t2.registry.blobs.local import LocalBlobs
from t2.registry.db import migrate
from t2.registry.db.database import Database
from t2.registry.services.actor import Actor
from t2.registry.services.service import Service
from t2.registry.settings import ServerSettings


def open_embedded(folder: Path) -> Service:
    """The embedded registry in a folder: SQLite and files, made when new, and brought to the newest schema.

    Raises:
        StorageError: the folder cannot be created.
        RegistryError: it was written by a newer t2.
    """
    database = Database(f"sqlite:///{folder / 'registry.db'}")
    if migrate.current(database) != migrate.head():
        migrate.migrate(database)
    return Service(database, LocalBlobs(folder / "blobs"), Actor("embedded", user_name()), location=str(folder))


def open_server(settings: ServerSettings, actor: Actor | None = None) -> Service:
    """The registry that a server's settings describe; its schema must be the newest.

    Raises:
        ArgumentError: the database or the blobs are of no known kind.
        RegistryError: the schema is older or newer; the message says what to run.
    """
    database = open_database(settings)
    migrate.check_current(database)
    return Service(database, open_blobs(settings), actor or Actor("cli", user_name()), limits=settings.limits)


def open_database(settings: ServerSettings) -> Database:
    """The database that the settings name."""
    return Database(
        settings.database_url.get_secret_value(), pool=settings.database_pool, timeout=settings.database_timeout
    )


def open_blobs(settings: ServerSettings) -> BlobStore:
    """The blob store that the settings name."""
    if not settings.blobs.startswith("s3://"):
        return LocalBlobs(Path(settings.blobs).expanduser())
    raise RegistryError("blobs: S3 is not there yet")


def user_name() -> str:
    """The user of this machine."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "unknown"
