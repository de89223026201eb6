"""Reward curves: JSON lines of points, appended as training goes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pydantic
from pydantic import BaseModel, ConfigDict

from t2.core.digests import canonical_json
from t2.core.errors import DataError
from t2.core.files import append_line


class CurvePoint(BaseModel):
    """One point of a reward curve.

    Attributes:
        step: gradient steps done before the measurement.
        split: ``train`` (the step's own batch) or ``validation``.
        reward: mean reward.
        score: the task's metric, aggregated by the task.
        kl: mean KL divergence per token to the base, in nats; None where not measured.
        learning_rate: of this step.
        gradient_norm: before clipping.
        seconds: since training began, resumes included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    step: int
    split: Literal["train", "validation"]
    reward: float
    score: float
    kl: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    seconds: float


def append_point(path: Path, point: CurvePoint) -> None:
    """Append a point to a curve file, synced to disk."""
    append_line(path, canonical_json(point.model_dump(mode="json")))


def read_curve(path: Path) -> list[CurvePoint]:
    """Read a curve file; a last line cut by a kill is left out.

    Raises:
        DataError: the file cannot be read or another line is not a point.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the curve {path}: {error.strerror or error}") from error
    lines = data.split(b"\n")
    points = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            points.append(CurvePoint.model_validate_json(line))
        except pydantic.ValidationError as error:
            raise DataError(f"{path}, line {number} is not a point of a reward curve") from error
    return points
