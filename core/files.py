"""Files that are whole or not there: every write of t2 that must survive a crash goes through here."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from t2.core.errors import StorageError

STALE = 60.0
"""Seconds after which a temporary file that no process holds counts as left behind by a kill."""


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces ``path`` when the block ends, and leaves it as it was when the block fails.

    The bytes are synced to disk before the rename, and the folder after it, so that neither a kill nor a power cut
    leaves half a file under ``path``. What an earlier kill left beside it is removed.

    Raises:
        StorageError: the disk is full, or the folder cannot be created or written.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            with contextlib.suppress(OSError):  # not every network file system has locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder "
            "(what was there before is unchanged)"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def atomic_write(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` as :func:`atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


def check_writable(path: Path) -> None:
    """Check that :func:`atomic_write` could put a file there, before long work whose result it is to hold.

    Raises:
        StorageError: its folder cannot be created or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(bytes(4096))  # a full disk still accepts an empty file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error


def sync_folder(folder: Path) -> None:
    """Sync what a folder lists to disk, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_stale(temporary: Path, before: float, *, remove: bool) -> bool:
    """Whether a temporary file was last written before a time, and no process writes it now.

    Args:
        before: seconds since the epoch.
        remove: delete it then.
    """
    with contextlib.suppress(OSError), temporary.open("rb") as file:
        if temporary.stat().st_mtime < before:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if remove:
                temporary.unlink()
            return True
    return False


def append_line(path: Path, line: str) -> None:
    """Append one line to a log-like file and sync it; a kill can cut at most the line being written.

    A line that an earlier kill or full disk has cut is dropped first, so that only a last line can ever be cut.
    Processes that append to one file take turns.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            with contextlib.suppress(OSError):  # not every network file system has locks
                fcntl.flock(file, fcntl.LOCK_EX)
            _drop_cut_line(file)
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"cannot append to {path}: {error.strerror or error}; free space") from error


def _drop_cut_line(file: IO[bytes]) -> None:
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _remove_stale(path: Path) -> None:
    """Remove temporary files for ``path`` whose writer was killed: old ones that no process holds a lock on."""
    for found in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        is_stale(found, time.time() - STALE, remove=True)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
