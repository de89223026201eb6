"""Adaptations on disk: found again by their key, and not repeated."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pydantic
from pydantic import BaseModel, ConfigDict

from t2.adapters.strategies.base import Choice, Job
from t2.adapters.strategies.mixing import choose, rows_of
from t2.core.digests import canonical_json
from t2.core.files import atomic_write
from t2.core.record import AdaptationRecord
from t2.core.settings import cache_dir

FORMAT = 2
"""Part of every key: raise it when the same inputs would lead to another adaptation."""

_log = logging.getLogger(__name__)


class StoredPlan(BaseModel):
    """What a plan comes down to, without its vectors.

    Attributes:
        alphas: the coefficients of each mixture by expert (and group of matrices); empty for the base.
        rows: the mixture of each doc; a single number stands for all docs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    alphas: tuple[dict[str, float], ...]
    rows: tuple[int, ...]


class Stored(BaseModel):
    """An adaptation as it lies on disk: its record and its plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    record: AdaptationRecord
    plan: StoredPlan


def path_of(key: str) -> Path:
    """Where the adaptation with this key lies."""
    return cache_dir() / "adaptations" / f"{key}.json"


def load(key: str) -> Stored | None:
    """The adaptation with this key, or None; a file that cannot be read counts as absent, with a warning."""
    path = path_of(key)
    if not path.exists():
        return None
    try:
        return Stored.model_validate_json(path.read_bytes())
    except (OSError, pydantic.ValidationError) as error:
        _log.warning("%s cannot be read (%s); adapting again", path, type(error).__name__)
        return None


def save(stored: Stored) -> Path:
    """Write an adaptation.

    Raises:
        StorageError: the disk is full or the cache cannot be written.
    """
    path = path_of(stored.record.key)
    text = json.dumps(stored.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=False)
    atomic_write(path, text.encode() + b"\n")
    return path


def write_records(path: Path, records: Sequence[AdaptationRecord]) -> None:
    """Write records as a JSON list, for ``record=``.

    Raises:
        StorageError: the file cannot be written.
    """
    text = ",\n".join(canonical_json(record.model_dump(mode="json")) for record in records)
    atomic_write(path, f"[\n{text}\n]\n".encode())


def restore(job: Job, alpha: dict[str, float]) -> Choice:
    """The mixture with the given coefficients, as :func:`t2.adapters.strategies.mixing.choose` labels them.

    Raises:
        KeyError: the coefficients are not those of the job's experts.
    """
    if not alpha:
        return Choice()
    used, rows, base = rows_of(job.experts, alpha, job.options)
    return choose(replace(job, experts=used), rows, base)
