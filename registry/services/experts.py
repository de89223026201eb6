"""Experts: finding, listing, describing, tagging."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import cache, lru_cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, Integer, Select, bindparam, delete, exists, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from t2.core.errors import ConflictError, InvalidRequestError, NotFoundError
from t2.core.references import ExpertName
from t2.registry.db import models
from t2.registry.db.database import VARIED, insert_once
from t2.registry.db.lookups import columns
from t2.registry.names import MAX_TAGS, known_name
from t2.registry.schemas import VALIDATION_SCORE, ExpertQuery, MetricRange, Version
from t2.registry.services import audit, base_models, cards, namespaces, versions
from t2.registry.services.actor import Actor
from t2.registry.services.paging import Order, fetch_page

_FEW = 1000

_SORTS: dict[str, InstrumentedAttribute[Any]] = {
    "updated": models.Expert.updated_at,
    "created": models.Expert.created_at,
    "name": models.Expert.path,
    "score": models.Expert.score,
}


_EXPERT = columns(models.Expert)
_NAMED = _EXPERT.path == bindparam("path")
_FOUND = select(models.Expert).where(_NAMED)
_LOCKED = _FOUND.with_for_update()
_LIVE_ID = select(_EXPERT.id).where(_NAMED, _EXPERT.deleted_at.is_(None))
_CONDITIONS: dict[str, ColumnElement[bool]] = {
    "namespace": models.Expert.namespace_id == bindparam("namespace"),
    "base": models.Expert.base_model_id.in_(bindparam("base", expanding=True)),
    "task": models.Expert.task == bindparam("task"),
    "domain": models.Expert.domain == bindparam("domain"),
    "kind": models.Expert.kind == bindparam("kind"),
    "text": models.Expert.search_text.like(bindparam("text"), escape="/"),
}
"""Conditions of a query, by its fields, each with a parameter of this name."""
_WILD = re.compile("[%_/]")


def find(session: Session, name: ExpertName, *, deleted: bool = False, lock: bool = False) -> models.Expert:
    """An expert's row.

    Args:
        deleted: also find one that is deleted.
        lock: hold it until the transaction ends, so that its versions get numbers in turn.

    Raises:
        NotFoundError: there is none.
    """
    known_name(name)
    row = session.scalar(_LOCKED if lock else _FOUND, {"path": str(name)})
    if row is None:
        raise NotFoundError(f"there is no expert {name}")
    if row.deleted_at is not None and not deleted:
        raise NotFoundError(f"the expert {name} is deleted; it can be restored")
    return row


def id_of(session: Session, name: ExpertName) -> int:
    """The id of an expert that is not deleted.

    Raises:
        NotFoundError: there is none.
    """
    known_name(name)
    found = session.scalar(_LIVE_ID, {"path": str(name)})
    return found if found is not None else find(session, name).id


def get(reader: Connection, name: ExpertName) -> str:
    """The card of an expert that is not deleted."""
    known_name(name)
    row = reader.execute(_shown(), {"path": str(name)}).first()
    if row is None:
        raise NotFoundError(f"there is no expert {name}")
    if row.deleted_at is not None:
        raise NotFoundError(f"the expert {name} is deleted; it can be restored")
    return cards.told(reader, [row])[0]


@cache
def _shown() -> Select[*tuple[Any, ...]]:
    return select(_EXPERT.id, _EXPERT.deleted_at, cards.CARD).where(_NAMED)


def ensure(session: Session, actor: Actor, name: ExpertName, kind: str) -> models.Expert:
    """The expert an upload is for, locked; made when new.

    Raises:
        ConflictError: it is of another kind, or deleted.
    """
    namespace = namespaces.ensure(session, actor, name.namespace)
    at = audit.now()
    made = insert_once(
        session,
        models.Expert,
        namespace_id=namespace.id,
        name=name.name,
        path=str(name),
        kind=kind,
        description="",
        search_text="",
        last=0,
        live=0,
        created_at=at,
        updated_at=at,
    )
    row = find(session, name, deleted=True, lock=True)
    if made:
        row.last = last_of_purged(session, str(name))
        audit.record(session, actor, "expert.create", str(name), kind=kind)
    if row.deleted_at is not None:
        raise ConflictError(f"the expert {name} is deleted; restore it first")
    if row.kind != kind:
        raise ConflictError(f"{name} is of kind {row.kind}, the file of kind {kind}; upload it under another name")
    return row


def last_of_purged(session: Session, path: str) -> int:
    """Highest version number that a purged name ever had; 0 for a name never purged."""
    row = session.get(models.PurgedExpert, path)
    return row.last if row is not None else 0


def record_purged(session: Session, path: str, last: int) -> None:
    """Reserve the version numbers of a purged name."""
    if not insert_once(session, models.PurgedExpert, path=path, last=last):
        row = session.get_one(models.PurgedExpert, path, with_for_update=True, populate_existing=True)
        row.last = max(row.last, last)


def refresh(
    session: Session, row: models.Expert, *, live: int = 0, last: int = 0, at: datetime | None = None
) -> Version | None:
    """Copy to the expert what lists go by and tell, after anything of it has changed.

    Args:
        row: held locked.
        live: how many versions came to be, or came back, less those that were deleted.
        last: the number of a version that came to be.
        at: when it was last updated; now where None.

    Returns:
        The latest version that is not deleted.
    """
    session.flush()
    latest, base_model_id, tags = versions.newest(session, row.id)
    row.live += live
    row.last = max(row.last, last)
    row.latest = latest.version if latest is not None else None
    row.task = latest.task if latest is not None else None
    row.domain = latest.domain if latest is not None else None
    row.base_model_id = base_model_id
    row.score = latest.metrics.get(VALIDATION_SCORE) if latest is not None else None
    row.search_text = " ".join(filter(None, (row.path, row.task, row.description))).lower()
    row.updated_at = row.carded_at = at or audit.now()
    row.card = cards.dump_card(cards.of(row, latest, tags))
    return latest


def describe(session: Session, actor: Actor, name: ExpertName, description: str) -> str:
    """Set the description."""
    row = find(session, name, lock=True)
    row.description = description
    refresh(session, row)
    audit.record(session, actor, "expert.describe", str(name))
    assert row.card is not None
    return cards.add_aliases(session, {row.id: row.card})[0]


def change_tags(session: Session, actor: Actor, name: ExpertName, add: Iterable[str], remove: Iterable[str]) -> str:
    """Add and remove tags.

    Raises:
        InvalidRequestError: there would be more than 50.
    """
    row = find(session, name, lock=True)
    added, removed = sorted(set(add)), sorted(set(remove))
    session.execute(delete(models.Tag).where(models.Tag.expert_id == row.id, models.Tag.tag.in_(removed)))
    for tag in added:
        insert_once(session, models.Tag, expert_id=row.id, tag=tag)
    if len(session.scalars(select(models.Tag.tag).where(models.Tag.expert_id == row.id)).all()) > MAX_TAGS:
        raise InvalidRequestError(f"{name} would have more than {MAX_TAGS} tags; remove some")
    audit.record(session, actor, "expert.tag", str(name), add=added, remove=removed)
    refresh(session, row)
    assert row.card is not None
    return cards.add_aliases(session, {row.id: row.card})[0]


def list_experts(
    reader: Connection, query: ExpertQuery, *, cursor: str | None, limit: int
) -> tuple[list[str], str | None]:
    """The cards of experts that meet a query, and the cursor of the next page."""
    form = _Form(
        query.sort,
        query.deleted,
        tuple(name for name in _CONDITIONS if getattr(query, name) is not None),
        len(query.tags),
    )
    statement, order = _narrowed(form)
    values: dict[str, Any] = {name: getattr(query, name) for name in form.conditions}
    if query.namespace is not None:
        values["namespace"] = namespaces.id_of(reader, query.namespace)
    if query.base is not None:
        values["base"] = base_models.ids_of(reader, query.base)
    if query.text is not None:
        values["text"] = "%" + _WILD.sub(r"/\g<0>", query.text.lower()) + "%"
    values |= {f"tag_{i}": tag for i, tag in enumerate(query.tags)}
    for wanted_range in query.metrics:
        statement = statement.where(_in_range(reader, wanted_range)).execution_options(**{VARIED: True})
    rows, next_cursor = fetch_page(
        reader,
        statement,
        order,
        query=query.model_dump(mode="json"),
        cursor=cursor,
        limit=limit,
        position=lambda row: (row[1], row[0]),
        values=values,
        kept=not query.metrics,
    )
    return cards.told(reader, rows), next_cursor


@dataclass(frozen=True)
class _Form:
    """What decides a list's statement: the values of its conditions are parameters."""

    sort: str
    deleted: bool
    conditions: tuple[str, ...]
    tags: int


