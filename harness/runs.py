"""What a training left beside its expert: the curve, and the scores that a registry keeps as metrics.

Nothing here needs PyTorch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
from pydantic import BaseModel, ConfigDict

from t2.core.curve import CurvePoint, read_curve
from t2.core.errors import DataError
from t2.core.manifest import BaseModelRef
from t2.harness.catalogue import FILE_NAME
from t2.registry.schemas import VALIDATION_SCORE

CURVE, SCORES, BASE = "curve.jsonl", "scores.json", "base.json"
_METRICS = {
    VALIDATION_SCORE: "best_score",
    "validation.base_score": "base_score",
    "validation.reward": "best_reward",
    "validation.base_reward": "base_reward",
}
"""Metrics by their field in ``scores.json``; in all of them more is better."""


class BaseTargets(BaseModel):
    """The base model of a training with the rank of each matrix that could be adapted: ``base.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: BaseModelRef
    targets: dict[str, int]


@dataclass(frozen=True)
class Run:
    """What is known of an expert beside its file.

    Attributes:
        curve: the points of its training.
        metrics: numbers about it, by the name a registry keeps them under.
        base: its base model with the ranks of all its matrices.
    """

    curve: Sequence[CurvePoint] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    base: BaseTargets | None = None

    @property
    def score(self) -> float | None:
        """The validation score by which default experts are chosen."""
        return self.metrics.get(VALIDATION_SCORE)


def read_run(file: Path) -> Run:
    """What lies beside an expert's file; nothing where that is not in a folder of its own.

    Without ``scores.json`` the score is the best on validation docs in the curve.

    Raises:
        DataError: the curve, the scores or the base are damaged.
    """
    if file.name != FILE_NAME:
        return Run()
    folder = file.parent
    curve = read_curve(folder / CURVE) if (folder / CURVE).exists() else []
    scores: Any = _read_json(folder / SCORES)
    metrics = {}
    if isinstance(scores, Mapping):
        found = {metric: scores.get(name) for metric, name in _METRICS.items()}
        metrics = {m: float(v) for m, v in found.items() if isinstance(v, (int, float)) and math.isfinite(v)}
    reached = [point.score for point in curve if point.split == "validation"]
    if reached:
        metrics.setdefault(VALIDATION_SCORE, max(reached))
    base = _read_json(folder / BASE)
    try:
        return Run(curve, metrics, None if base is None else BaseTargets.model_validate(base))
    except pydantic.ValidationError as error:
        raise DataError(f"{folder / BASE} does not name a base model and its ranks; remove it") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
