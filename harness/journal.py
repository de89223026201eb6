"""Answers of searches on disk: what a killed run has asked is not asked again, nor by a run with other settings.

One file per set of built requests, base and dtype; a line per batch, appended and synced once it is answered, so that a
kill costs the batch in flight. The oldest files go when all of them together become too large.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from t2.core.errors import StorageError
from t2.core.files import append_line
from t2.core.settings import cache_dir

FORMAT = 1
"""Part of every name: raise it when the same requests would be answered otherwise, or lines change."""
MOST = 32 << 20
"""Bytes of one file, after which nothing more is kept of these requests."""
ALL = 256 << 20
"""Bytes of all files together."""

Cell = tuple[str, int]
"""A mixture, by the digest of its vectors, and the position of a doc."""

_log = logging.getLogger(__name__)


class Journal:
    """Answers and likelihoods of mixtures on docs, as a file of lines.

    Args:
        key: hex digest of all that an answer depends on but the mixture and the doc.
    """

    def __init__(self, key: str) -> None:
        self.path = cache_dir() / "answers" / f"{key}.jsonl"
        self._open = True

    def read(self) -> Iterator[tuple[str, Cell, Any]]:
        """All entries: their kind, the cell, and the value as JSON gives it. A line that is damaged is passed over."""
        try:
            lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        except OSError as error:
            _log.warning("%s cannot be read (%s); asking again", self.path, error.strerror or error)
            lines = []
        for line in lines:
            try:
                entry = json.loads(line)
                found = [(str(entry["kind"]), (str(z), int(doc)), value) for z, doc, value in entry["cells"]]
            except (ValueError, TypeError, KeyError):
                continue  # cut by a kill
            yield from found

    def add(self, kind: str, cells: Iterable[tuple[Cell, Any]]) -> None:
        """Append entries; a full disk or folder ends the journal with a warning, not the search."""
        if not self._open:
            return
        line = json.dumps({"kind": kind, "cells": [[*cell, value] for cell, value in cells]}, ensure_ascii=False)
        try:
            if self.path.exists() and self.path.stat().st_size + len(line) > MOST:
                self._open = False
                return
            if not self.path.exists():
                _make_room(self.path.parent)
            append_line(self.path, line)
        except (OSError, StorageError) as error:
            self._open = False
            _log.warning("answers are not kept for a later run: %s", error)


def _make_room(folder: Path) -> None:
    """Remove the oldest files until another full one would fit."""
    with contextlib.suppress(OSError):  # another process may remove them at the same time
        files: Sequence[Path] = sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in files)
        for path in files:
            if total + MOST <= ALL:
                break
            total -= path.stat().st_size
            path.unlink()
