"""The schema's way up and down, with data in the tables, on both databases."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from t2.core.errors import ArgumentError, RegistryError
from t2.registry.db import migrate
from t2.registry.db.database import Database
from t2.registry.db.models import Table
from t2.registry.open import open_embedded
from tests.environments import REPOSITORY, build_wheel

REVISIONS = migrate.revisions()
AT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
VALUES: dict[str, Any] = {
    "fingerprint": "f" * 64,
    "digest": "d" * 64,
    "samples": "d" * 64,
    "docs_digest": "e" * 64,
    "prompts_digest": "e" * 64,
    "record_digest": "e" * 64,
    "higher_is_better": True,
    "confirmed": True,
    "kind": "mixture",
    "split": "validation",
    "targets": {"a.weight": 3},
    "manifest": {"name": "x"},
    "detail": {"version": 1},
    "live": 1,
    "number": 1,
}
"""What CHECK constraints, foreign keys and JSON want; other columns get a value of their type."""


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    url = f"sqlite:///{tmp_path / 'r.db'}" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    made = Database(url, pool=3)
    yield made
    made.close()


def reflected(database: Database) -> sqlalchemy.MetaData:
    metadata = sqlalchemy.MetaData()
    with database.engine.connect() as connection:
        metadata.reflect(connection)
    return metadata


def value_of(column: sqlalchemy.Column[Any], sqlite: bool) -> Any:
    if column.name in VALUES:
        return VALUES[column.name]
    if isinstance(column.type, sqlalchemy.DateTime):
        return AT.replace(tzinfo=None) if sqlite else AT
    if isinstance(column.type, sqlalchemy.Integer):
        return 1
    if isinstance(column.type, sqlalchemy.Float):
        return 0.1 + 0.2
    assert isinstance(column.type, sqlalchemy.String), column
    return "Grüße ✓"[: column.type.length]


def fill(database: Database) -> None:
    """A row in every table, with no column empty."""
    metadata = reflected(database)
    with database.engine.begin() as connection:
        for table in metadata.sorted_tables:
            if table.name != "alembic_version":
                values = {column.name: value_of(column, database.is_sqlite) for column in table.columns}
                connection.execute(table.insert().values(values))


def rows(database: Database) -> dict[str, list[dict[str, Any]]]:
    metadata = reflected(database)
    with database.engine.connect() as connection:
        return {
            table.name: [dict(row) for row in connection.execute(table.select()).mappings()]
            for table in metadata.sorted_tables
            if table.name != "alembic_version"
        }


def survives(before: dict[str, list[dict[str, Any]]], after: dict[str, list[dict[str, Any]]]) -> None:
    """The tables and columns on both sides hold the same."""
    assert before.keys() & after.keys()
    for table in before.keys() & after.keys():
        assert len(after[table]) == len(before[table]) == 1
        common = before[table][0].keys() & after[table][0].keys()
        assert common
        assert {name: before[table][0][name] for name in common} == {name: after[table][0][name] for name in common}


def checks(database: Database) -> dict[str, dict[str, str]]:
    """CHECK constraints as the database tells them, apart from spaces, brackets, quotes and casts."""

    def plain(text: str) -> str:
        text = re.sub(r"::\w+( varying)?(\[\])?", "", text.lower())
        text = re.sub(r"= any \(array\[(.*?)\]\)", r"in (\1)", text)
        return re.sub(r"[\s()\"]", "", text)

    inspector = sqlalchemy.inspect(database.engine)
    return {
        table: {str(check["name"]): plain(check["sqltext"]) for check in inspector.get_check_constraints(table)}
        for table in inspector.get_table_names()
    }


def not_only_migrated(name: str | None, type_: str, parents: object) -> bool:
    """All but the index of trigrams, which is there only where PostgreSQL lets it be."""
    return name != "ix_expert_search"


def test_the_models_are_the_migrated_schema(database: Database, tmp_path: Path) -> None:
    migrate.migrate(database)
    with database.engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={"compare_type": True, "compare_server_default": True, "include_name": not_only_migrated},
        )
        assert compare_metadata(context, Table.metadata) == []
    found = checks(database)
    for table in Table.metadata.tables.values():
        wanted = {
            str(check.name): str(check.sqltext)
            for check in table.constraints
            if isinstance(check, sqlalchemy.CheckConstraint)
        }
        assert found[table.name].keys() == wanted.keys(), table.name
    # What the models alone would make is the same, constraint by constraint.
    migrate.migrate(database, "base")
    Table.metadata.create_all(database.engine)
    made = checks(database)
    assert {table: found[table] for table in made if table != "alembic_version"} == {
        table: each for table, each in made.items() if table != "alembic_version"
    }


@pytest.mark.parametrize("revision", REVISIONS)
def test_data_survive_the_way_up_and_the_way_down(database: Database, revision: str) -> None:
    migrate.migrate(database, revision)
    assert migrate.current(database) == revision
    fill(database)
    before = rows(database)
    assert all(before.values())
    migrate.migrate(database)
    assert migrate.current(database) == migrate.head()
    survives(before, rows(database))
    migrate.migrate(database, revision)
    assert rows(database) == before
    for older in reversed(REVISIONS[: REVISIONS.index(revision)]):
        migrate.migrate(database, older)
        survives(before, rows(database))
    migrate.migrate(database, "base")
    assert rows(database) == {}
    assert migrate.current(database) is None
    migrate.migrate(database)
    fill(database)


def test_the_numbers_of_purged_names_come_from_the_log_whatever_else_it_holds(database: Database) -> None:
    migrate.migrate(database, "0006")
    table = reflected(database).tables["audit"]
    entries: list[tuple[str, str, Any]] = [
        ("expert.purge", "team/math", {"last": 5}),
        ("expert.purge", "team/math", {"last": 3}),
        ("expert.purge", "team/odd", {}),
        ("expert.purge", "team/odd", {"last": "7"}),
        ("expert.purge", "team/large", {"last": 2**31}),
        ("expert.purge", "x" * 200, {"last": 1}),
        ("expert.delete", "team/deleted", {"last": 9}),
    ]
    with database.engine.begin() as connection:
        for action, name, detail in entries:
            at = AT.replace(tzinfo=None) if database.is_sqlite else AT
            values = {"at": at, "source": "cli", "subject": "tests", "action": action, "object": name}
            connection.execute(table.insert().values(**values, detail=detail))
    migrate.migrate(database)
    assert rows(database)["purged_expert"] == [{"path": "team/math", "last": 5}]


def test_to_where_it_is_and_to_where_nothing_is(database: Database) -> None:
    migrate.migrate(database, "base")
    assert rows(database) == {}
    migrate.migrate(database)
    fill(database)
    before = rows(database)
    migrate.migrate(database)
    assert rows(database) == before
    with pytest.raises(ArgumentError, match="no revision 9999"):
        migrate.migrate(database, "9999")
    assert migrate.planned(database) == []
    assert migrate.planned(database, "base") == REVISIONS[::-1]
    assert migrate.planned(database, REVISIONS[0]) == REVISIONS[:0:-1]


def test_a_database_of_a_newer_t2_is_left_alone(database: Database, tmp_path: Path) -> None:
    migrate.migrate(database)
    with database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '7777'")
    for attempt in (migrate.migrate, migrate.check_current, migrate.planned):
        with pytest.raises(RegistryError, match="7777, which is of a newer t2; upgrade t2"):
            attempt(database)
    assert migrate.current(database) == "7777"


def test_an_embedded_registry_of_a_newer_t2_is_not_opened(tmp_path: Path) -> None:
    with open_embedded(tmp_path) as service, service.database.write() as session:
        session.connection().exec_driver_sql("UPDATE alembic_version SET version_num = '7777'")
    with pytest.raises(RegistryError, match="newer t2"):
        open_embedded(tmp_path)


MIGRATE = """
import sys
from t2.registry.db import migrate
from t2.registry.db.database import Database
database = Database(sys.argv[1])
input()
migrate.migrate(database)
migrate.check_current(database)
"""

KILLED = """
import os, signal, sys
from alembic.operations import Operations
from t2.registry.db import migrate
from t2.registry.db.database import Database
left = int(sys.argv[2])
def die(*args, **kwargs):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
original, Operations.create_table = Operations.create_table, die
migrate.migrate(Database(sys.argv[1]))
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def url_of(database: Database) -> str:
    return database.engine.url.set(drivername=database.engine.url.get_backend_name()).render_as_string(False)


def test_two_that_migrate_at_once(database: Database) -> None:
    processes = [start(MIGRATE, url_of(database)) for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    migrate.check_current(database)
    fill(database)


@pytest.mark.parametrize("tables", [1, 14])
def test_a_kill_leaves_the_old_schema(database: Database, tables: int) -> None:
    migrate.migrate(database, "base")
    process = start(KILLED, url_of(database), str(tables))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    assert rows(database) == {}
    assert migrate.current(database) is None
    migrate.migrate(database)
    fill(database)


def test_a_wheel_carries_the_migrations(tmp_path: Path) -> None:
    with zipfile.ZipFile(build_wheel(tmp_path)) as wheel:
        names = set(wheel.namelist())
    wanted = {"t2/migrations/env.py", "t2/migrations/script.py.mako"}
    wanted |= {f"t2/migrations/versions/{path.name}" for path in (REPOSITORY / "migrations/versions").glob("*.py")}
    assert len(wanted) > 3
    assert wanted <= names
