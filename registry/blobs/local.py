"""Blobs in a folder: ``ab/abcdef…``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from t2.core.digests import sha256
from t2.core.errors import NotFoundError, RegistryError, StorageError, UnavailableError
from t2.core.files import atomic_write, check_writable, is_stale, sync_folder
from t2.core.references import is_digest
from t2.registry.blobs.base import BlobInfo


class LocalBlobs:
    """A :class:`~t2.registry.blobs.base.BlobStore` in a folder; files are whole or not there, also after a crash."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.location = str(folder)
        self._durable: set[str] = set()

    def put(self, digest: str, data: bytes) -> bool:
        path = self._path(digest)
        try:
            # Compared and not only measured: a damaged file is replaced, and not acknowledged.
            if path.stat().st_size == len(data) and path.read_bytes() == data:
                # Another upload may have put it there this moment, and not have synced the folders yet.
                self._sync(path)
                return False
        except OSError:
            pass
        try:
            atomic_write(path, data)
        except StorageError as error:
            raise UnavailableError(str(error)) from error
        self._sync_parent(path)
        return True

    def get(self, digest: str) -> bytes:
        path = self._path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise NotFoundError(f"the store {self._folder} has no blob {digest}; run t2 registry doctor") from None
        except OSError as error:
            raise UnavailableError(f"cannot read {path}: {error.strerror or error}") from error
        if sha256(data) != digest:
            raise RegistryError(f"{path} is damaged: its content is not that of its digest; restore it from a backup")
        return data

    def info(self, digest: str) -> BlobInfo | None:
        try:
            return _info(self._path(digest))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UnavailableError(f"cannot read {self._path(digest)}: {error.strerror or error}") from error

    def delete(self, digest: str) -> None:
        try:
            self._path(digest).unlink(missing_ok=True)
        except OSError as error:
            raise UnavailableError(f"cannot delete {self._path(digest)}: {error.strerror or error}") from error

    def list(self) -> Iterator[BlobInfo]:
        try:
            for folder in sorted(self._folder.iterdir()) if self._folder.exists() else ():
                for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                    if is_digest(path.name) and path.name.startswith(folder.name):
                        try:
                            yield _info(path)
                        except FileNotFoundError:
                            continue
        except OSError as error:
            raise UnavailableError(f"cannot list {self._folder}: {error.strerror or error}") from error

    def sweep(self, before: datetime, *, dry_run: bool) -> Sequence[str]:
        # A file that was made this moment may not be locked by its writer yet.
        latest = min(before.timestamp(), time.time() - 1.0)
        try:
            found = sorted(path for path in self._folder.glob("*/.*.tmp") if is_digest(path.name[1:65]))
            return [str(path) for path in found if is_stale(path, latest, remove=not dry_run)]
        except OSError as error:
            raise UnavailableError(f"cannot sweep {self._folder}: {error.strerror or error}") from error

    def url(self, digest: str, seconds: int, filename: str) -> str | None:
        return None

    def check(self) -> None:
        try:
            check_writable(self._folder / "probe")
        except StorageError as error:
            raise UnavailableError(str(error)) from error

    def _sync(self, path: Path) -> None:
        """Make the entry of a file durable, and that of its folder."""
        sync_folder(path.parent)
        self._sync_parent(path)

    def _sync_parent(self, path: Path) -> None:
        """Make the entry of a file's folder durable, which may be new; once, as folders stay."""
        if path.parent.name not in self._durable:
            sync_folder(self._folder)
            self._durable.add(path.parent.name)

    def _path(self, digest: str) -> Path:
        if not is_digest(digest):
            raise RegistryError(f"{digest[:80]!r} is not a digest")
        return self._folder / digest[:2] / digest


def _info(path: Path) -> BlobInfo:
    stat = path.stat()
    return BlobInfo(path.name, stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))
