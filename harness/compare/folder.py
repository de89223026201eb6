"""A grid on disk: its settings, and for each cell lm-eval's results and samples with the record of the adaptation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
from pydantic import BaseModel, ConfigDict

from t2.core.digests import sha256_file
from t2.core.errors import ArgumentError, DataError, StorageError
from t2.core.files import atomic_write, check_writable
from t2.core.record import AdaptationRecord
from t2.harness.compare.methods import Cell

_SETTINGS, _DONE = "grid.json", "cell.json"


class Result(BaseModel):
    """A cell that is done.

    Attributes:
        task, method, control, seed, model_args: what the cell is.
        command: the command line of lm-eval that does the same.
        results, samples: the files of lm-eval, in the folder of the cell.
        samples_sha256: digest of the file of samples.
        identity: digest of what answered.
        record: of the adaptation.
        record_digest: its digest.
        numbers: the numbers in the experts that took part, the classifier included, or in the adapter of PEFT.
        requests: how many there were.
        reused: of these, those that an earlier cell with the same mixture had answered, in the seconds of the record.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    method: str
    control: str
    seed: int | None
    model_args: dict[str, Any]
    command: str
    results: str
    samples: str
    samples_sha256: str
    identity: str
    record: AdaptationRecord
    record_digest: str
    numbers: int
    requests: int
    reused: int


class GridFolder:
    """The folder of a grid.

    Args:
        path: a folder; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse a folder that holds something else, before long work.

        Args:
            settings: what all cells have in common, as JSON.

        Raises:
            ArgumentError: it is no folder of a grid, or was made with other settings.
            StorageError: it cannot be written.
        """
        known = self._settings()
        if known is None:
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise ArgumentError(f"--output {self.path} is not empty and holds no comparison; name another folder")
            check_writable(self.path / _SETTINGS)
            return
        for name, value in settings.items():
            if name in known and known[name] != value:
                told = f"{name} was {_short(known[name])} and is {_short(value)}"
                raise ArgumentError(f"--output {self.path} holds a comparison of other settings ({told}); name another")

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write the settings of a new grid, or check those of one that is there; see :meth:`check`."""
        self.check(settings)
        if self._settings() is None:
            self._write(self.path / _SETTINGS, settings)

    def find(self, cell: Cell) -> Result | None:
        """A cell that was done before; None where it was not, or its files are no longer those it left.

        Raises:
            ArgumentError: it was done with other arguments.
        """
        folder = self.folder(cell)
        try:
            found = Result.model_validate_json((folder / _DONE).read_bytes())
            intact = (folder / found.results).is_file() and sha256_file(folder / found.samples) == found.samples_sha256
        except (OSError, pydantic.ValidationError):
            return None
        if found.model_args != json.loads(json.dumps(dict(cell.args))):
            raise ArgumentError(
                f"--output {self.path} holds {cell} with other model_args ({found.command}); name another folder"
            )
        return found if intact else None

    def clear(self, cell: Cell) -> Path:
        """An empty folder for a cell, rid of what a kill left there.

        Raises:
            StorageError: it cannot be made.
        """
        folder = self.folder(cell)
        try:
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error
        return folder

    def finish(self, cell: Cell, result: Result) -> None:
        """Mark a cell as done; this is the last that is written of it.

        Raises:
            StorageError: it cannot be written.
        """
        self._write(self.folder(cell) / _DONE, result.model_dump(mode="json"))

    def folder(self, cell: Cell) -> Path:
        """Where a cell lies."""
        return self.path / "cells" / cell.name

    def _settings(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.path / _SETTINGS).read_bytes()))
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            return None
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path / _SETTINGS} cannot be read: {error}; name another folder") from error

    def _write(self, path: Path, value: Any) -> None:
        atomic_write(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]}…"
