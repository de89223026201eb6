"""Backup of a registry into a folder, and the way back.

    python backup.py save FOLDER [--config FILE] [--only database|blobs] [--output DUMP]
    python backup.py load FOLDER [--config FILE] [--only database|blobs] [--input DUMP]

The settings are the server's, from its environment or its file. PostgreSQL's ``pg_dump`` and ``pg_restore`` must be
there, of the server's version or a newer one; an SQLite database needs nothing. For the compose file there is
``compose-backup.sh``, which runs each half where its programs are.

``save`` may run beside uploads and as often as one likes into the same folder: the database is dumped first, then the
files that the folder lacks are copied. A file is written before the row that refers to it and never changes, so every
row of the dump has its file. The other way round an upload in between would be a row without a file. Only ``t2 registry
gc`` must not run meanwhile. A dump replaces the previous one only when it is complete.

``load`` fills an empty database and a store. Run ``t2 registry doctor --deep`` after it, then start the server.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import sqlalchemy
from psycopg.conninfo import make_conninfo
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from t2.core.errors import ArgumentError, NotFoundError, RegistryError, StorageError, T2Error
from t2.core.files import sync_folder
from t2.registry.blobs.base import BlobStore
from t2.registry.blobs.local import LocalBlobs
from t2.registry.open import open_blobs
from t2.registry.settings import ServerSettings, load_settings

INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell reports it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("save", "load"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=Path, help="a TOML file of the server's settings")
    parser.add_argument("--only", choices=("database", "blobs"))
    parser.add_argument("--output", type=Path, help="save the database to this file, not into the folder")
    parser.add_argument("--input", type=Path, help="load the database from this file, not from the folder")
    args = parser.parse_args()
    if args.output and (args.action, args.only) not in (("save", None), ("save", "database")):
        parser.error("--output names the dump of the database, which only save writes")
    if args.input and (args.action, args.only) not in (("load", None), ("load", "database")):
        parser.error("--input names the dump of the database, which only load reads")
    try:
        run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _fail("interrupted; run it again", INTERRUPTED)
    except BrokenPipeError:  # the reader of the output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except T2Error as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or args.folder}: {error.strerror or error}")
    except (sqlite3.Error, SQLAlchemyError, psycopg.Error) as error:
        _fail(str(getattr(error, "orig", None) or error))


def run(args: argparse.Namespace) -> None:
    """Save or load the parts that the arguments select."""
    settings = load_settings(args.config)
    folder: Path = args.folder
    if args.action == "save":
        folder.mkdir(parents=True, exist_ok=True)
        copies = LocalBlobs(folder / "blobs")
        if args.only != "blobs":
            save_database(settings, args.output or dump_path(settings, folder))
        if args.only != "database":
            print(f"{copy(open_blobs(settings), copies)} files copied to {copies.location}")
        return
    dump = args.input or dump_path(settings, folder)
    if args.only != "blobs" and not dump.is_file():
        raise ArgumentError(f"{dump}: no such dump; give the folder of a backup, or --input DUMP")
    if args.only != "database":
        if not (folder / "blobs").is_dir():
            raise ArgumentError(f"{folder / 'blobs'}: no such folder; give the folder of a backup")
        store = open_blobs(settings)
        print(f"{copy(LocalBlobs(folder / 'blobs'), store)} files copied to {store.location}")
    if args.only != "blobs":
        load_database(settings, dump)


def _fail(message: str, status: int = 2) -> None:
    print(f"backup: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def dump_path(settings: ServerSettings, folder: Path) -> Path:
    """Path of the database's dump in a folder."""
    return folder / ("registry.db" if _url(settings).get_backend_name() == "sqlite" else "registry.dump")


