"""The way to the database: SQLite in WAL mode, or PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

import sqlalchemy
from sqlalchemy import Connection, Engine, Executable, event, literal_column
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError as UrlError
from sqlalchemy.exc import DatabaseError, DataError, DBAPIError, IntegrityError, InvalidatePoolError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry

from t2.core.errors import ArgumentError, InvalidRequestError, RegistryError, StorageError, UnavailableError
from t2.core.files import check_writable
from t2.registry.db.models import Table

BUSY_SECONDS = 30
"""How long an embedded registry's writer of SQLite waits for others."""
IDLE_SECONDS = 0.5
"""How long a connection may lie idle before it is looked at on its next use. That costs as much as a small query."""
SILENT_SECONDS = 2.0
"""How long PostgreSQL may be silent beyond the time in which it should have given up a statement by itself."""


class WriterQueue:
    """A lock that threads get in the order in which they ask for it.

    SQLite's own waiting is a poll that becomes rarer with time, so whoever comes last is often the first.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken = False

    @contextlib.contextmanager
    def turn(self, timeout: float) -> Iterator[None]:
        """Hold the lock.

        Raises:
            UnavailableError: other writers held it for that time.
        """
        self._take(timeout)
        try:
            yield
        finally:
            self._pass_on()

    def _take(self, timeout: float) -> None:
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            granted = threading.Lock()
            granted.acquire()
            self._waiting.append(granted)
        in_time = False
        try:
            in_time = granted.acquire(timeout=timeout)
        finally:
            if not in_time:
                with self._guard:
                    is_waiting = granted in self._waiting
                    if is_waiting:
                        self._waiting.remove(granted)
                if not is_waiting:
                    self._pass_on()  # it came in the moment in which the wait ended
        if not in_time:
            raise UnavailableError(f"other writers kept the database for {timeout:g} seconds; try again")

    def _pass_on(self) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False


class Database:
    """Transactions on the registry's database.

    A block of :meth:`read` or :meth:`write` is one transaction: committed when it ends, rolled back when it fails.
    """

    def __init__(self, url: str, *, pool: int = 20, timeout: float = 10.0) -> None:
        """Connect lazily; nothing is created but the folder of an SQLite file.

        Args:
            url: ``sqlite:////path/to/file.db`` or ``postgresql://user:password@host/name``.
            pool: most connections: two fifths for writes, the others for reads, so that writers that wait for each
                other do not block reads.
            timeout: seconds to wait for a connection, a lock or a statement.

        Raises:
            ArgumentError: the URL is of neither kind.
        """
        try:
            parsed = sqlalchemy.make_url(url)
        except (UrlError, ValueError) as error:
            raise ArgumentError(
                "the database URL cannot be read; write sqlite:////path/registry.db or postgresql://user:password@host/name"
            ) from error
        kind = parsed.get_backend_name()
        self.location = parsed.render_as_string(hide_password=True)
        arguments: dict[str, Any]
        if kind == "sqlite":
            if not parsed.database or parsed.database == ":memory:":
                raise ArgumentError("the database URL names no file; write sqlite:////path/registry.db")
            try:
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(
                    f"cannot create the folder of {parsed.database}: {error.strerror or error}; choose another place"
                ) from error
            arguments = {"connect_args": {"timeout": timeout, "check_same_thread": False}}
        elif kind == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
            milliseconds = int(timeout * 1000)
            options = f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds} -c timezone=UTC"
            # Processes to help with one query, or code compiled for it, take longer than a page does.
            options += " -c max_parallel_workers_per_gather=0 -c jit=off"
            # The server's own timeouts do not help where the network swallows its answers.
            network = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3}
            arguments = {
                # A statement alone sees one moment's state by itself, and needs no beginning and no end told to the
                # server. Such reads are by far the most, so what they need is what a connection has.
                "isolation_level": "AUTOCOMMIT",
                "connect_args": {
                    "connect_timeout": max(2, int(timeout)),
                    "tcp_user_timeout": milliseconds,
                    "options": options,
                    **network,
                },
                # Few connections, used one after the other, know all statements and are found alive by their use.
                "pool_use_lifo": True,
            }
        else:
            raise ArgumentError(f"the registry's database is SQLite or PostgreSQL, not {kind}")
        self.is_sqlite = kind == "sqlite"
        self._timeout = timeout
        self._writers = WriterQueue()

        def engine(connections: int) -> Engine:
            return sqlalchemy.create_engine(
                parsed, pool_size=connections, max_overflow=0, pool_timeout=timeout, hide_parameters=True, **arguments
            )

        writers = max(1, pool * 2 // 5)
        self.engine, self._writing = engine(max(1, pool - writers)), engine(writers)
        for each in (self.engine, self._writing):
            self._prepare(each, timeout)
        of_writers: dict[str, Any] = {"t2_write": True} if self.is_sqlite else {"isolation_level": "READ COMMITTED"}
        # One snapshot for all queries, as in SQLite: an alias and its version must agree.
        of_readers: dict[str, Any] = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        self._writer = self._writing.execution_options(**of_writers)
        self._reader = self.engine.execution_options(**of_readers)
        self._read = sessionmaker(self._reader, expire_on_commit=False)
        self._write = sessionmaker(self._writer, expire_on_commit=False)

    def _prepare(self, engine: Engine, timeout: float) -> None:
        if self.is_sqlite:
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
        else:
            from t2.registry.db.patience import PatientConnection  # the embedded registry does without the driver

            def connect(_dialect: object, _record: object, arguments: Any, options: Any) -> PatientConnection:
                connection = PatientConnection.connect(*arguments, **options)
                connection.silence = timeout + SILENT_SECONDS
                return connection

            event.listen(engine, "do_connect", connect)
            event.listen(engine, "do_execute", _replan)
            event.listen(engine, "checkin", _remember_use)
            event.listen(engine, "checkout", self._find_alive)

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that only reads.

        Raises:
            UnavailableError: the database cannot be reached, or did not answer in time.
            InvalidRequestError: a text has a character that the database cannot hold.
        """
        with self.translated(), self._read() as session, session.begin():
            yield session

    @contextlib.contextmanager
    def glance(self) -> Iterator[Connection]:
        """A connection for reads of which each is right by itself: on PostgreSQL each sees what is newest.

        Raises:
            UnavailableError: as :meth:`read`.
            InvalidRequestError: as :meth:`read`.
        """
        with self.translated(), self.engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that may write; on SQLite it is the only one that does, from its first statement on.

        Raises:
            UnavailableError: as :meth:`read`. Whether a commit that failed so took place is then unknown.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.translated())
            until = time.monotonic() + self._timeout
            if self.is_sqlite:
                stack.enter_context(self._writers.turn(self._timeout))
            session = stack.enter_context(self._write())
            stack.enter_context(session.begin())
            if self.is_sqlite:  # other processes have what is left of the time
                session.connection(execution_options={_LEFT: max(0.0, until - time.monotonic())})
            yield session

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Tell the driver's errors as the registry's; :meth:`read` and :meth:`write` do."""
        try:
            yield
        except (OperationalError, PoolTimeout) as error:
            if _errorname(error) == "SQLITE_ERROR":  # such as a table that is not there, or is another program's
                raise self._foreign(error) from error
            raise UnavailableError(
                f"the database {self.location} cannot be used now: {_first_line(error)}{_hint(error)}"
            ) from error
        except (DataError, UnicodeEncodeError) as error:
            raise InvalidRequestError("a text has a character that is not Unicode, or NUL; leave it out") from error
        except IntegrityError:
            raise
        except DBAPIError as error:
            if error.connection_invalidated:
                raise UnavailableError(f"the database {self.location} closed the connection; try again") from error
            if self.is_sqlite and isinstance(error, DatabaseError):
                raise self._foreign(error) from error
            raise

    @contextlib.contextmanager
    def connect(self, *, write: bool) -> Iterator[Connection]:
        """A connection without a transaction, for migrations.

        Raises:
            UnavailableError: as :meth:`read`.
        """
        with self.translated(), (self._writer if write else self.engine).connect() as connection:
            yield connection

    def check_writable(self) -> None:
        """Check that the database accepts writes, without waiting for other writers.

        Raises:
            UnavailableError: it is read-only, or its disk is full.
        """
        if self.is_sqlite:
            # Does not open the file: closing it would drop the locks of this process's own connections.
            file = Path(self.engine.url.database or "")
            if not os.access(file, os.W_OK):
                raise UnavailableError(f"the database {self.location} can only be read; {_HINTS['SQLITE_READONLY']}")
            try:
                check_writable(file.with_name("probe"))
            except StorageError as error:
                raise UnavailableError(str(error)) from error
            return
        with self.connect(write=False) as connection:
            if connection.exec_driver_sql("SELECT current_setting('transaction_read_only')").scalar() != "off":
                raise UnavailableError(f"the database {self.location} can only be read; is it a standby?")

    def _foreign(self, error: Exception) -> RegistryError:
        return RegistryError(
            f"the database {self.location} is damaged, or no registry's: {_first_line(error)}; restore it from a "
            "backup, or choose another folder"
        )

    def _find_alive(self, connection: Any, record: ConnectionPoolEntry, _proxy: object) -> None:
        """Look whether the server still knows a connection that has lain idle, as a restart ends all of them."""
        used = record.info.get(_USED)
        if used is not None and time.monotonic() - used > IDLE_SECONDS:
            try:
                self.engine.dialect.do_ping(connection)
            except self.engine.dialect.loaded_dbapi.Error as error:
                raise InvalidatePoolError from error

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()
        self._writing.dispose()


_HINTS = {
    "SQLITE_READONLY": "write access to the file and its folder is needed",
    "SQLITE_CANTOPEN": "write access to the file and its folder is needed",
    "SQLITE_FULL": "free space",
    "SQLITE_IOERR": "the disk may be full",
    "SQLITE_BUSY": "another process is writing, try again",
}


def _errorname(error: Exception) -> str:
    """SQLite's name of an error; empty for others."""
    return str(getattr(getattr(error, "orig", None), "sqlite_errorname", ""))


