"""Reward curves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import Connection, Result, Row, Select, bindparam, func, or_, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session

from t2.core.curve import CurvePoint
from t2.core.errors import ConflictError, InvalidRequestError, TooLargeError
from t2.core.references import ExpertName
from t2.registry.db import models
from t2.registry.db.lookups import any_of, columns
from t2.registry.names import check_points
from t2.registry.schemas import Curve
from t2.registry.services import audit, experts, versions
from t2.registry.services.actor import Actor, Limits

_FIELDS = tuple(CurvePoint.model_fields)
_SPLITS = ("train", "validation")
_POINT = columns(models.CurvePoint)
_OF_VERSION = _POINT.version_id == bindparam("version")
_PAIRS = select(_POINT.split, _POINT.step, _POINT.reward).where(_OF_VERSION).order_by(_POINT.step)
_ARRAYS = (
    select(
        _POINT.split,
        *(
            func.array_agg(postgresql.aggregate_order_by(column, _POINT.step))
            for column in (_POINT.step, _POINT.reward)
        ),
    )
    .where(_OF_VERSION)
    .group_by(_POINT.split)
)
_CHOSEN = (
    select(*(_POINT[field] for field in _FIELDS))
    .where(_OF_VERSION, or_(*((_POINT.split == name) & any_of(_POINT.step, name) for name in _SPLITS)))
    .order_by(_POINT.step, _POINT.split)
)
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
    if points is None:
        rows = _rows(reader, version_id, split)
        return Curve(points=_points(rows), total=len(rows))
    chosen, total = _choose(reader, version_id, split, points)
    return Curve(points=_points(reader.execute(_CHOSEN, chosen).all()), total=total)


def curve_json(reader: Session | Connection, version_id: int, split: str | None, points: int | None) -> bytes:
    """Return :func:`curve` as JSON; a long curve of objects would take ten times the memory."""
    if points is None:
        pieces, total = _dump(reader.execute(*_query(version_id, split)))
    else:
        chosen, total = _choose(reader, version_id, split, points)
        pieces, _ = _dump(reader.execute(_CHOSEN, chosen))
    return b'{"points":[' + b",".join(pieces) + b'],"total":%d}' % total


def _dump(rows: Result[*tuple[Any, ...]]) -> tuple[list[bytes], int]:
    """Serialise rows in pieces of 2000 points; return the pieces and the number of points."""
    pieces, count = [], 0
    for part in rows.partitions(2000):
        pieces.append(_POINTS.dump_json(_points(part))[1:-1])
        count += len(part)
    return pieces, count


def _choose(
    reader: Session | Connection, version_id: int, split: str | None, points: int
) -> tuple[dict[str, Any], int]:
    """Return the query parameters of a downsampled curve, and the total number of points."""
    outline = _outline(reader, version_id, split)
    kept = {name: [steps[i] for i in downsample(steps, rewards, points)] for name, steps, rewards in outline}
    chosen = {"version": version_id, **{name: kept.get(name, []) for name in _SPLITS}}
    return chosen, sum(len(steps) for _, steps, _ in outline)


def _outline(
    reader: Session | Connection, version_id: int, split: str | None
) -> list[tuple[str, Sequence[int], Sequence[float]]]:
    """Steps and rewards of each split, by step: what decides which points are kept.

    On PostgreSQL they come as arrays. The rows of a curve of 20,000 points take ten times as long to read, and all else
    that the process does waits.
    """
    dialect = reader.get_bind().dialect if isinstance(reader, Session) else reader.dialect
    if dialect.name == "postgresql":
        rows = reader.execute(_ARRAYS, {"version": version_id}).all()
        found = {row[0]: (row[1], row[2]) for row in rows}
    else:
        found = {name: ([], []) for name in _SPLITS}
        for name, step, reward in reader.execute(_PAIRS, {"version": version_id}):
            found[name][0].append(step)
            found[name][1].append(reward)
    return [(name, *found[name]) for name in _SPLITS if name in found and split in (None, name)]


def count(session: Session, version_id: int) -> int:
    """Points of a version."""
    return session.scalar(select(func.count()).where(models.CurvePoint.version_id == version_id)) or 0


def downsample(xs: Sequence[float], ys: Sequence[float], wanted: int) -> list[int]:
    """Which points keep a curve's shape: largest triangle three buckets.

    Steinarsson, "Downsampling Time Series for Visual Representation", University of Iceland 2013, section 4.2.

    Args:
        xs, ys: the points, by x.
        wanted: how many to keep, at least 3; the first and the last are always kept.

    Returns:
        Their positions.
    """
    count = len(xs)
    if count <= wanted:
        return list(range(count))
    # A bucket has few points as a rule, for which plain loops are faster than arrays.
    edges = [1 + i * (count - 2) // (wanted - 2) for i in range(wanted - 1)]
    kept = [0]
    for i in range(wanted - 2):
        start, stop = edges[i], edges[i + 1]
        beyond = edges[i + 2] if i + 2 < len(edges) else count
        next_x, next_y = (sum(values[stop:beyond]) / (beyond - stop) for values in (xs, ys))
        last_x, last_y = xs[kept[-1]], ys[kept[-1]]
        width, height = last_x - next_x, next_y - last_y
        areas = [
            abs(width * (y - last_y) - (last_x - x) * height)
            for x, y in zip(xs[start:stop], ys[start:stop], strict=True)
        ]
        kept.append(start + areas.index(max(areas)))
    return [*kept, count - 1]


def _rows(
    reader: Session | Connection, version_id: int, split: str | None, steps: tuple[int, int] | None = None
) -> list[Row[*tuple[Any, ...]]]:
    """Rows by step, of one split and of a range of steps with both ends, where they are given."""
    return list(reader.execute(*_query(version_id, split, steps)).all())


def _query(
    version_id: int, split: str | None, steps: tuple[int, int] | None = None
) -> tuple[Select[*tuple[Any, ...]], dict[str, Any]]:
    values: dict[str, Any] = {"version": version_id}
    if split is not None:
        values["split"] = split
    if steps is not None:
        values |= {"first": steps[0], "last": steps[1]}
    return _selection(split is not None, steps is not None), values


@cache
def _selection(of_split: bool, of_steps: bool) -> Select[*tuple[Any, ...]]:
    statement = select(*(_POINT[field] for field in _FIELDS)).where(_OF_VERSION)
    if of_split:
        statement = statement.where(_POINT.split == bindparam("split"))
    if of_steps:
        statement = statement.where(_POINT.step.between(bindparam("first"), bindparam("last")))
    return statement.order_by(_POINT.step, _POINT.split)


def _points(rows: Sequence[Row[*tuple[Any, ...]]]) -> tuple[CurvePoint, ...]:
    # Checking all of them together takes a tenth of the time of making each by model_construct.
    return _POINTS.validate_python([dict(zip(_FIELDS, row, strict=True)) for row in rows])
