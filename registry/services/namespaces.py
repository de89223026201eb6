"""Namespaces: teams and people."""

from __future__ import annotations

from sqlalchemy import Connection, bindparam, select
from sqlalchemy.orm import Session

from t2.core.errors import ConflictError, NotFoundError
from t2.registry.db import models
from t2.registry.db.database import insert_once
from t2.registry.schemas import Namespace, Page
from t2.registry.services import audit
from t2.registry.services.actor import Actor
from t2.registry.services.paging import Order, fetch_page

_NAMED = select(models.Namespace).where(models.Namespace.name == bindparam("name"))
_ID = select(models.Namespace.id).where(models.Namespace.name == bindparam("name"))


def create(session: Session, actor: Actor, name: str, description: str) -> Namespace:
    """Make a namespace.

    Raises:
        ConflictError: it exists.
    """
    if not insert_once(session, models.Namespace, name=name, description=description, created_at=audit.now()):
        raise ConflictError(f"the namespace {name} exists already")
    audit.record(session, actor, "namespace.create", name)
    return _shape(find(session, name))


def ensure(session: Session, actor: Actor, name: str) -> models.Namespace:
    """The namespace, made when new."""
    # Nearly always it is there.
    row = session.scalar(_NAMED, {"name": name})
    if row is not None:
        return row
    if insert_once(session, models.Namespace, name=name, description="", created_at=audit.now()):
        audit.record(session, actor, "namespace.create", name)
    return find(session, name)


def find(session: Session, name: str) -> models.Namespace:
    """Raises NotFoundError where there is none."""
    row = session.scalar(_NAMED, {"name": name})
    if row is None:
        raise NotFoundError(f"there is no namespace {name}")
    return row


def id_of(session: Session | Connection, name: str) -> int:
    """The id of a namespace; one that no row has where there is none.

    A list is narrowed by the number itself: the database chooses its way by how common that one is.
    """
    return session.scalar(_ID, {"name": name}) or 0


def list_namespaces(session: Session, *, cursor: str | None, limit: int) -> Page[Namespace]:
    """By name."""
    table = models.Namespace
    rows, next_cursor = fetch_page(
        session,
        select(table),
        Order(table.name, table.id, descending=False),
        query="namespaces",
        cursor=cursor,
        limit=limit,
        position=lambda row: (row[0].name, row[0].id),
    )
    return Page(items=[_shape(row) for (row,) in rows], next=next_cursor)


def _shape(row: models.Namespace) -> Namespace:
    return Namespace(name=row.name, description=row.description, created_at=row.created_at)