@lru_cache(1024)
def _narrowed(form: _Form) -> tuple[Select[*tuple[Any, ...]], Order]:
    table = models.Expert
    sort = _SORTS[form.sort.lstrip("-")]
    statement = select(_EXPERT.id, sort, cards.CARD).where(
        table.deleted_at.is_not(None) if form.deleted else table.deleted_at.is_(None)
    )
    if sort is table.score:
        statement = statement.where(table.score.is_not(None))
    statement = statement.where(*(_CONDITIONS[name] for name in form.conditions))
    for i in range(form.tags):
        statement = statement.where(
            table.id.in_(select(models.Tag.expert_id).where(models.Tag.tag == bindparam(f"tag_{i}")))
        )
    if form.conditions or form.tags:
        statement = statement.execution_options(**{VARIED: True})
    return statement, Order(sort, table.id, form.sort.startswith("-"))


def _in_range(reader: Connection, wanted: MetricRange) -> ColumnElement[bool]:
    """Whether an expert's latest version has a metric in a range.

    The database knows how the values of all metrics together are spread, and not those of one: it takes a range that
    nothing lies in for a common one, and walks all experts in their order. So a few are looked up first.
    """
    metric, version = models.Metric, models.Version
    inside = select(metric.version_id).where(metric.name == wanted.name)
    if wanted.minimum is not None:
        inside = inside.where(metric.value >= wanted.minimum)
    if wanted.maximum is not None:
        inside = inside.where(metric.value <= wanted.maximum)
    few = reader.scalars(inside.limit(_FEW + 1).execution_options(**{VARIED: True})).all()
    latest = version.number == models.Expert.latest
    if len(few) <= _FEW:
        known = bindparam(None, few, expanding=True, literal_execute=True, type_=Integer)
        experts = select(version.expert_id).where(version.id.in_(known))
    else:
        experts = select(version.expert_id).where(version.id.in_(inside))
    return exists(experts.where(version.expert_id == models.Expert.id, latest).correlate(models.Expert))
