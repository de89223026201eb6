"""Reward curves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from t2.core.curve import CurvePoint
from t2.core.errors import ConflictError, InvalidRequestError, TooLargeError
from t2.core.references import ExpertName
from t2.registry.db import models
from t2.registry.names import check_points
from t2.registry.schemas import Curve
from t2.registry.services import audit, experts, versions
from t2.registry.services.actor import Actor, Limits

_FIELDS = tuple(CurvePoint.model_fields)
MIN_POINTS = 3


def add_points(
    session: Session, actor: Actor, name: ExpertName, number: int, points: Sequence[CurvePoint], limits: Limits
) -> int:
    """Add points to a curve; returns how many are new.

    Raises:
        ConflictError: a point differs from the one there at its step and split.
        TooLargeError: too many at once, or altogether.
    """
    check_points(len(points), limits.points_a_call)
    experts.find(session, name, lock=True)
    version = versions.find(session, name, number)
    given = {(point.split, point.step): point for point in points}
    if len(given) != len(points):
        raise InvalidRequestError("two points have the same step and split")
    steps = [point.step for point in points]
    if steps and not (min(steps) >= 0 and max(steps) < 2**31):
        raise InvalidRequestError("a step is negative or beyond 2147483647")
    if not points:
        return 0
    near = _points(session, version.id, None, steps=(min(steps), max(steps)))
    there = {(point.split, point.step): point for point in near}
    for key in given.keys() & there.keys():
        if given[key] != there[key]:
            raise ConflictError(f"{name}@{number} has another {key[0]} point at step {key[1]}; points are immutable")
    new = [given[key] for key in given if key not in there]
    if new:
        total = count(session, version.id) + len(new)
        if total > limits.points:
            raise TooLargeError(f"a curve of {total} points, the limit is {limits.points}")
        session.execute(
            models.CurvePoint.__table__.insert(),  # type: ignore[attr-defined]  # a Table, typed as FromClause
            [{"version_id": version.id, **point.model_dump()} for point in new],
        )
        audit.record(session, actor, "curve.add", f"{name}@{number}", points=len(new))
    return len(new)


def curve(session: Session, name: ExpertName, number: int, split: str | None, points: int | None) -> Curve:
    """A curve, whole or downsampled split by split."""
    if points is not None and points < MIN_POINTS:
        raise InvalidRequestError(f"points: {points} is too few, at least {MIN_POINTS}")
    if split not in (None, "train", "validation"):
        raise InvalidRequestError(f"split: {split!r} is neither train nor validation")
    experts.find(session, name)
    version = versions.find(session, name, number)
    if points is None:
        whole = _points(session, version.id, split)
        return Curve(points=tuple(whole), total=len(whole))
    kept: list[CurvePoint] = []
    total = 0
    for each in ("train", "validation") if split is None else (split,):
        of_split = _points(session, version.id, each)
        total += len(of_split)
        kept += downsample(of_split, points)
    return Curve(points=tuple(sorted(kept, key=lambda point: (point.step, point.split))), total=total)


def count(session: Session, version_id: int) -> int:
    """Points of a version."""
    return session.scalar(select(func.count()).where(models.CurvePoint.version_id == version_id)) or 0


def downsample(points: Sequence[CurvePoint], wanted: int) -> list[CurvePoint]:
    """Keep the points that keep a curve's shape: largest triangle three buckets on (step, reward).

    Steinarsson, "Downsampling Time Series for Visual Representation", University of Iceland 2013, section 4.2.

    Args:
        points: of one split, by step.
        wanted: how many to keep, at least 3; the first and the last are always kept.
    """
    if len(points) <= wanted:
        return list(points)
    x: npt.NDArray[np.float64] = np.array([point.step for point in points], dtype=np.float64)
    y: npt.NDArray[np.float64] = np.array([point.reward for point in points], dtype=np.float64)
    edges = np.linspace(1, len(points) - 1, wanted - 1).astype(int)
    kept = [0]
    for i in range(wanted - 2):
        start, stop = edges[i], edges[i + 1]
        following = slice(stop, edges[i + 2] if i + 2 < len(edges) else len(points))
        next_x, next_y = x[following].mean(), y[following].mean()
        last = kept[-1]
        areas = np.abs((x[last] - next_x) * (y[start:stop] - y[last]) - (x[last] - x[start:stop]) * (next_y - y[last]))
        kept.append(int(start + areas.argmax()))
    return [points[i] for i in [*kept, len(points) - 1]]


def _points(
    session: Session, version_id: int, split: str | None, *, steps: tuple[int, int] | None = None
) -> list[CurvePoint]:
    """Points by step, of one split and of a range of steps with both ends, where they are given."""
    table = models.CurvePoint
    statement = select(*(getattr(table, field) for field in _FIELDS)).where(table.version_id == version_id)
    if split is not None:
        statement = statement.where(table.split == split)
    if steps is not None:
        statement = statement.where(table.step.between(*steps))
    rows = session.execute(statement.order_by(table.step, table.split))
    return [CurvePoint.model_construct(**dict(zip(_FIELDS, row, strict=True))) for row in rows]
