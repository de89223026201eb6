"""The registry's doctor: whether everything that the database promises is there, and what lies around besides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

import pydantic
from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session, aliased

from t2.core.errors import ExpertFileError, RegistryError, ResultsError
from t2.core.expertfile import decode_expert
from t2.core.runfile import decode_run
from t2.registry.blobs.base import BlobInfo, BlobStore
from t2.registry.db import migrate, models
from t2.registry.db.database import Database
from t2.registry.schemas import VALIDATION_SCORE, Expert
from t2.registry.services import audit, blobs, cards, experts, garbage
from t2.registry.services.actor import Actor

CLOCK = timedelta(minutes=1)
"""How far clocks may be apart before it is told: what is garbage is judged by them."""
_FIX = "t2 registry doctor --fix writes that anew"
_PAGE = 500
_RUN_OF = (
    select(models.Namespace.name, models.Run.digest)
    .join(models.Run, models.Run.namespace_id == models.Namespace.id)
    .order_by(models.Run.id)
)
_SHOWN = 20
"""Findings of one kind that are told one by one; of more the number is told."""


@dataclass(frozen=True)
class Finding:
    """Something that the doctor noticed.

    Attributes:
        wrong: whether something is broken; otherwise it is only worth knowing.
        check: ``database``, ``schema``, ``store``, ``clock``, ``blob``, ``row`` or ``garbage``.
        text: one line.
    """

    wrong: bool
    check: str
    text: str


@dataclass
class Examined:
    """What a visit looked at, filled while :func:`examine` runs."""

    experts: int = 0
    versions: int = 0
    runs: int = 0
    blobs: int = 0
    bytes: int = 0
    hashed: int = 0


def examine(
    database: Database,
    store: BlobStore,
    *,
    deep: bool = False,
    grace: timedelta = timedelta(hours=1),
    seen: Examined | None = None,
) -> Iterator[Finding]:
    """Look at everything; changes nothing but a probe in the store.

    Args:
        deep: read every blob that a version or a run has, hash it, and check that it is an expert or samples.
        grace: as :class:`~t2.registry.services.garbage.Policy`; younger bytes without a version are not mentioned.
        seen: counts what is looked at.

    Yields:
        Findings, as they are made. Where the database or its schema cannot be used nothing after that is looked at.
    """
    seen = seen if seen is not None else Examined()
    try:
        problem = _schema(database)
    except RegistryError as error:
        yield Finding(True, "database", str(error))
        return
    if problem is not None:
        yield Finding(True, "schema", problem)
        return
    try:
        with database.read() as session:
            yield from _limited(_integrity(session))
            yield from _clock(session)
            yield from _limited(_rows(session, seen))
    except RegistryError as error:
        yield Finding(True, "database", str(error))
        return
    try:
        store.check()
        yield from _limited(_blobs(database, store, seen))
        if deep:
            yield from _limited(_contents(database, store, seen))
        yield from _garbage(database, store, audit.now() - grace)
    except RegistryError as error:
        yield Finding(True, "store", str(error))


def _schema(database: Database) -> str | None:
    with database.read() as session:
        session.connection()
    try:
        migrate.check_current(database)
    except RegistryError as error:
        return str(error)
    return None


def _integrity(session: Session) -> Iterator[Finding]:
    """What SQLite does not see to by itself once a file is damaged or was written without its constraints."""
    connection = session.connection()
    if connection.dialect.name != "sqlite":
        return
    for (line,) in connection.exec_driver_sql(f"PRAGMA quick_check({_SHOWN})"):
        if line != "ok":
            yield Finding(True, "database", f"SQLite finds damage: {line}; restore the database from a backup")
    for table, row, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
        yield Finding(True, "row", f"row {row} of {table} refers to a row of {parent} that is not there")


def _clock(session: Session) -> Iterator[Finding]:
    now = audit.now()
    if session.get_bind().dialect.name == "postgresql":
        theirs: datetime | None = session.scalar(select(func.clock_timestamp()))
        if theirs is not None and abs(theirs - now) > CLOCK:
            yield Finding(True, "clock", f"the database's clock says {theirs:%F %T %Z}, this machine's {now:%F %T %Z}")
    last = session.scalar(select(func.max(models.Blob.touched_at)))
    if last is not None and last - now > CLOCK:
        yield Finding(True, "clock", f"an upload is dated {last:%F %T %Z}, and it is {now:%F %T %Z}; set the clocks")


def _rows(session: Session, seen: Examined) -> Iterator[Finding]:
    """The copies that an expert's row holds of its versions, and where aliases point."""
    expert, version = models.Expert, models.Version
    seen.experts = session.scalar(select(func.count()).select_from(expert)) or 0
    seen.versions = session.scalar(select(func.count()).select_from(version)) or 0
    seen.runs = session.scalar(select(func.count()).select_from(models.Run)) or 0
    yield from (Finding(True, "row", f"{path}: {what}; {_FIX}") for path, what in _copies(session))
    late = session.scalar(select(func.count()).where(cards.CARD.is_(None)).select_from(expert))
    if late:
        yield Finding(False, "row", f"{late} experts were changed by an older t2, which makes lists slow; {_FIX}")
    for path, alias, number in session.execute(
        select(expert.path, models.Alias.alias, models.Alias.number)
        .join(expert, expert.id == models.Alias.expert_id)
        .join(version, and_(version.expert_id == expert.id, version.number == models.Alias.number))
        .where(version.deleted_at.is_not(None))
        .order_by(expert.path, models.Alias.alias)
    ):
        yield Finding(True, "row", f"{path}@{alias} points to version {number}, which is deleted; move the alias")
    last = (
        select(models.AliasEvent.number)
        .where(models.AliasEvent.expert_id == models.Alias.expert_id, models.AliasEvent.alias == models.Alias.alias)
        .order_by(models.AliasEvent.id.desc())
        .limit(1)
        .scalar_subquery()
    )
    for path, alias in session.execute(
        select(expert.path, models.Alias.alias)
        .join(expert, expert.id == models.Alias.expert_id)
        .where(last.is_distinct_from(models.Alias.number))
        .order_by(expert.path, models.Alias.alias)
    ):
        yield Finding(True, "row", f"{path}@{alias} does not point to where its history says")


