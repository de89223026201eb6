"""Reward curves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from operator import itemgetter
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import Connection, Row, Select, bindparam, func, select
from sqlalchemy.orm import Session

from t2.core.curve import CurvePoint
from t2.core.errors import ConflictError, InvalidRequestError, TooLargeError
from t2.core.references import ExpertName
from t2.registry.db import models
from t2.registry.db.lookups import columns
from t2.registry.names import check_points
from t2.registry.schemas import Curve
from t2.registry.services import audit, experts, versions
from t2.registry.services.actor import Actor, Limits

_FIELDS = tuple(CurvePoint.model_fields)
_STEP, _SPLIT, _REWARD = (_FIELDS.index(name) for name in ("step", "split", "reward"))
_SPLITS = ("train", "validation")
_POINT = columns(models.CurvePoint)
_POINTS = TypeAdapter(tuple[CurvePoint, ...])
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
    near = _rows(session, version.id, None, (min(steps), max(steps)))
    there = {(point.split, point.step): point for point in _points(near)}
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


def check_wanted(split: str | None, points: int | None) -> None:
    """Check what is asked of a curve.

    Raises:
        InvalidRequestError: there is no such split, or too few points are wanted.
    """
    if points is not None and points < MIN_POINTS:
        raise InvalidRequestError(f"points: {points} is too few, at least {MIN_POINTS}")
    if split not in (None, *_SPLITS):
        raise InvalidRequestError(f"split: {split!r} is neither train nor validation")


def curve(reader: Session | Connection, version_id: int, split: str | None, points: int | None) -> Curve:
    """A curve, whole or downsampled split by split."""
    rows = _rows(reader, version_id, split)
    total = len(rows)
    if points is not None:
        parts: dict[str, list[Row[*tuple[Any, ...]]]] = {each: [] for each in _SPLITS}
        for row in rows:
            parts[row[_SPLIT]].append(row)
        rows = [
            part[i] for part in parts.values() for i in downsample([(row[_STEP], row[_REWARD]) for row in part], points)
        ]
        rows.sort(key=itemgetter(_STEP, _SPLIT))
    return Curve(points=_points(rows), total=total)


def count(session: Session, version_id: int) -> int:
    """Points of a version."""
    return session.scalar(select(func.count()).where(models.CurvePoint.version_id == version_id)) or 0


def downsample(points: Sequence[tuple[float, float]], wanted: int) -> list[int]:
    """Which points keep a curve's shape: largest triangle three buckets.

    Steinarsson, "Downsampling Time Series for Visual Representation", University of Iceland 2013, section 4.2.

    Args:
        points: x and y, by x.
        wanted: how many to keep, at least 3; the first and the last are always kept.

    Returns:
        Their positions in ``points``.
    """
    count = len(points)
    if count <= wanted:
        return list(range(count))
    # A bucket has few points as a rule, for which plain loops are faster than arrays.
    edges = [1 + i * (count - 2) // (wanted - 2) for i in range(wanted - 1)]
    kept = [0]
    for i in range(wanted - 2):
        start, stop = edges[i], edges[i + 1]
        following = points[stop : edges[i + 2] if i + 2 < len(edges) else count]
        next_x = sum(x for x, _ in following) / len(following)
        next_y = sum(y for _, y in following) / len(following)
        last_x, last_y = points[kept[-1]]
        width, height = last_x - next_x, next_y - last_y
        areas = [abs(width * (y - last_y) - (last_x - x) * height) for x, y in points[start:stop]]
        kept.append(start + areas.index(max(areas)))
    return [*kept, count - 1]


def _rows(
    reader: Session | Connection, version_id: int, split: str | None, steps: tuple[int, int] | None = None
) -> list[Row[*tuple[Any, ...]]]:
    """Rows by step, of one split and of a range of steps with both ends, where they are given."""
    values: dict[str, Any] = {"version": version_id}
    if split is not None:
        values["split"] = split
    if steps is not None:
        values |= {"first": steps[0], "last": steps[1]}
    return list(reader.execute(_selection(split is not None, steps is not None), values).all())


@cache
def _selection(of_split: bool, of_steps: bool) -> Select[*tuple[Any, ...]]:
    statement = select(*(_POINT[field] for field in _FIELDS)).where(_POINT.version_id == bindparam("version"))
    if of_split:
        statement = statement.where(_POINT.split == bindparam("split"))
    if of_steps:
        statement = statement.where(_POINT.step.between(bindparam("first"), bindparam("last")))
    return statement.order_by(_POINT.step, _POINT.split)


def _points(rows: Sequence[Row[*tuple[Any, ...]]]) -> tuple[CurvePoint, ...]:
    # Checking all of them together takes a tenth of the time of making each by model_construct.
    return _POINTS.validate_python([dict(zip(_FIELDS, row, strict=True)) for row in rows])
