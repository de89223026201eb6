"""Aliases: names that move from version to version, with a history that only grows."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from t2.core.errors import InvalidRequestError, NotFoundError, nearest
from t2.core.references import ExpertName
from t2.registry.db import models
from t2.registry.names import MAX_ALIASES
from t2.registry.schemas import AliasEvent, AliasInfo, Page
from t2.registry.services import audit, experts, versions
from t2.registry.services.actor import Actor
from t2.registry.services.paging import Order, fetch_page


def list_aliases(session: Session, name: ExpertName) -> list[AliasInfo]:
    """By name."""
    expert = experts.find(session, name)
    rows = session.execute(
        select(models.Alias, models.Version.digest)
        .join(
            models.Version,
            (models.Version.expert_id == models.Alias.expert_id) & (models.Version.number == models.Alias.number),
        )
        .where(models.Alias.expert_id == expert.id)
        .order_by(models.Alias.alias)
    )
    return [_shape(row, digest) for row, digest in rows]


def set_alias(session: Session, actor: Actor, name: ExpertName, alias: str, number: int, reason: str) -> AliasInfo:
    """Point an alias to a version that is not deleted; nothing is recorded where it points there already.

    Raises:
        InvalidRequestError: there would be more than 100.
    """
    expert = experts.find(session, name, lock=True)
    version = versions.find(session, name, number)
    row = session.get(models.Alias, (expert.id, alias))
    if row is not None and row.number == number:
        return _shape(row, version.digest)
    previous = row.number if row is not None else None
    at = audit.now()
    if row is None:
        there = select(func.count()).where(models.Alias.expert_id == expert.id)
        if (session.scalar(there) or 0) >= MAX_ALIASES:
            raise InvalidRequestError(f"{name} would have more than {MAX_ALIASES} aliases; remove some")
        row = models.Alias(expert_id=expert.id, alias=alias, number=number, updated_at=at, updated_by=str(actor))
        session.add(row)
    else:
        row.number, row.updated_at, row.updated_by = number, at, str(actor)
    _remember(session, actor, expert, alias, number, previous, reason)
    return _shape(row, version.digest)


def delete_alias(session: Session, actor: Actor, name: ExpertName, alias: str, reason: str) -> None:
    """Remove an alias; its history stays."""
    expert = experts.find(session, name, lock=True)
    row = session.get(models.Alias, (expert.id, alias))
    if row is None:
        known = session.scalars(select(models.Alias.alias).where(models.Alias.expert_id == expert.id))
        raise NotFoundError(f"{name} has no alias {alias}{nearest(alias, known)}")
    session.delete(row)
    _remember(session, actor, expert, alias, None, row.number, reason)


def history(
    session: Session, name: ExpertName, alias: str | None, *, cursor: str | None, limit: int
) -> Page[AliasEvent]:
    """Newest first."""
    expert = experts.find(session, name)
    table = models.AliasEvent
    statement = select(table).where(table.expert_id == expert.id)
    if alias is not None:
        statement = statement.where(table.alias == alias)
    rows, next_cursor = fetch_page(
        session,
        statement,
        Order(table.id, table.id, descending=True),
        query=["alias-history", expert.id, alias],
        cursor=cursor,
        limit=limit,
        position=lambda row: (row[0].id, row[0].id),
    )
    return Page(
        items=[
            AliasEvent(
                alias=row.alias, version=row.number, previous=row.previous, at=row.at, by=row.by, reason=row.reason
            )
            for (row,) in rows
        ],
        next=next_cursor,
    )


def _remember(
    session: Session,
    actor: Actor,
    expert: models.Expert,
    alias: str,
    number: int | None,
    previous: int | None,
    reason: str,
) -> None:
    at = audit.now()
    session.add(
        models.AliasEvent(
            expert_id=expert.id, alias=alias, number=number, previous=previous, at=at, by=str(actor), reason=reason
        )
    )
    experts.refresh(session, expert, at=at)
    action = "alias.delete" if number is None else "alias.set"
    audit.record(session, actor, action, f"{expert.path}@{alias}", version=number, previous=previous)


def _shape(row: models.Alias, digest: str) -> AliasInfo:
    return AliasInfo(
        alias=row.alias, version=row.number, digest=digest, updated_at=row.updated_at, updated_by=row.updated_by
    )