def _copies(session: Session) -> Iterator[tuple[str, str]]:
    """Experts whose rows hold copies that are not what they were copied from, and what is wrong."""
    expert, version = models.Expert, models.Version
    numbers = (
        select(
            version.expert_id,
            func.max(version.number).label("last"),
            func.count(version.id).filter(version.deleted_at.is_(None)).label("live"),
            func.max(version.number).filter(version.deleted_at.is_(None)).label("latest"),
        )
        .group_by(version.expert_id)
        .subquery()
    )
    odd = or_(
        expert.live != func.coalesce(numbers.c.live, 0),
        expert.latest.is_distinct_from(numbers.c.latest),
        expert.last < func.coalesce(numbers.c.last, 0),
    )
    for path in session.scalars(
        select(expert.path).outerjoin(numbers, numbers.c.expert_id == expert.id).where(odd).order_by(expert.path)
    ):
        yield path, "the counts of its versions are not those of its versions"
    latest = aliased(version)
    copies = or_(
        expert.task.is_distinct_from(latest.task),
        expert.domain.is_distinct_from(latest.domain),
        expert.base_model_id.is_distinct_from(latest.base_model_id),
        expert.score.is_distinct_from(models.Metric.value),
    )
    for path in session.scalars(
        select(expert.path)
        .outerjoin(latest, and_(latest.expert_id == expert.id, latest.number == expert.latest))
        .outerjoin(models.Metric, and_(models.Metric.version_id == latest.id, models.Metric.name == VALIDATION_SCORE))
        .where(copies)
        .order_by(expert.path)
    ):
        yield path, "what lists go by is not what its latest version says"
    found = 0
    while page := session.execute(
        select(expert.id, expert.path, cards.CARD).where(expert.id > found).order_by(expert.id).limit(_PAGE)
    ).all():
        found = page[-1].id
        said = cards.made(session, [row.id for row in page])
        for row in page:
            if row.card is not None and not _says(row.card, said[row.id]):
                yield row.path, "its card in lists is not what the tables say"


def _says(card: str, said: Expert) -> bool:
    try:
        return Expert.model_validate_json(card) == said
    except pydantic.ValidationError:
        return False


def mend(database: Database, actor: Actor) -> list[str]:
    """Write anew the copies that experts' rows hold, where they are not what they were copied from, or not there.

    Returns:
        The experts, sorted.

    Raises:
        UnavailableError: the database cannot be reached.
    """
    with database.read() as session:
        late = session.scalars(select(models.Expert.path).where(cards.CARD.is_(None)))
        wrong = sorted({path for path, _ in _copies(session)} | set(late))
    for path in wrong:
        with database.write() as session:
            row = session.scalar(select(models.Expert).where(models.Expert.path == path).with_for_update())
            if row is None:
                continue
            of_expert = models.Version.expert_id == row.id
            live = select(func.count()).where(of_expert, models.Version.deleted_at.is_(None))
            row.last = max(row.last, session.scalar(select(func.max(models.Version.number)).where(of_expert)) or 0)
            experts.refresh(session, row, live=(session.scalar(live) or 0) - row.live, at=row.updated_at)
            audit.record(session, actor, "expert.mend", path)
    return wrong


