"""The audit log: written in the transaction of what it tells, so that one is never there without the other."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from t2.registry.db import models
from t2.registry.schemas import AuditEntry, Page
from t2.registry.services.actor import Actor
from t2.registry.services.paging import Order, fetch_page


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


def record(session: Session, actor: Actor, action: str, object: str, **detail: Any) -> None:
    """Add an entry."""
    session.add(
        models.AuditEntry(
            at=now(), source=actor.source, subject=actor.subject, action=action, object=object, detail=detail
        )
    )


def list_entries(session: Session, *, cursor: str | None, limit: int) -> Page[AuditEntry]:
    """Entries, newest first."""
    table = models.AuditEntry
    rows, next_cursor = fetch_page(
        session,
        select(table),
        Order(table.id, table.id, descending=True),
        query="audit",
        cursor=cursor,
        limit=limit,
        position=lambda row: (row[0].id, row[0].id),
    )
    return Page(
        items=[
            AuditEntry(
                id=row.id,
                at=row.at,
                source=row.source,
                subject=row.subject,
                action=row.action,
                object=row.object,
                detail=row.detail,
            )
            for (row,) in rows
        ],
        next=next_cursor,
    )
