"""The digests of a checkpoint's matrices, remembered as long as its files are the same."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

import transformers
from tqdm import tqdm

from t2.adapters.basis import matrix_digest
from t2.adapters.checkpoint import Checkpoint
from t2.core.digests import digest_of
from t2.core.errors import StorageError
from t2.core.files import atomic_write
from t2.core.settings import cache_dir

_EVERY = 10.0
"""Seconds between two writes while digests come in."""


class DigestMemo:
    """Digests by matrix, kept in ``T2_CACHE_DIR``; they count for files of the same path, size and time of change.

    They tell what need not be read again, never which basis a matrix has: a basis that is built is filed under a digest
    of the matrix that it was built from. A memo that cannot be read or written is none.

    Args:
        checkpoint: the checkpoint.
        folder: where memos are; by default ``digests`` in ``T2_CACHE_DIR``.
    """

    def __init__(self, checkpoint: Checkpoint, folder: Path | None = None) -> None:
        files = [
            (str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in map(Path.resolve, checkpoint.files)
        ]
        name = digest_of({"files": files, "transformers": transformers.__version__})
        self._path = (folder or cache_dir() / "digests") / f"{name}.json"
        self._checkpoint = checkpoint
        self._digests = self._read()
        self._written = time.monotonic()

    @property
    def known(self) -> Mapping[str, str]:
        """Digests by the names of matrices, as far as they are known."""
        return {name: digest for name, digest in self._digests.items() if name in self._checkpoint.targets}

    def add(self, name: str, digest: str) -> None:
        """Remember a digest; on disk within seconds, or after :meth:`save`."""
        self._digests[name] = digest
        if time.monotonic() - self._written > _EVERY:
            self.save()

    def save(self) -> None:
        """Write what is remembered."""
        self._written = time.monotonic()
        with contextlib.suppress(StorageError):
            atomic_write(self._path, json.dumps(self._digests, sort_keys=True).encode())

    def complete(self, progress: bool = True) -> dict[str, str]:
        """The digests of all adaptable matrices; those that are not known are read.

        Raises:
            ModelError: a matrix cannot be read.
        """
        missing = [name for name in self._checkpoint.targets if name not in self._digests]
        bar = tqdm(missing, desc="Reading matrices", unit="matrix", disable=not (progress and missing), delay=1)
        try:
            for name, matrix in self._checkpoint.matrices(bar):
                self.add(name, matrix_digest(matrix))
        finally:
            if missing:
                self.save()
        return {name: self._digests[name] for name in self._checkpoint.targets}

    def _read(self) -> dict[str, str]:
        try:
            content = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        if not isinstance(content, dict) or not all(isinstance(digest, str) for digest in content.values()):
            return {}
        return content