def _hint(error: Exception) -> str:
    name = _errorname(error)
    return "".join(f"; {hint}" for code, hint in _HINTS.items() if name == code or name.startswith(f"{code}_"))


_USED = "t2_used"
_LEFT = "t2_left"
"""The execution option of a writer's connection: seconds to wait for other processes' writers."""


def _remember_use(_connection: object, record: ConnectionPoolEntry) -> None:
    record.info[_USED] = time.monotonic()


VARIED = "t2_varied"
"""The execution option of a statement whose best plan depends on its values."""


def _replan(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
    """Have PostgreSQL plan a varied statement for the values at hand.

    A statement that is often executed is prepared, and planned once for all values. That saves half the work of looking
    something up by its key, and walks every row where a filter's value is rare.
    """
    if not context.execution_options.get(VARIED):
        return False
    cursor.execute(statement, parameters, prepare=False)
    return True


def _first_line(error: Exception) -> str:
    origin = getattr(error, "orig", None) or error
    lines = str(origin).strip().splitlines()
    return lines[0] if lines else type(origin).__name__


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # The driver's own begin comes only before a write, too late for a transaction that reads first.
    connection.isolation_level = None
    _write_ahead(connection)
    for pragma in ("synchronous=FULL", "foreign_keys=ON", "trusted_schema=OFF"):
        connection.execute(f"PRAGMA {pragma}").close()


def _write_ahead(connection: sqlite3.Connection) -> None:
    # While several processes open a new file this fails at once, and does not wait as all else does.
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that turns from reading to writing fails at once when another one wrote meanwhile; one that begins
    # as a writer waits its turn.
    options = connection.get_execution_options()
    write = options.get("t2_write")
    if _LEFT in options:
        connection.exec_driver_sql(f"PRAGMA busy_timeout={int(options[_LEFT] * 1000)}").close()
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def insert_once(session: Session, table: type[Table], **values: Any) -> bool:
    """Insert a row unless one with the same unique columns is there; whether it was inserted.

    Another transaction that inserts the same row at the same time is waited for.
    """
    return session.execute(_insertion(table, session.get_bind().dialect.name), values).first() is not None


@cache
def _insertion(table: type[Table], dialect: str) -> Executable:
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    # A row comes back for a row put in; the count of rows is not told on every database.
    return insert(cast(sqlalchemy.Table, table.__table__)).on_conflict_do_nothing().returning(literal_column("1"))
