"""Ways to a registry: a folder, a server's settings, or a URL.

What each way needs is imported on it: a client of a server does without the database's library, and a folder without
that of S3.
"""

from __future__ import annotations

import getpass
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from t2.core.errors import ArgumentError
from t2.core.settings import registry_token, registry_url

if TYPE_CHECKING:
    from t2.registry.blobs.base import BlobStore
    from t2.registry.client.base import RegistryClient
    from t2.registry.db.database import Database
    from t2.registry.services.actor import Actor
    from t2.registry.services.service import Service
    from t2.registry.settings import ServerSettings

_HOST_AND_PORT = re.compile(r"(localhost|[\w-]+(\.[\w-]+)+|\[[0-9a-fA-F:]+\]):\d+(/.*)?")


def open_registry(where: str | None = None, token: str | None = None) -> RegistryClient:
    """A client of the registry at a URL or in a folder.

    Args:
        where: ``https://…``, or a folder, which is made when new; ``T2_REGISTRY_URL`` where None, and without it the
            embedded registry of this user.
        token: the access token of a server; ``T2_REGISTRY_TOKEN`` where None, which goes to no other server than that
            of ``T2_REGISTRY_URL`` where this is set.

    Raises:
        ArgumentError: the URL is not one of a server, or the token would go over plain HTTP to another machine.
        StorageError: the folder cannot be created.
        RegistryError: the folder's registry was written by a newer t2.
        UnavailableError: its database cannot be opened.
    """
    configured = registry_url()
    chosen = where or configured
    if "://" in chosen:
        if token is None and ("://" not in configured or _origin(chosen) == _origin(configured)):
            token = registry_token()
        from t2.registry.client.http import HttpRegistry

        return HttpRegistry(chosen, token)
    folder = Path(chosen).expanduser()
    if _HOST_AND_PORT.fullmatch(chosen) and not folder.exists():
        raise ArgumentError(f"the registry {chosen!r} is a server without a scheme; write http://{chosen} or https://…")
    return open_embedded(folder)


def open_embedded(folder: Path) -> Service:
    """The embedded registry in a folder: SQLite and files, made when new, and brought to the newest schema.

    Raises:
        StorageError: the folder cannot be created.
        RegistryError: it was written by a newer t2.
    """
    from t2.registry.blobs.local import LocalBlobs
    from t2.registry.db import migrate
    from t2.registry.db.database import BUSY_SECONDS, Database
    from t2.registry.services.actor import Actor
    from t2.registry.services.service import Service

    database = Database(f"sqlite:///{folder / 'registry.db'}", timeout=BUSY_SECONDS)
    if migrate.current(database) != migrate.head():
        migrate.migrate(database)
    return Service(database, LocalBlobs(folder / "blobs"), Actor("embedded", user_name()), location=str(folder))


def open_server(settings: ServerSettings, actor: Actor | None = None) -> Service:
    """The registry that a server's settings describe; its schema must be the newest.

    Raises:
        ArgumentError: the database or the blobs are of no known kind.
        RegistryError: the schema is older or newer; the message says what to run.
    """
    from t2.registry.db import migrate
    from t2.registry.services.actor import Actor
    from t2.registry.services.service import Service

    database = open_database(settings)
    migrate.check_current(database)
    return Service(database, open_blobs(settings), actor or Actor("cli", user_name()), limits=settings.limits)


def open_configured(settings: ServerSettings) -> Service:
    """As :func:`open_server`, and the embedded registry's own database is made where it is new, and brought up to date.

    Raises:
        ArgumentError: the database or the blobs are of no known kind.
        RegistryError: another database's schema is older or newer; the message says what to run.
    """
    from t2.registry.db import migrate

    if is_embedded(settings):
        database = open_database(settings)
        try:
            if migrate.current(database) != migrate.head():
                migrate.migrate(database)
        finally:
            database.close()
    return open_server(settings)


def is_embedded(settings: ServerSettings) -> bool:
    """Whether the database is the embedded registry's, which nobody migrates by hand."""
    embedded = type(settings).model_fields["database_url"].get_default(call_default_factory=True)
    return bool(settings.database_url == embedded)


def open_database(settings: ServerSettings) -> Database:
    """The database that the settings name."""
    from t2.registry.db.database import Database

    return Database(
        settings.database_url.get_secret_value(), pool=settings.database_pool, timeout=settings.database_timeout
    )


def open_blobs(settings: ServerSettings) -> BlobStore:
    """The blob store that the settings name.

    Raises:
        ArgumentError: they name none, or the store's client refuses them.
    """
    scheme, separator, rest = settings.blobs.partition("://")
    if not separator:
        from t2.registry.blobs.local import LocalBlobs

        return LocalBlobs(Path(settings.blobs).expanduser())
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise ArgumentError("setting blobs: give a folder or s3://bucket/prefix")
    from t2.registry.blobs.s3 import Credentials, S3Blobs

    credentials = None
    if settings.s3_access_key is not None and settings.s3_secret_key is not None:
        credentials = Credentials(settings.s3_access_key.get_secret_value(), settings.s3_secret_key.get_secret_value())
    return S3Blobs(
        bucket,
        prefix,
        endpoint=settings.s3_endpoint,
        region=settings.s3_region,
        credentials=credentials,
        path_style=settings.s3_path_style,
        timeout=settings.s3_timeout,
    )


def user_name() -> str:
    """The user of this machine."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "unknown"


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url.strip())
    return parts.scheme.lower(), parts.netloc.lower()
