"""Export: everything that a registry holds, as it was at one moment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pydantic
from sqlalchemy import Select, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session, undefer

from t2.core.errors import NotFoundError, RegistryError
from t2.core.validation import first_fault
from t2.registry.blobs.base import BlobStore
from t2.registry.db import migrate, models
from t2.registry.db.database import Database
from t2.registry.portable.records import (
    POINTS,
    AliasesRecord,
    AliasEventRecord,
    AliasTarget,
    AuditRecord,
    BaseModelRecord,
    ExpertRecord,
    NamespaceRecord,
    PointOfCurve,
    PointsRecord,
    PurgedRecord,
    RegistryRecord,
    RunRecord,
    TokenRecord,
    VersionRecord,
    Writer,
)
from t2.registry.services import audit

_PAGE = 200


def export(database: Database, store: BlobStore, file: IO[bytes], *, namespace: str | None = None) -> dict[str, int]:
    """Write an archive of a registry, or of one namespace.

    Deleted experts and versions that are not purged yet are in it. A namespace's archive has no tokens; idempotency
    keys are in none. One blob is in memory at a time, besides 100 bytes for each.

    Returns:
        How many records of each type, and blobs, were written.

    Raises:
        NotFoundError: there is no such namespace, or a blob is not in the store.
        RegistryError: a blob is damaged, or a row that another program wrote exceeds a limit of the API.
        UnavailableError: database or store cannot be reached.
    """
    writer = Writer(file)
    with database.read() as session, _one_line_errors():
        writer.record(RegistryRecord(revision=migrate.head(), exported_at=audit.now(), namespace=namespace))
        writer.flush()  # so that the archive begins with it
        _namespaces(session, writer, namespace)
        _base_models(session, writer, namespace)
        _experts(session, store, writer, namespace)
        _purged(session, writer, namespace)
        _runs(session, store, writer, namespace)
        if namespace is None:
            _tokens(session, writer)
        _audit(session, writer, namespace)
    writer.end()
    return writer.counts


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except pydantic.ValidationError as error:
        raise RegistryError(f"a row cannot be exported: {error.title}: {first_fault(error)}") from error


def _namespaces(session: Session, writer: Writer, namespace: str | None) -> None:
    table = models.Namespace
    statement = select(table) if namespace is None else select(table).where(table.name == namespace)
    rows = 0
    for row in _scan(session, statement, table.id):
        rows += 1
        writer.record(NamespaceRecord(name=row.name, description=row.description, created_at=row.created_at))
    if namespace is not None and not rows:
        raise NotFoundError(f"there is no namespace {namespace}")


def _base_models(session: Session, writer: Writer, namespace: str | None) -> None:
    table = models.BaseModel
    statement = select(table)
    if namespace is not None:
        used = select(models.Version.base_model_id).join(models.Expert).join(models.Namespace)
        scored = select(models.Run.base_model_id).join(models.Namespace).where(models.Run.base_model_id.is_not(None))
        of_namespace = models.Namespace.name == namespace
        statement = statement.where(
            or_(table.id.in_(used.where(of_namespace)), table.id.in_(scored.where(of_namespace)))
        )
    for row in _scan(session, statement, table.id):
        writer.record(
            BaseModelRecord(
                fingerprint=row.fingerprint,
                id=row.model_id,
                revision=row.revision,
                targets=row.targets,
                created_at=row.created_at,
            )
        )


def _experts(session: Session, store: BlobStore, writer: Writer, namespace: str | None) -> None:
    table = models.Expert
    statement = select(table)
    if namespace is not None:
        statement = statement.join(models.Namespace).where(models.Namespace.name == namespace)
    written: set[bytes] = set()
    for row in _scan(session, statement, table.id):
        tags = session.scalars(select(models.Tag.tag).where(models.Tag.expert_id == row.id).order_by(models.Tag.tag))
        writer.record(
            ExpertRecord(
                expert=row.path,
                kind=row.kind,
                description=row.description,
                tags=tuple(tags),
                last=row.last,
                created_at=row.created_at,
                updated_at=row.updated_at,
                deleted_at=row.deleted_at,
            )
        )
        _versions(session, store, writer, row, written)
        _aliases(session, writer, row)


def _versions(session: Session, store: BlobStore, writer: Writer, expert: models.Expert, written: set[bytes]) -> None:
    table = models.Version
    for row in _scan(session, select(table).where(table.expert_id == expert.id), table.number):
        if bytes.fromhex(row.digest) not in written:
            writer.blob(row.digest, store.get(row.digest))
            written.add(bytes.fromhex(row.digest))
        metrics = session.execute(
            select(models.Metric.name, models.Metric.value)
            .where(models.Metric.version_id == row.id)
            .order_by(models.Metric.name)
        )
        writer.record(
            VersionRecord(
                expert=expert.path,
                number=row.number,
                digest=row.digest,
                description=row.description,
                metrics=dict(metrics.all()),
                created_at=row.created_at,
                created_by=row.created_by,
                deleted_at=row.deleted_at,
            )
        )
        for points in _points(session, row.id):
            writer.record(PointsRecord(expert=expert.path, number=row.number, points=points))


def _points(session: Session, version_id: int) -> Iterator[tuple[PointOfCurve, ...]]:
    table = models.CurvePoint
    for split in ("train", "validation"):
        last = -1
        while True:
            rows = session.scalars(
                select(table)
                .where(table.version_id == version_id, table.split == split, table.step > last)
                .order_by(table.step)
                .limit(POINTS)
            ).all()
            if not rows:
                break
            fields = PointOfCurve.model_fields
            yield tuple(PointOfCurve(**{field: getattr(row, field) for field in fields}) for row in rows)
            last = rows[-1].step
            session.expunge_all()


def _aliases(session: Session, writer: Writer, expert: models.Expert) -> None:
    event = models.AliasEvent
    for row in _scan(session, select(event).where(event.expert_id == expert.id), event.id):
        writer.record(
            AliasEventRecord(
                expert=expert.path,
                alias=row.alias,
                number=row.number,
                previous=row.previous,
                at=row.at,
                by=row.by,
                reason=row.reason,
            )
        )
    rows = session.scalars(
        select(models.Alias).where(models.Alias.expert_id == expert.id).order_by(models.Alias.alias)
    ).all()
    writer.record(
        AliasesRecord(
            expert=expert.path,
            aliases={
                row.alias: AliasTarget(number=row.number, updated_at=row.updated_at, updated_by=row.updated_by)
                for row in rows
            },
        )
    )


def _purged(session: Session, writer: Writer, namespace: str | None) -> None:
    table = models.PurgedExpert
    statement = select(table).order_by(table.path)
    if namespace is not None:
        statement = statement.where(table.path.startswith(f"{namespace}/", autoescape=True))
    for row in session.scalars(statement):
        writer.record(PurgedRecord(path=row.path, last=row.last))


def _runs(session: Session, store: BlobStore, writer: Writer, namespace: str | None) -> None:
    table = models.Run
    statement = select(table).options(undefer(table.header))
    if namespace is not None:
        statement = statement.join(models.Namespace).where(models.Namespace.name == namespace)
    names = dict(session.execute(select(models.Namespace.id, models.Namespace.name)).all())
    written: set[bytes] = set()
    for row in _scan(session, statement, table.id):
        new = bytes.fromhex(row.samples) not in written
        if new:
            writer.samples(row.samples, store.get(row.samples))
            written.add(bytes.fromhex(row.samples))
        writer.record(
            RunRecord(
                namespace=names[row.namespace_id],
                samples=row.samples,
                header=row.header,
                created_at=row.created_at,
                created_by=row.created_by,
            )
        )
        if new:
            writer.flush()  # so that a run is read right after its samples


def _tokens(session: Session, writer: Writer) -> None:
    for row in _scan(session, select(models.Token), models.Token.id):
        fields = (name for name in TokenRecord.model_fields if name != "type")
        writer.record(TokenRecord(**{name: getattr(row, name) for name in fields}))


def _audit(session: Session, writer: Writer, namespace: str | None) -> None:
    table = models.AuditEntry
    statement = select(table)
    if namespace is not None:
        inside = table.object.startswith(f"{namespace}/", autoescape=True)
        statement = statement.where(or_(table.object == namespace, inside))
    for row in _scan(session, statement, table.id):
        fields = (name for name in AuditRecord.model_fields if name != "type")
        writer.record(AuditRecord(**{name: getattr(row, name) for name in fields}))


def _scan(session: Session, statement: Select[Any], key: InstrumentedAttribute[int]) -> Iterator[Any]:
    """All rows by an increasing key, page by page: no statement takes long, and no page stays in memory."""
    last = -1
    while True:
        page: Sequence[Any] = session.scalars(statement.where(key > last).order_by(key).limit(_PAGE)).all()
        if not page:
            return
        last = getattr(page[-1], key.key)
        session.expunge_all()
        yield from page