def _blobs(database: Database, store: BlobStore, seen: Examined) -> Iterator[Finding]:
    """Every blob that a version or a run has is in the store, with its size."""
    sizes = {bytes.fromhex(info.digest): info.size for info in store.list()}  # 130 bytes for each
    for digest, size in _referenced(database):
        seen.blobs += 1
        seen.bytes += size
        there = sizes.get(bytes.fromhex(digest))
        if there != size:
            # The list may be older than the row.
            info = store.info(digest)
            there = info.size if info is not None else None
        if there is None:
            yield Finding(True, "blob", f"{_owner(database, digest)}: {digest} is not in the store {store.location}")
        elif there != size:
            yield Finding(
                True,
                "blob",
                f"{_owner(database, digest)}: {digest} has {there} bytes in the store, and should have {size}",
            )


def _contents(database: Database, store: BlobStore, seen: Examined) -> Iterator[Finding]:
    for digest, size in _referenced(database):
        try:
            data = store.get(digest)
            seen.hashed += len(data)
            if len(data) == size:
                _decode(database, digest, data)
        except (RegistryError, ExpertFileError, ResultsError) as error:
            if isinstance(error, RegistryError) and error.status == 503:
                raise
            yield Finding(True, "blob", f"{_owner(database, digest)}: {error}")


def _decode(database: Database, digest: str, data: bytes) -> None:
    """Check that a content is what it is kept for: samples of the runs that have them, or an expert."""
    with database.read() as session:
        runs = session.execute(_RUN_OF.add_columns(models.Run.header).where(models.Run.samples == digest)).all()
    for namespace, named, header in runs:
        run = decode_run(f"{header}\n".encode() + data, f"{namespace}/runs/{named}").run
        if run.digest() != named:
            raise ResultsError("its digest is not that of what is told of it")
    if not runs:
        decode_expert(data, digest, canonical=False)


def _garbage(database: Database, store: BlobStore, before: datetime) -> Iterator[Finding]:
    with database.read() as session:
        count, size = garbage.unreferenced(session, before)
    if count:
        yield Finding(False, "garbage", f"{count} blobs of {size} bytes that nothing has; gc removes them")
    count = size = 0
    old: Iterator[BlobInfo] = (info for info in store.list() if info.modified < before)
    for batch in garbage.batches(old):
        with database.read() as session:
            orphans = garbage.unknown(session, [info.digest for info in batch])
        count += len(orphans)
        size += sum(info.size for info in batch if info.digest in orphans)
    if count:
        yield Finding(False, "garbage", f"{count} objects of {size} bytes that no row knows; gc removes them")
    left = store.sweep(before, dry_run=True)
    if left:
        yield Finding(False, "garbage", f"{len(left)} files left by writers that were killed; gc removes them")


def _referenced(database: Database) -> Iterator[tuple[str, int]]:
    """Digest and size of every blob that a run or a version has, also a deleted one: it can be restored."""
    last = ""
    while True:
        with database.read() as session:
            page = session.execute(
                select(models.Blob.digest, models.Blob.size)
                .where(models.Blob.digest > last, blobs.used())
                .order_by(models.Blob.digest)
                .limit(_PAGE)
            ).all()
        if not page:
            return
        yield from ((digest, size) for digest, size in page)
        last = page[-1][0]


def _owner(database: Database, digest: str) -> str:
    with database.read() as session:
        row = session.execute(
            select(models.Expert.path, models.Version.number)
            .join(models.Expert)
            .where(models.Version.digest == digest)
            .order_by(models.Version.id)
            .limit(1)
        ).one_or_none()
        run = session.execute(_RUN_OF.where(models.Run.samples == digest)).first() if row is None else None
    if run is not None:
        return f"{run[0]}/runs/{run[1]}"
    return f"{row[0]}@{row[1]}" if row is not None else "no version"


def _limited(findings: Iterator[Finding]) -> Iterator[Finding]:
    """The first findings, and how many more there are."""
    more = 0
    for number, finding in enumerate(findings):
        if number < _SHOWN:
            yield finding
        else:
            more += 1
    if more:
        yield Finding(True, finding.check, f"and {more} more")
