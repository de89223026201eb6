"""Boards: runs that can be compared, the best first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, func, not_, or_, select
from sqlalchemy.orm import Session

from t2.core.errors import NotFoundError, nearest
from t2.core.references import is_digest
from t2.core.results import NO_METRIC
from t2.registry.db import models
from t2.registry.db.database import VARIED
from t2.registry.db.lookups import columns
from t2.registry.schemas import Board, BoardEntry, BoardPage, BoardQuery, Page
from t2.registry.services import base_models, runs
from t2.registry.services.paging import Order, fetch_page

_BOARD, _RUN, _SCORE = (columns(table) for table in (models.Board, models.Run, models.RunScore))
_UNCONFIRMED = "unconfirmed."
"""Prefix of cursors into unconfirmed scores; no other cursor contains a dot."""
_OTHER = models.Board.__table__.alias("other").c
_NAME, _OTHER_NAME = func.coalesce(_BOARD.base_name, _BOARD.base), func.coalesce(_OTHER.base_name, _OTHER.base)
_ALIKE = and_(*(_OTHER[name] == _BOARD[name] for name in ("task", "task_version", "n_shot", "docs_digest")))
_SHOWN = select(_OTHER.id).where(_ALIKE, _OTHER.base.in_((_BOARD.base, _NAME)))
"""Boards whose runs a board shows: itself, and that of its model's name without an identity."""
_RUNS = _RUN.board_id.in_(_SHOWN.correlate(models.Board.__table__))
_COUNT = select(func.count()).where(_RUNS).correlate(models.Board.__table__).scalar_subquery()
_NEWEST = select(func.max(_RUN.id)).where(_RUNS).correlate(models.Board.__table__).scalar_subquery()
_OWN = select(_RUN.id).where(_RUN.board_id == _BOARD.id).correlate(models.Board.__table__).exists()
_COVERED = (
    select(_OTHER.id)
    .where(
        _ALIKE,
        _BOARD.base == _NAME,
        _OTHER_NAME == _NAME,
        _OTHER.base != _OTHER_NAME,
        select(_RUN.id).where(_RUN.board_id == _OTHER.id).exists(),
    )
    .correlate(models.Board.__table__)
    .exists()
)
"""Whether a board without an identity is included in a board with one."""
_FIELDS = {
    "task": _BOARD.task,
    "task_version": _BOARD.task_version,
    "n_shot": _BOARD.n_shot,
    "base": _NAME,
    "base_identity": func.nullif(_BOARD.base, _NAME),
    "docs": _BOARD.docs,
    "docs_digest": _BOARD.docs_digest,
    "runs": _COUNT,
}


def list_boards(session: Session, *, task: str | None, base: str | None, cursor: str | None, limit: int) -> Page[Board]:
    """Boards with a run on them, the newest first."""
    statement = _boards()
    if task is not None:
        statement = statement.where(_BOARD.task == task)
    if base is not None:
        statement = statement.where(_of_base(session, base))
    rows, next_cursor = fetch_page(
        session,
        statement.execution_options(**{VARIED: True}),
        Order(models.Board.id, models.Board.id, descending=True),
        query=["boards", task, base],
        cursor=cursor,
        limit=limit,
        position=lambda row: (row.id, row.id),
    )
    return Page(items=[_shape(row) for row in rows], next=next_cursor)