def save_database(settings: ServerSettings, target: Path) -> None:
    """Dump a snapshot of the database; keep the previous dump until this one is complete."""
    url = _url(settings)
    with _replacing(target) as partial:
        if url.get_backend_name() == "sqlite":
            _copy_sqlite(Path(str(url.database)), partial)
        else:
            _run(url, "pg_dump", "--format=custom", "--no-owner", "--no-privileges", f"--file={partial}")
    print(f"database saved to {target}")


def load_database(settings: ServerSettings, dump: Path) -> None:
    """Fill an empty database from a dump.

    Raises:
        ArgumentError: it is not empty.
    """
    url = _url(settings)
    if url.get_backend_name() == "sqlite":
        target = Path(str(url.database))
        if target.exists() and _list_tables(url):
            raise _not_empty_error()
        target.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(target) as partial:
            _copy_sqlite(dump, partial)
    else:
        if _list_tables(url):
            raise _not_empty_error()
        options = ("--exit-on-error", "--single-transaction", "--no-owner", "--no-privileges", "--no-comments")
        _run(url, "pg_restore", *options, str(dump))
    print("database restored")


def _not_empty_error() -> ArgumentError:
    return ArgumentError("the database is not empty; restore into a new one and point the server to it")


def _list_tables(url: URL) -> list[str]:
    engine = sqlalchemy.create_engine(_driver(url))
    try:
        return sqlalchemy.inspect(engine).get_table_names()
    finally:
        engine.dispose()


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yield a file beside the target, which replaces the target if the block succeeds."""
    partial = target.with_name(f"{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(target)
        sync_folder(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def copy(source: BlobStore, target: BlobStore) -> int:
    """Copy the files that the target lacks, each checked against its digest; how many.

    Raises:
        RegistryError: a file went meanwhile, or is damaged.
    """
    there = {info.digest: info.size for info in target.list()}
    copied = 0
    for info in source.list():
        if there.get(info.digest) != info.size:
            try:
                target.put(info.digest, source.get(info.digest))
            except NotFoundError as error:
                raise RegistryError(
                    f"the file {info.digest} went; run no gc during a backup, and begin again"
                ) from error
            copied += 1
    return copied


def _copy_sqlite(source: Path, target: Path) -> None:
    """Copy a database as it is at one moment, also while others write to it."""
    if not source.is_file():
        raise StorageError(f"{source}: no such database; check database_url")
    try:
        with (
            closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as original,
            closing(sqlite3.connect(target)) as copied,
        ):
            original.backup(copied)
    except sqlite3.Error as error:
        raise StorageError(f"cannot copy {source} to {target}: {error}") from error


def _url(settings: ServerSettings) -> URL:
    try:
        url = sqlalchemy.make_url(settings.database_url.get_secret_value())
    except SQLAlchemyError:  # its message holds the URL, and so the password
        raise ArgumentError("database_url: cannot be read; write postgresql://user:password@host/name") from None
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise ArgumentError(f"database_url: must be of SQLite or PostgreSQL, got {url.get_backend_name()}")
    return url


def _driver(url: URL) -> URL:
    return url if url.get_backend_name() == "sqlite" else url.set(drivername="postgresql+psycopg")


def _run(url: URL, program: str, *options: str) -> None:
    """Run one of PostgreSQL's programs; the password is not among its arguments, which everybody here can see."""
    given = {"host": url.host, "port": url.port, "user": url.username, "dbname": url.database, **url.query}
    connection = make_conninfo("", **{name: str(value) for name, value in given.items() if value is not None})
    environment = os.environ | ({"PGPASSWORD": str(url.password)} if url.password else {})
    try:
        done = subprocess.run(
            [program, f"--dbname={connection}", *options],
            env=environment,
            stderr=subprocess.PIPE,
            check=False,
            text=True,
            errors="replace",
        )
    except FileNotFoundError:
        raise ArgumentError(f"{program} is not installed; it comes with PostgreSQL's client programs") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise RegistryError(f"{program} failed: {lines[-1]}")
    print(done.stderr, end="", file=sys.stderr)


if __name__ == "__main__":
    main()
