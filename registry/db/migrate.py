"""The registry's schema: which revision a database is at, and the way to another."""

from __future__ import annotations

import functools
from importlib import resources

import sqlalchemy
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from t2.core.errors import ArgumentError, RegistryError
from t2.registry.db.database import Database

_LOCK = 0x7432_7265  # of PostgreSQL's advisory locks: two servers that start at once migrate in turn


@functools.cache
def head() -> str:
    """The newest revision that this t2 knows."""
    newest = ScriptDirectory.from_config(_config()).get_current_head()
    assert newest is not None
    return newest


def revisions() -> list[str]:
    """All revisions, oldest first."""
    script = ScriptDirectory.from_config(_config())
    return [revision.revision for revision in script.walk_revisions()][::-1]


def current(database: Database) -> str | None:
    """The revision that a database is at; None for an empty one.

    Raises:
        UnavailableError: the database cannot be reached.
    """
    with database.connect(write=False) as connection:
        return MigrationContext.configure(connection).get_current_revision()


def migrate(database: Database, revision: str = "head") -> None:
    """Bring a database to a revision, up or down, in one transaction.

    Raises:
        ArgumentError: there is no such revision.
        RegistryError: the database is of a newer t2.
        UnavailableError: the database cannot be reached.
    """
    config = _config()
    with database.connect(write=True) as connection:
        patient = connection.connection.driver_connection
        if not database.is_sqlite:
            assert patient is not None
            silence, patient.silence = patient.silence, None
            # Neither another server's migration nor a large table's may end in the time of one request.
            connection.exec_driver_sql("SET statement_timeout = 0")
            connection.exec_driver_sql("SET lock_timeout = 0")
            connection.exec_driver_sql(f"SELECT pg_advisory_lock({_LOCK})")
            connection.exec_driver_sql("RESET lock_timeout")
            connection.commit()
        try:
            with connection.begin():
                _run(config, connection, database, revision)
        finally:
            if not database.is_sqlite:
                connection.exec_driver_sql(f"SELECT pg_advisory_unlock({_LOCK})")
                connection.exec_driver_sql("RESET statement_timeout")
                connection.commit()
                assert patient is not None
                patient.silence = silence


def planned(database: Database, revision: str = "head") -> list[str]:
    """The revisions that :func:`migrate` would run, in order; for a way down those that it would undo.

    Raises:
        ArgumentError: there is no such revision.
        RegistryError: the database is of a newer t2.
    """
    found, target, known = _way(database, current(database), revision)
    done, wanted = (known.index(each) + 1 if each in known else 0 for each in (found, target))
    return known[done:wanted] if wanted >= done else known[wanted:done][::-1]


def check_current(database: Database) -> None:
    """Check that a database is at the newest revision.

    Raises:
        RegistryError: it is not; the message says what to run.
    """
    found = current(database)
    if found != head():
        raise RegistryError(_state(database, found))


def _way(database: Database, found: str | None, revision: str) -> tuple[str | None, str, list[str]]:
    """Where a database is, where it is to go, and all revisions."""
    known = revisions()
    if found is not None and found not in known:
        raise RegistryError(_state(database, found))
    target = known[-1] if revision == "head" else revision
    if target not in (*known, "base"):
        raise ArgumentError(f"there is no revision {revision}; known: base, {', '.join(known)}, head")
    return found, target, known


def _run(config: Config, connection: sqlalchemy.Connection, database: Database, revision: str) -> None:
    found, target, known = _way(database, MigrationContext.configure(connection).get_current_revision(), revision)
    config.attributes["connection"] = connection
    up = found is None or (target != "base" and known.index(target) >= known.index(found))
    try:
        if up and target != "base":
            command.upgrade(config, target)
        elif found is not None:
            command.downgrade(config, target)
    except CommandError as error:
        raise RegistryError(f"cannot migrate {database.location}: {error}") from error


def _state(database: Database, found: str | None) -> str:
    if found is None:
        return f"the database {database.location} is empty; run t2 registry migrate with the same settings"
    if found not in revisions():
        return f"the database {database.location} is at revision {found}, which is of a newer t2; upgrade t2"
    return (
        f"the database {database.location} is at revision {found}, this t2 needs {head()}; run t2 registry migrate "
        "with the same settings"
    )


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(resources.files("t2.migrations")))
    config.set_main_option("path_separator", "os")
    return config