def board(session: Session, query: BoardQuery, *, cursor: str | None, limit: int) -> BoardPage:
    """A page of a board.

    Raises:
        NotFoundError: there is no run of this task, by this base model, or with this metric.
    """
    chosen = _choose(session, query)
    shown = session.scalars(_SHOWN.where(_BOARD.id == chosen.id)).all()
    by = (
        select(_SCORE.metric, _SCORE.filter, _SCORE.higher_is_better)
        .where(_SCORE.board_id.in_(shown), _SCORE.metric != NO_METRIC)
        .order_by(_SCORE.confirmed.desc(), _SCORE.run_id.desc(), _SCORE.position)
        .limit(1)
    )
    if query.metric is None and query.filter is None:
        by = by.where(_SCORE.position == 0)
    for column, wanted in ((_SCORE.metric, query.metric), (_SCORE.filter, query.filter)):
        if wanted is not None:
            by = by.where(column == wanted)
    found = session.execute(by).one_or_none()
    if found is None:
        scored = select(_SCORE.metric, _SCORE.filter).where(_SCORE.board_id.in_(shown)).distinct()
        known = {f"{metric},{filter_}" for metric, filter_ in session.execute(scored)}
        asked = f"{query.metric or '*'},{query.filter or '*'}"
        raise NotFoundError(f"no run of {query.task} has a score {asked}{nearest(asked, known)}")
    metric, filter_, higher = found
    statement = (
        runs.joined()
        .add_columns(_SCORE.score)
        .join(models.RunScore.__table__, _SCORE.run_id == _RUN.id)
        .where(
            _SCORE.board_id.in_(shown),
            _SCORE.metric == metric,
            _SCORE.filter == filter_,
            _SCORE.score.is_not(None),
        )
    )

    def page(confirmed: bool, cursor: str | None, limit: int) -> tuple[Sequence[Any], str | None]:
        return fetch_page(
            session,
            statement.where(_SCORE.confirmed.is_(confirmed)),
            Order(models.RunScore.score, models.RunScore.run_id, descending=higher),
            query=["board", chosen.id, metric, filter_, *([] if confirmed else ["unconfirmed"])],
            cursor=cursor,
            limit=limit,
            position=lambda row: (row.score, row.id),
        )

    rows, next_cursor = _confirmed_first(page, cursor, limit)
    items = []
    for run in runs.shape(session, rows):
        score = next(each for each in run.scores if (each.metric, each.filter) == (metric, filter_))
        items.append(BoardEntry(score=score, run=run))
    return BoardPage(
        board=_shape(chosen), metric=metric, filter=filter_, higher_is_better=higher, items=items, next=next_cursor
    )


def _confirmed_first(
    page: Callable[[bool, str | None, int], tuple[Sequence[Any], str | None]], cursor: str | None, limit: int
) -> tuple[Sequence[Any], str | None]:
    """Fetch a page of confirmed rows, then unconfirmed ones; each is a separate index range.

    Args:
        page: fetches rows, confirmed or not, and the next page's cursor.
    """
    if cursor is not None and cursor.startswith(_UNCONFIRMED):
        rows, after = page(False, cursor.removeprefix(_UNCONFIRMED) or None, limit)
        return rows, None if after is None else _UNCONFIRMED + after
    rows, after = page(True, cursor, limit)
    if after is not None:
        return rows, after
    if len(rows) == limit:
        return rows, _UNCONFIRMED if page(False, None, 1)[0] else None
    others, after = page(False, None, limit - len(rows))
    return [*rows, *others], None if after is None else _UNCONFIRMED + after


def _choose(session: Session, query: BoardQuery) -> Any:
    """The row of a board that has a run."""
    of_base = _of_base(session, query.base)
    statement = _boards().where(_BOARD.task == query.task, of_base)
    for name in ("task_version", "n_shot", "docs_digest"):
        wanted = getattr(query, name)
        if wanted is not None:
            statement = statement.where(_BOARD[name] == wanted)
    found = session.execute(statement.order_by(_BOARD.docs.desc(), _NEWEST.desc()).limit(1)).one_or_none()
    if found is not None:
        return found
    tasks = set(session.scalars(select(_BOARD.task).where(_OWN, of_base).distinct().limit(1000)))
    if query.task in tasks:
        raise NotFoundError(f"no run of {query.task} by {query.base} has this version, number of shots and documents")
    raise NotFoundError(f"there is no run of {query.task} by {query.base}{nearest(query.task, tasks)}")


def _of_base(session: Session, base: str) -> ColumnElement[bool]:
    """Condition that selects the boards of a base model, by identity, fingerprint or name."""
    if not is_digest(base):
        return or_(_BOARD.base_name == base, and_(_BOARD.base_name.is_(None), _BOARD.base == base))
    of_base = select(_RUN.board_id).where(_RUN.base_model_id.in_(base_models.ids_of(session, base)))
    return or_(_BOARD.base == base, _BOARD.id.in_(of_base))


def _boards() -> Select[*tuple[Any, ...]]:
    """Boards that have a run, except those that are included in another."""
    return select(_BOARD.id, *(column.label(name) for name, column in _FIELDS.items())).where(_OWN, not_(_COVERED))


def _shape(row: Any) -> Board:
    return Board(**{name: getattr(row, name) for name in _FIELDS})
