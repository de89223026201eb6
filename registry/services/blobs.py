"""Bytes and rows together: a row never points to bytes that are not there.

An upload (1) writes the blob's row, with the time, and commits; (2) puts the bytes; (3) writes the row of the version
or the run, which refers to the blob's, and commits. The collection of garbage takes a blob that neither refers to and
that no upload has touched for a while; it holds the row locked from before the bytes go until after the row has gone.
So an upload of the same bytes waits at (1), or has touched the row already, and a kill between any two steps leaves at
most bytes or a row too many.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ColumnElement, bindparam, exists, or_, select, update
from sqlalchemy.orm import Session

from t2.core.errors import NotFoundError
from t2.registry.db import models
from t2.registry.db.database import insert_once
from t2.registry.services import audit

_HELD = (
    select(models.Blob.created_at)
    .where(models.Blob.digest == bindparam("digest"))
    .with_for_update(read=True, key_share=True)
)


def reserve(session: Session, digest: str, size: int) -> datetime:
    """Step 1 of an upload.

    Returns:
        When the row was made: its identity, for :func:`hold`.
    """
    at = audit.now()
    touch = update(models.Blob).where(models.Blob.digest == digest).values(touched_at=at)
    while True:
        if insert_once(session, models.Blob, digest=digest, size=size, created_at=at, touched_at=at):
            return at
        made: datetime | None = session.scalar(touch.returning(models.Blob.created_at))
        if made is not None:  # None where the row was collected between the two statements
            return made


def hold(session: Session, digest: str, made: datetime) -> bool:
    """The beginning of step 3: keep the row until the transaction ends; False where it is not the one reserved.

    An upload may stall for longer than garbage is left alone. Its bytes are gone then, also where another upload has
    made a new row meanwhile and not put its bytes yet.
    """
    return session.scalar(_HELD, {"digest": digest}) == made


def find_readable(session: Session, digest: str) -> tuple[int, str]:
    """The size of a content that a version which is not deleted has, or a run, and the ending of such files' names.

    Raises:
        NotFoundError: neither has it.
    """
    blob = select(models.Blob.size).where(models.Blob.digest == digest)
    size = session.scalar(
        blob.join(models.Version, models.Version.digest == models.Blob.digest)
        .join(models.Expert, models.Version.expert_id == models.Expert.id)
        .where(models.Version.deleted_at.is_(None), models.Expert.deleted_at.is_(None))
        .limit(1)
    )
    if size is not None:
        return size, "safetensors"
    size = session.scalar(blob.join(models.Run, models.Run.samples == models.Blob.digest).limit(1))
    if size is None:
        raise NotFoundError(f"no version and no run has the digest {digest}")
    return size, "jsonl"


def used() -> ColumnElement[bool]:
    """Whether something has a blob, in a query about blobs: a version, also a deleted one, or a run."""
    return or_(
        exists().where(models.Version.digest == models.Blob.digest),
        exists().where(models.Run.samples == models.Blob.digest),
    )
