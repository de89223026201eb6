"""Reading adaptation records from whatever holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from t2.core.errors import ArgumentError, DataError
from t2.core.record import AdaptationRecord


def read_records(path: str | Path) -> list[AdaptationRecord]:
    """The adaptation records in a file: what ``record=`` wrote, lm-eval's results, or an entry of t2's cache.

    Raises:
        ArgumentError: the file cannot be read.
        DataError: it holds no records.
    """
    path = Path(path).expanduser()
    try:
        content: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise ArgumentError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON, so it holds no adaptation records") from error
    found = content
    if isinstance(content, Mapping):
        found = [content["record"]] if "record" in content else _inside(content, "config", "t2", "records")
    try:
        return [AdaptationRecord.model_validate(entry) for entry in found or ()]
    except (TypeError, pydantic.ValidationError) as error:
        raise DataError(
            f"{path} holds no adaptation records; name a file of record=, or a results file of lm_eval --model t2"
        ) from error


def _inside(content: Any, *keys: str) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content if content is not None else [None]
