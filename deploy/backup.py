"""Backup of a registry into a folder, and the way back.

    python backup.py save FOLDER [--config FILE] [--only database|blobs]
    python backup.py load FOLDER [--config FILE] [--only database|blobs]

The settings are the server's, from its environment or its file. PostgreSQL's ``pg_dump`` and ``pg_restore`` must be
there, of the server's version or a newer one; an SQLite database needs nothing.

``save`` may run beside uploads and as often as one likes into the same folder: the database is dumped first, then the
files that the folder lacks are copied. A file is written before the row that refers to it and never changes, so every
row of the dump has its file. The other way round an upload in between would be a row without a file. Only ``t2 registry
gc`` must not run meanwhile.

``load`` fills an empty database and a store. Run ``t2 registry doctor --deep`` after it, then start the server.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import sqlalchemy
from psycopg.conninfo import make_conninfo
from sqlalchemy import URL

from t2.core.errors import ArgumentError, NotFoundError, RegistryError, T2Error
from t2.registry.blobs.base import BlobStore
from t2.registry.blobs.local import LocalBlobs
from t2.registry.open import open_blobs
from t2.registry.settings import ServerSettings, load_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("save", "load"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=Path, help="a TOML file of the server's settings")
    parser.add_argument("--only", choices=("database", "blobs"))
    args = parser.parse_args()
    try:
        settings = load_settings(args.config)
        args.folder.mkdir(parents=True, exist_ok=True)
        copies = LocalBlobs(args.folder / "blobs")
        if args.action == "save":
            if args.only != "blobs":
                save_database(settings, args.folder)
            if args.only != "database":
                print(f"{copy(open_blobs(settings), copies)} files copied to {copies.location}")
        else:
            if args.only != "database":
                store = open_blobs(settings)
                print(f"{copy(copies, store)} files copied to {store.location}")
            if args.only != "blobs":
                load_database(settings, args.folder)
    except T2Error as error:
        print(f"backup: {error}", file=sys.stderr)
        sys.exit(2)


def save_database(settings: ServerSettings, folder: Path) -> None:
    """Dump the database as it is at one moment; the dump before stays until this one is whole."""
    url = _url(settings)
    if url.get_backend_name() == "sqlite":
        target = folder / "registry.db"
        partial = target.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        _copy_sqlite(Path(str(url.database)), partial)
    else:
        target = folder / "registry.dump"
        partial = target.with_suffix(".partial")
        _run(url, "pg_dump", "--format=custom", "--no-owner", "--no-privileges", f"--file={partial}")
    with partial.open("rb+") as written:
        os.fsync(written.fileno())
    partial.replace(target)
    print(f"database saved to {target}")


def load_database(settings: ServerSettings, folder: Path) -> None:
    """Fill an empty database from a dump.

    Raises:
        ArgumentError: it is not empty.
    """
    url = _url(settings)
    engine = sqlalchemy.create_engine(_driver(url))
    try:
        tables = sqlalchemy.inspect(engine).get_table_names()
    finally:
        engine.dispose()
    if tables:
        raise ArgumentError("the database is not empty; restore into a new one, and point the server to it")
    if url.get_backend_name() == "sqlite":
        _copy_sqlite(folder / "registry.db", Path(str(url.database)))
    else:
        options = ("--exit-on-error", "--single-transaction", "--no-owner", "--no-privileges", "--no-comments")
        _run(url, "pg_restore", *options, str(folder / "registry.dump"))
    print("database restored")


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
    with (
        closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True)) as original,
        closing(sqlite3.connect(target)) as copied,
    ):
        original.backup(copied)


def _url(settings: ServerSettings) -> URL:
    return sqlalchemy.make_url(settings.database_url.get_secret_value())


def _driver(url: URL) -> URL:
    return url if url.get_backend_name() == "sqlite" else url.set(drivername="postgresql+psycopg")


def _run(url: URL, program: str, *options: str) -> None:
    """Run one of PostgreSQL's programs; the password is not among its arguments, which everybody here can see."""
    given = {"host": url.host, "port": url.port, "user": url.username, "dbname": url.database, **url.query}
    connection = make_conninfo("", **{name: str(value) for name, value in given.items() if value is not None})
    environment = os.environ | ({"PGPASSWORD": str(url.password)} if url.password else {})
    try:
        subprocess.run([program, f"--dbname={connection}", *options], env=environment, check=True)
    except FileNotFoundError:
        raise ArgumentError(f"{program} is not installed; it comes with PostgreSQL's client programs") from None
    except subprocess.CalledProcessError as error:
        raise RegistryError(f"{program} failed with status {error.returncode}; see above") from None


if __name__ == "__main__":
    main()
