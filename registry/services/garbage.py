"""The collection of garbage: what was deleted long ago, and bytes that nothing has.

``services/blobs.py`` tells why it never meets an upload. Each thing goes in a transaction of its own, so a
collection may be killed, and run beside uploads and beside another collection.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, delete, exists, func, select
from sqlalchemy.orm import Session

from t2.registry.blobs.base import BlobInfo, BlobStore
from t2.registry.db import models
from t2.registry.db.database import Database, insert_once
from t2.registry.services import audit, blobs
from t2.registry.services import experts as expert_rows
from t2.registry.services.actor import Actor

_BATCH = 500


@dataclass(frozen=True)
class Policy:
    """How old what is what may be collected.

    Attributes:
        grace: since bytes were last meant by an upload, or written, that nothing has.
        retention: since an expert or a version was deleted.
        keys: since an upload whose idempotency key is remembered.
    """

    grace: timedelta = timedelta(hours=1)
    retention: timedelta = timedelta(days=30)
    keys: timedelta = timedelta(hours=24)


@dataclass(frozen=True)
class Removed:
    """One thing that went, or would go.

    Attributes:
        kind: ``expert``, ``version``, ``blob`` (bytes that nothing has any more), ``object`` (bytes in the store
            that the database does not know), ``temporary`` (the rest of a write that was killed) or ``keys``.
        name: a reference, a digest, a file, or a number of keys.
        bytes: what it frees in the store.
    """

    kind: str
    name: str
    bytes: int = 0


def collect(
    database: Database, store: BlobStore, actor: Actor, policy: Policy, *, dry_run: bool = False
) -> list[Removed]:
    """Remove what nobody can miss.

    Args:
        dry_run: tell what would go, and touch nothing.

    Returns:
        What went, in this order. Kept in memory: some 200 bytes for each.

    Raises:
        UnavailableError: database or store cannot be reached; what went until then is gone, and nothing half.
    """
    at = audit.now()
    removed = list(_purge(database, actor, at - policy.retention, dry_run))
    removed += _drop_keys(database, at - policy.keys, dry_run)
    removed += _drop_blobs(database, store, at - policy.grace, at - policy.retention, dry_run)
    removed += _drop_objects(database, store, at - policy.grace, dry_run)
    removed += [Removed("temporary", name) for name in store.sweep(at - policy.grace, dry_run=dry_run)]
    if removed and not dry_run:
        kinds = sorted({item.kind for item in removed})
        counts = {kind: sum(item.kind == kind for item in removed) for kind in kinds}
        with database.write() as session:
            audit.record(session, actor, "gc", "registry", removed=counts, bytes=sum(item.bytes for item in removed))
    return removed


def unreferenced(session: Session, before: datetime) -> tuple[int, int]:
    """Number and bytes of the blobs that nothing has and no upload has meant since then."""
    count, size = session.execute(
        select(func.count(), func.coalesce(func.sum(models.Blob.size), 0)).where(
            models.Blob.touched_at < before, ~blobs.used()
        )
    ).one()
    return count, int(size)


def unknown(session: Session, found: Collection[str]) -> set[str]:
    """Those digests of which the database has no row."""
    return set(found) - set(session.scalars(select(models.Blob.digest).where(models.Blob.digest.in_(found))))


def _purge(database: Database, actor: Actor, before: datetime, dry_run: bool) -> Iterator[Removed]:
    expert, version = models.Expert, models.Version
    with database.read() as session:
        experts = session.execute(select(expert.id, expert.path).where(_expired(expert, before))).all()
        versions = session.execute(
            select(version.id, expert.id, expert.path, version.number)
            .join(expert)
            .where(_expired(version, before), ~_expired(expert, before))
            .order_by(version.id)
        ).all()
    for expert_id, path in experts:
        if not dry_run:
            with database.write() as session:
                # Looked at again under the lock: somebody may have restored it.
                row = session.scalar(select(expert).where(expert.id == expert_id).with_for_update())
                if row is None:
                    continue
                last = row.last
                if not session.scalar(select(exists().where(expert.id == expert_id, _expired(expert, before)))):
                    continue
                for table in (models.Alias, version):
                    session.execute(delete(table).where(table.expert_id == expert_id))
                session.execute(delete(expert).where(expert.id == expert_id))
                expert_rows.record_purged(session, path, last)
                audit.record(session, actor, "expert.purge", path, last=last)
        yield Removed("expert", path)
    for version_id, expert_id, path, number in versions:
        if not dry_run:
            with database.write() as session:
                session.scalar(select(expert.id).where(expert.id == expert_id).with_for_update())
                gone = delete(version).where(version.id == version_id, _expired(version, before))
                if session.scalar(gone.returning(version.id)) is None:
                    continue
                audit.record(session, actor, "version.purge", f"{path}@{number}")
        yield Removed("version", f"{path}@{number}")


def _expired(table: type[models.Expert | models.Version], before: datetime) -> ColumnElement[bool]:
    return table.deleted_at.is_not(None) & (table.deleted_at < before)


def _drop_keys(database: Database, before: datetime, dry_run: bool) -> list[Removed]:
    old = models.IdempotencyKey.created_at < before
    with database.write() if not dry_run else database.read() as session:
        count = session.scalar(select(func.count()).select_from(models.IdempotencyKey).where(old)) or 0
        if count and not dry_run:
            session.execute(delete(models.IdempotencyKey).where(old))
    return [Removed("keys", str(count))] if count else []


def _drop_blobs(
    database: Database, store: BlobStore, before: datetime, retained: datetime, dry_run: bool
) -> Iterator[Removed]:
    blob, version = models.Blob, models.Version
    # What keeps a blob: in a dry run the versions that would have been purged do not.
    kept = select(version.id).join(models.Expert).where(version.digest == blob.digest)
    if dry_run:
        kept = kept.where(~_expired(version, retained), ~_expired(models.Expert, retained))
    scored = exists().where(models.Run.samples == blob.digest)
    candidates = select(blob.digest, blob.size).where(blob.touched_at < before, ~kept.correlate(blob).exists(), ~scored)
    last = ""
    while True:
        with database.read() as session:
            page = session.execute(candidates.where(blob.digest > last).order_by(blob.digest).limit(_BATCH)).all()
        if not page:
            return
        for digest, size in page:
            if dry_run or _drop_blob(database, store, digest, before):
                yield Removed("blob", digest, size)
        last = page[-1][0]


def _drop_blob(database: Database, store: BlobStore, digest: str, before: datetime) -> bool:
    blob = models.Blob
    with database.write() as session:
        locked = select(blob.digest).where(blob.digest == digest, blob.touched_at < before).with_for_update()
        if session.scalar(locked) is None:
            return False
        # A statement of its own: the one above may have waited for a version or a run that it did not see.
        if session.scalar(select(blobs.used()).select_from(blob).where(blob.digest == digest)):
            return False
        store.delete(digest)
        session.execute(delete(blob).where(blob.digest == digest))
        return True


def _drop_objects(database: Database, store: BlobStore, before: datetime, dry_run: bool) -> Iterator[Removed]:
    for batch in batches(info for info in store.list() if info.modified < before):
        with database.read() as session:
            orphans = unknown(session, [info.digest for info in batch])
        for info in batch:
            if info.digest in orphans and (dry_run or _drop_object(database, store, info, before)):
                yield Removed("object", info.digest, info.size)


def _drop_object(database: Database, store: BlobStore, info: BlobInfo, before: datetime) -> bool:
    at = audit.now()
    with database.write() as session:
        # An upload of the same bytes waits for this row, and puts its bytes after it has gone.
        if not insert_once(
            session, models.Blob, digest=info.digest, size=max(info.size, 1), created_at=at, touched_at=at
        ):
            return False
        now = store.info(info.digest)
        gone = now is not None and now.modified < before
        if gone:
            store.delete(info.digest)
        session.execute(delete(models.Blob).where(models.Blob.digest == info.digest))
        return gone


def batches(infos: Iterator[BlobInfo]) -> Iterator[Sequence[BlobInfo]]:
    """What a store lists, some hundred at a time."""
    while batch := tuple(itertools.islice(infos, _BATCH)):
        yield batch
