"""Import of an archive into a registry, empty or not.

An archive is read twice: first all of it is checked, against itself and against what the registry holds, and nothing
is written where something immutable disagrees; then it is written, chunk by chunk. The same import again does nothing
more, and one that was killed goes on where it was. What may change stays as the registry has it where the two disagree,
and is told: descriptions, metrics, deletion, and aliases unless the archive's history continues the registry's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import IO, Any

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from t2.core.curve import CurvePoint
from t2.core.errors import ConflictError, ExpertFileError, InvalidRequestError, ResultsError, UnavailableError
from t2.core.expertfile import decode_expert
from t2.core.references import parse_name
from t2.core.runfile import RunFile, decode_header, decode_run
from t2.registry.blobs.base import BlobStore
from t2.registry.db import models
from t2.registry.db.database import Database, insert_once
from t2.registry.portable import records
from t2.registry.portable.records import Record
from t2.registry.services import audit, base_models, blobs, experts, namespaces, runs, versions
from t2.registry.services.actor import Actor

_TOLD = 100


@dataclass
class Imported:
    """What an import did.

    Attributes:
        counts: rows of each kind that are new; ``present`` versions were there already.
        kept: what differs in the archive and was left as it is in the registry, a sentence each; the first hundred.
        differing: how many such.
    """

    counts: dict[str, int] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    differing: int = 0

    def add(self, what: str, count: int = 1) -> None:
        """Count something new."""
        self.counts[what] = self.counts.get(what, 0) + count

    def keep(self, what: str) -> None:
        """Remember a difference."""
        self.differing += 1
        if len(self.kept) < _TOLD:
            self.kept.append(what)


def restore(database: Database, store: BlobStore, actor: Actor, file: IO[bytes], *, tokens: bool = False) -> Imported:
    """Import an archive.

    Args:
        file: can be read from its start twice.
        tokens: also take the access tokens of the archive; who holds one of them can use this registry then.

    Raises:
        InvalidRequestError: the archive is cut, damaged or no archive of a registry; nothing was written.
        ConflictError: something immutable is another in the registry; nothing was written.
        UnavailableError: database or store cannot be reached; import again to go on.
    """
    try:
        _check(database, file)
        file.seek(0)
        importer = _Importer(database, store, actor, tokens)
        for part in records.read(file):
            if isinstance(part, list):
                importer.chunk(part)
            else:
                importer.blob(part)
    except (ExpertFileError, ResultsError) as error:
        raise InvalidRequestError(str(error)) from error
    except IntegrityError as error:
        raise ConflictError("the registry is being changed by others; import again") from error
    return importer.result


def _check(database: Database, file: IO[bytes]) -> None:
    """The first reading."""
    kinds: dict[bytes, str] = {}  # 150 bytes for each blob
    samples = _Samples()
    counts: dict[str, int] = {}
    conflicts: list[str] = []
    kind, last, path, ended = "", 0, "", False
    numbers: set[int] = set()
    for part in records.read(file):
        if not isinstance(part, list):
            if part.expert is None:
                samples.add(part)
            else:
                kinds[bytes.fromhex(part.digest)] = part.expert.manifest.kind
            what = "samples" if part.expert is None else "blob"
            counts[what] = counts.get(what, 0) + 1
            continue
        with database.read() as session:
            for record in part:
                if ended or (record.type == "registry") != (not counts):
                    raise InvalidRequestError("its records are out of order")
                if isinstance(record, records.ExpertRecord):
                    path, kind, last, numbers = record.expert, record.kind, record.last, set()
                elif isinstance(record, records.EndRecord):
                    ended = True
                    if record.counts != counts:
                        raise InvalidRequestError("it does not hold what its end says")
                    continue
                elif isinstance(record, records.RunRecord):
                    samples.check(record)
                elif getattr(record, "expert", path) != path:
                    raise InvalidRequestError("its records are out of order")
                if isinstance(record, records.VersionRecord):
                    if kinds.get(bytes.fromhex(record.digest)) != kind:
                        raise InvalidRequestError(
                            f"the file of {path}@{record.number} is not in it before, or of another kind"
                        )
                    if record.number > last or record.number in numbers:
                        raise InvalidRequestError(f"{path}@{record.number} has a number that it cannot have")
                    numbers.add(record.number)
                if isinstance(record, records.PointsRecord) and record.number not in numbers:
                    raise InvalidRequestError(f"it has a curve of {path}@{record.number}, and not the version")
                if isinstance(record, records.AliasesRecord):
                    odd = [alias for alias, target in record.aliases.items() if target.number not in numbers]
                    if odd:
                        raise InvalidRequestError(f"{path}@{odd[0]} points to a version that it does not hold")
                counts[record.type] = counts.get(record.type, 0) + 1
                conflicts += _conflicts(session, record)
                if len(conflicts) > _TOLD:
                    raise _conflict(conflicts)
    if not ended:
        raise InvalidRequestError("it ends in the middle; copy it again")
    if conflicts:
        raise _conflict(conflicts)


class _Samples:
    """The samples of an archive, of which the last are held: those of the run that comes next."""

    def __init__(self) -> None:
        self._known: set[bytes] = set()
        self._last = records.Content("", b"", None)

    def add(self, content: records.Content) -> None:
        """Take samples."""
        self._last = content
        self._known.add(bytes.fromhex(content.digest))

    def check(self, record: records.RunRecord) -> None:
        """Check a run against its samples, or, where they are no longer held, that they came before.

        Raises:
            ResultsError: it disagrees with them, or is no run.
            InvalidRequestError: they did not come before.
        """
        if bytes.fromhex(record.samples) not in self._known:
            raise InvalidRequestError(f"the samples of a run of {record.namespace} are not in it before")
        if record.samples == self._last.digest:
            run = _run_of(record, self._last.data).run
        else:
            run = decode_header(record.header.encode(), record.namespace)
        if run.samples_digest != record.samples:
            raise InvalidRequestError(f"a run of {record.namespace} has other samples than its header says")


def _run_of(record: records.RunRecord, samples: bytes) -> RunFile:
    """A run of an archive with its samples, checked.

    Raises:
        ResultsError: they disagree.
    """
    return decode_run(record.header.encode() + b"\n" + samples, f"a run of {record.namespace}")


def _conflict(conflicts: list[str]) -> ConflictError:
    more = f" (and {len(conflicts) - 1} more such conflicts)" if len(conflicts) > 1 else ""
    return ConflictError(f"nothing was imported: {conflicts[0]}{more}")


def _conflicts(session: Session, record: Record) -> Iterator[str]:
    """What the registry holds otherwise, and can never change."""
    if isinstance(record, records.BaseModelRecord) and record.targets is not None:
        targets = session.scalar(
            select(models.BaseModel.targets).where(models.BaseModel.fingerprint == record.fingerprint)
        )
        if targets is not None and targets != record.targets:
            yield f"the base model {record.fingerprint[:12]} has other targets here"
    if isinstance(record, records.ExpertRecord):
        kind = session.scalar(select(models.Expert.kind).where(models.Expert.path == record.expert))
        if kind is not None and kind != record.kind:
            yield f"{record.expert} is of kind {kind} here, of kind {record.kind} in the archive"
    if isinstance(record, records.VersionRecord):
        for number, digest in session.execute(
            select(models.Version.number, models.Version.digest)
            .join(models.Expert)
            .where(
                models.Expert.path == record.expert,
                (models.Version.number == record.number) | (models.Version.digest == record.digest),
            )
        ):
            if (number, digest) != (record.number, record.digest):
                what = "another content" if number == record.number else f"the number {number}"
                yield f"{record.expert}@{record.number} has {what} here"
    if isinstance(record, records.PointsRecord):
        version = _version(session, record.expert, record.number)
        if version is not None and any(
            there != point for point, there in _points(session, version, record.points) if there is not None
        ):
            yield f"{record.expert}@{record.number} has another reward curve here"


class _Importer:
    """The second reading."""

    def __init__(self, database: Database, store: BlobStore, actor: Actor, tokens: bool) -> None:
        self.result = Imported()
        self._database = database
        self._store = store
        self._actor = actor
        self._tokens = tokens
        self._reserved: dict[bytes, datetime] = {}
        self._history: list[models.AliasEvent] = []
        self._events = 0
        self._diverged = False
        with database.read() as session:
            self._logs = not session.scalar(select(func.count()).select_from(models.AuditEntry))

    def blob(self, content: records.Content) -> None:
        """The order of an upload: row, bytes, and later the version or the run."""
        with self._database.write() as session:
            self._reserved[bytes.fromhex(content.digest)] = blobs.reserve(session, content.digest, len(content.data))
        if self._store.put(content.digest, content.data):
            self.result.add("blobs")

    def chunk(self, chunk: list[Record]) -> None:
        """One transaction."""
        with self._database.write() as session:
            for record in chunk:
                match record:
                    case records.NamespaceRecord():
                        self._namespace(session, record)
                    case records.BaseModelRecord():
                        self._base_model(session, record)
                    case records.ExpertRecord():
                        self._expert(session, record)
                    case records.VersionRecord():
                        self._version(session, record)
                    case records.PointsRecord():
                        self._curve(session, record)
                    case records.AliasEventRecord():
                        self._event(session, record)
                    case records.AliasesRecord():
                        self._aliases(session, record)
                    case records.RunRecord():
                        self._run(session, record)
                    case records.TokenRecord():
                        self._token(session, record)
                    case records.AuditRecord():
                        self._audit(session, record)
                    case records.EndRecord():
                        audit.record(session, self._actor, "registry.import", "registry", added=self.result.counts)
                    case records.RegistryRecord():
                        pass
                session.flush()

    def _namespace(self, session: Session, record: records.NamespaceRecord) -> None:
        if insert_once(session, models.Namespace, **_values(record)):
            self.result.add("namespaces")

    def _base_model(self, session: Session, record: records.BaseModelRecord) -> None:
        values = _values(record)
        values["model_id"] = values.pop("id")
        if insert_once(session, models.BaseModel, **values):
            self.result.add("base models")
        elif record.targets is not None:
            base_models.put(session, self._actor, record.fingerprint, record.id, record.revision, record.targets)

    def _expert(self, session: Session, record: records.ExpertRecord) -> None:
        name = parse_name(record.expert)
        insert_once(session, models.Namespace, name=name.namespace, description="", created_at=record.created_at)
        namespace = session.scalars(select(models.Namespace.id).where(models.Namespace.name == name.namespace)).one()
        values = _values(record, "expert", "tags")
        new = insert_once(
            session,
            models.Expert,
            **values,
            namespace_id=namespace,
            name=name.name,
            path=record.expert,
            search_text="",
            live=0,
        )
        row = experts.find(session, name, deleted=True, lock=True)
        for tag in record.tags:
            insert_once(session, models.Tag, expert_id=row.id, tag=tag)
        if new:
            self.result.add("experts")
            experts.refresh(session, row, at=row.updated_at)
        else:
            experts.refresh(session, row, at=row.updated_at)
            row.last = max(row.last, record.last)
            if row.description != record.description:
                self.result.keep(f"the description of {record.expert}")
            if (row.deleted_at is None) != (record.deleted_at is None):
                self.result.keep(f"{record.expert}, which is {'not ' if row.deleted_at is None else ''}deleted here")
        history = select(models.AliasEvent).where(models.AliasEvent.expert_id == row.id)
        self._history = list(session.scalars(history.order_by(models.AliasEvent.id)))
        self._events, self._diverged = 0, False

    def _version(self, session: Session, record: records.VersionRecord) -> None:
        expert = experts.find(session, parse_name(record.expert), deleted=True, lock=True)
        version = _version(session, record.expert, record.number)
        new = version is None
        if version is not None:
            if version.digest != record.digest:
                raise ConflictError(f"{record.expert}@{record.number} has got another content meanwhile")
            self.result.add("present")
            if (version.deleted_at is None) != (record.deleted_at is None):
                state = "not deleted" if version.deleted_at is None else "deleted"
                self.result.keep(f"{record.expert}@{record.number}, which is {state} here")
        else:
            self._hold(session, record.digest)
            file = decode_expert(self._store.get(record.digest), record.expert)
            base = base_models.ensure(session, file.manifest.base)
            base_models.check_ranks(base, file.manifest)
            version = versions.insert(
                session,
                expert,
                base,
                file,
                number=record.number,
                description=record.description,
                created_at=record.created_at,
                created_by=record.created_by,
                deleted_at=record.deleted_at,
            )
            self.result.add("versions")
        for name, value in record.metrics.items():
            if not insert_once(session, models.Metric, version_id=version.id, name=name, value=value):
                there = session.get(models.Metric, (version.id, name))
                if there is not None and there.value != value:
                    self.result.keep(f"{name} of {record.expert}@{record.number}, which is {there.value} here")
        live = int(new and record.deleted_at is None)
        experts.refresh(session, expert, live=live, last=record.number, at=expert.updated_at)

    def _curve(self, session: Session, record: records.PointsRecord) -> None:
        version = _version(session, record.expert, record.number)
        if version is None:
            raise ConflictError(f"{record.expert}@{record.number} was removed meanwhile; import again")
        new = []
        for point, there in _points(session, version, record.points):
            if there is None:
                new.append({"version_id": version.id, **point.model_dump()})
            elif there != point:
                raise ConflictError(f"{record.expert}@{record.number} has got another reward curve meanwhile")
        if new:
            session.execute(models.CurvePoint.__table__.insert(), new)  # type: ignore[attr-defined]  # a Table
            self.result.add("points", len(new))

    def _event(self, session: Session, record: records.AliasEventRecord) -> None:
        self._events += 1
        if self._diverged:
            return
        values = _values(record, "expert")
        if self._events <= len(self._history):
            there = self._history[self._events - 1]
            self._diverged = any(getattr(there, name) != value for name, value in values.items())
        else:
            expert = experts.find(session, parse_name(record.expert), deleted=True)
            session.add(models.AliasEvent(expert_id=expert.id, **values))
            self.result.add("alias events")

    def _aliases(self, session: Session, record: records.AliasesRecord) -> None:
        expert = experts.find(session, parse_name(record.expert), deleted=True, lock=True)
        rows = {
            row.alias: row for row in session.scalars(select(models.Alias).where(models.Alias.expert_id == expert.id))
        }
        if self._diverged or self._events < len(self._history):
            for alias in sorted(rows.keys() | record.aliases.keys()):
                here = rows[alias].number if alias in rows else None
                theirs = record.aliases[alias].number if alias in record.aliases else None
                if here != theirs:
                    where = f"points to {here} here" if here is not None else "is not here"
                    self.result.keep(f"{record.expert}@{alias}, which {where}")
            return
        for alias in rows.keys() - record.aliases.keys():
            session.delete(rows[alias])
        for alias, target in record.aliases.items():
            values = _values(target)
            if alias not in rows:
                session.add(models.Alias(expert_id=expert.id, alias=alias, **values))
                self.result.add("aliases")
            else:
                for name, value in values.items():
                    setattr(rows[alias], name, value)
        experts.refresh(session, expert, at=expert.updated_at)

    def _run(self, session: Session, record: records.RunRecord) -> None:
        insert_once(session, models.Namespace, name=record.namespace, description="", created_at=record.created_at)
        self._hold(session, record.samples)
        new = runs.insert(
            session,
            namespaces.find(session, record.namespace).id,
            _run_of(record, self._store.get(record.samples)),
            created_at=record.created_at,
            created_by=record.created_by,
        )
        if new:
            self.result.add("runs")

    def _hold(self, session: Session, digest: str) -> None:
        if not blobs.hold(session, digest, self._reserved[bytes.fromhex(digest)]):
            raise UnavailableError("a collection of garbage came in between; import again")

    def _token(self, session: Session, record: records.TokenRecord) -> None:
        if not self._tokens:
            self.result.keep(f"the token {record.prefix}… ({record.name}), left out")
        elif insert_once(session, models.Token, **_values(record)):
            self.result.add("tokens")

    def _audit(self, session: Session, record: records.AuditRecord) -> None:
        if not self._logs:
            self.result.add("log entries left out")
            return
        session.add(models.AuditEntry(**_values(record)))
        self.result.add("log entries")


def _values(record: Any, *without: str) -> dict[str, Any]:
    return {name: getattr(record, name) for name in type(record).model_fields if name not in ("type", *without)}


def _version(session: Session, path: str, number: int) -> models.Version | None:
    return session.scalar(
        select(models.Version).join(models.Expert).where(models.Expert.path == path, models.Version.number == number)
    )


def _points(
    session: Session, version: models.Version, points: tuple[CurvePoint, ...]
) -> Iterator[tuple[CurvePoint, CurvePoint | None]]:
    """Each point with the one that the registry has in its place."""
    table = models.CurvePoint
    steps = [point.step for point in points]
    if not steps:
        return
    fields = tuple(CurvePoint.model_fields)
    rows = session.execute(
        select(*(getattr(table, name) for name in fields)).where(
            table.version_id == version.id, table.step.between(min(steps), max(steps))
        )
    )
    there = {(row.split, row.step): CurvePoint(**dict(zip(fields, row, strict=True))) for row in rows}
    for point in points:
        yield point, there.get((point.split, point.step))
