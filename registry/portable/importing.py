"""Import of an archive into a registry, empty or not.

An archive is read three times. The first pass checks each record by itself, against the others, against the limits of
the API, and against the registry. Nothing is written if a record breaks a rule or contradicts immutable data. The
second pass stores the blobs as uploads do. The third pass writes all records in one transaction. An interrupted import
leaves at most unreferenced blobs, which garbage collection removes.

The same import again changes nothing. Where mutable data differs, the registry keeps its own and reports it:
descriptions, metrics, deletion, and aliases unless the archive's history continues the registry's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import IO, Any

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from t2.core.digests import digest_of, sha256
from t2.core.errors import (
    ArgumentError,
    ConflictError,
    ExpertFileError,
    InvalidRequestError,
    ResultsError,
    UnavailableError,
)
from t2.core.expertfile import decode_expert
from t2.core.references import is_name, parse_name
from t2.core.runfile import RunFile, decode_header
from t2.registry.blobs.base import BlobStore
from t2.registry.db import models
from t2.registry.db.database import Database, insert_once
from t2.registry.names import MAX_METRICS, MAX_TAGS
from t2.registry.portable import records
from t2.registry.portable.records import MAX_ARCHIVED_VERSION, PointOfCurve, Record
from t2.registry.services import audit, base_models, blobs, curves, experts, namespaces, runs, versions
from t2.registry.services.actor import Actor, Limits
from t2.registry.services.service import Service

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


def restore(
    database: Database,
    store: BlobStore,
    actor: Actor,
    file: IO[bytes],
    *,
    tokens: bool = False,
    limits: Limits | None = None,
) -> Imported:
    """Import an archive.

    Args:
        file: seekable, positioned at its start.
        tokens: also take the access tokens of the archive; who holds one of them can use this registry then.
        limits: limits of this registry.

    Raises:
        ArgumentError: the file is not seekable.
        InvalidRequestError: the archive is truncated, damaged or not of a registry, or a record exceeds a limit of the
            API; nothing was written.
        TooLargeError: a file in it is over the limit; nothing was written.
        ConflictError: something immutable is another in the registry; nothing was written.
        UnavailableError: database or store cannot be reached; import again.
    """
    if not file.seekable():
        raise ArgumentError("the archive is not seekable, and it is read three times; give a file instead of a pipe")
    service = Service(database, store, actor, limits=limits)
    try:
        contents = _Contents(file)
        _Check(service, contents).read(file)
        importer = _Importer(service, contents, tokens)
        file.seek(0)
        for part in records.read(file):
            if isinstance(part, records.Content):
                importer.blob(part)
        file.seek(0)
        importer.write(part for part in records.read(file) if isinstance(part, list))
    except (ExpertFileError, ResultsError) as error:
        raise InvalidRequestError(str(error)) from error
    except IntegrityError as error:
        raise ConflictError("the registry is being changed by others; import again") from error
    return importer.result


class _Contents:
    """The blobs of an archive, read on demand; each takes 250 bytes of memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._places: dict[tuple[bool, bytes], tuple[int, int]] = {}
        self._last: records.Content | None = None

    def add(self, content: records.Content) -> None:
        """Register a blob."""
        self._last = content
        self._places[content.is_expert, bytes.fromhex(content.digest)] = content.offset, len(content.data)

    def expert(self, digest: str) -> bytes:
        """The bytes of an expert's file that was added."""
        return self._read(True, digest)

    def samples(self, digest: str, where: str) -> bytes:
        """The bytes of a run's samples.

        Raises:
            InvalidRequestError: they were not added before.
        """
        if (False, bytes.fromhex(digest)) not in self._places:
            raise InvalidRequestError(f"the samples of {where} are not in it before")
        return self._read(False, digest)

    def _read(self, is_expert: bool, digest: str) -> bytes:
        if self._last is not None and (self._last.is_expert, self._last.digest) == (is_expert, digest):
            return self._last.data
        offset, size = self._places[is_expert, bytes.fromhex(digest)]
        self._file.seek(offset)
        data = self._file.read(size)
        if sha256(data) != digest:
            raise InvalidRequestError("the file changed while it was read; import it again")
        self._last = records.Content(digest, data, offset, is_expert)
        return data


@dataclass
class _Expert:
    """State of the first pass about the expert whose records it reads.

    Attributes:
        deleted: whether a version is deleted, by number.
        digests: digests of the versions.
        points: split and step of the last point, by number.
        counts: number of points that the registry would have, by number.
        complete: whether the aliases, which come last, were read.
    """

    record: records.ExpertRecord
    deleted: dict[int, bool] = field(default_factory=dict)
    digests: set[str] = field(default_factory=set)
    points: dict[int, tuple[str, int]] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    complete: bool = False


@dataclass(frozen=True)
class _File:
    """Properties of an expert's file; ``targets`` is the digest of its manifest's targets."""

    kind: str
    base: str
    targets: str


class _Check:
    """The first pass, which only checks."""

    def __init__(self, service: Service, contents: _Contents) -> None:
        self._service = service
        self._contents = contents
        self._counts: dict[str, int] = {}
        self._conflicts: list[str] = []
        self._ended = False
        self._paths: set[str] = set()
        self._expert: _Expert | None = None
        self._files: dict[bytes, _File] = {}
        self._targets: dict[str, dict[str, int]] = {}
        self._bases: dict[str, dict[str, int]] = {}
        self._used: dict[tuple[str, str], str] = {}  # base and targets, with the reference of one version

    def read(self, file: IO[bytes]) -> None:
        """Check an archive.

        Raises:
            InvalidRequestError, TooLargeError, ConflictError: as :func:`restore`.
        """
        for part in records.read(file):
            if isinstance(part, records.Content):
                self._content(part)
                continue
            with self._service.database.read() as session:
                for record in part:
                    self._record(session, record)
                    self._conflicts += _find_conflicts(session, record)
                    if len(self._conflicts) > _TOLD:
                        raise _conflict(self._conflicts)
        if not self._ended:
            raise InvalidRequestError("it ends in the middle; copy it again")
        with self._service.database.read() as session:
            self._conflicts += self._find_odd_ranks(session)
        if self._conflicts:
            raise _conflict(self._conflicts)

    def _content(self, content: records.Content) -> None:
        self._place("blob" if content.is_expert else "samples")
        if content.is_expert:
            manifest = self._service.validate(content.data, records.BLOBS + content.digest, canonical=False).manifest
            targets = digest_of(manifest.targets)
            self._targets.setdefault(targets, manifest.targets)
            self._files[bytes.fromhex(content.digest)] = _File(manifest.kind, manifest.base.fingerprint, targets)
        self._contents.add(content)

    def _place(self, kind: str) -> None:
        """Count a record or blob; check that it is between the first and the last record."""
        if self._ended or (kind == "registry") != (not self._counts):
            raise InvalidRequestError("its records are out of order")
        self._counts[kind] = self._counts.get(kind, 0) + 1

    def _record(self, session: Session, record: Record) -> None:
        counts = dict(self._counts)
        self._place(record.type)
        match record:
            case records.EndRecord():
                self._ended = True
                if record.counts != counts:
                    raise InvalidRequestError("it does not hold what its end says")
            case records.BaseModelRecord():
                known = self._bases.setdefault(record.fingerprint, record.targets or {})
                if known != (record.targets or {}):
                    raise InvalidRequestError(f"it has the base model {record.fingerprint[:12]} twice")
            case records.ExpertRecord():
                if record.expert in self._paths:
                    raise InvalidRequestError(f"it has the expert {record.expert} twice")
                self._paths.add(record.expert)
                self._expert = _Expert(record)
            case records.VersionRecord():
                self._version(self._of_expert(record.expert), record)
            case records.PointsRecord():
                self._points(session, self._of_expert(record.expert), record)
            case records.AliasEventRecord():
                expert = self._of_expert(record.expert)
                if max(record.number or 0, record.previous or 0) > expert.record.last:
                    raise InvalidRequestError(f"{record.expert}@{record.alias} had a number that it cannot have")
            case records.AliasesRecord():
                self._aliases(self._of_expert(record.expert), record)
            case records.RunRecord():
                _read_run(self._service, record, self._contents)
            case _:
                pass

    def _of_expert(self, path: str) -> _Expert:
        if self._expert is None or self._expert.record.expert != path or self._expert.complete:
            raise InvalidRequestError("its records are out of order")
        return self._expert

    def _version(self, expert: _Expert, record: records.VersionRecord) -> None:
        reference = f"{record.expert}@{record.number}"
        file = self._files.get(bytes.fromhex(record.digest))
        if file is None or file.kind != expert.record.kind:
            raise InvalidRequestError(f"the file of {reference} is not in it before, or of another kind")
        if record.number > expert.record.last or record.number in expert.deleted:
            raise InvalidRequestError(f"{reference} has a number that it cannot have")
        if record.digest in expert.digests:
            raise InvalidRequestError(f"{reference} has the content of another version")
        expert.digests.add(record.digest)
        expert.deleted[record.number] = record.deleted_at is not None
        self._used.setdefault((file.base, file.targets), reference)

    def _points(self, session: Session, expert: _Expert, record: records.PointsRecord) -> None:
        reference = f"{record.expert}@{record.number}"
        if record.number not in expert.deleted:
            raise InvalidRequestError(f"it has a curve of {reference}, and not the version")
        version = _version(session, record.expert, record.number)
        if record.number not in expert.counts:
            expert.counts[record.number] = curves.count(session, version.id) if version is not None else 0
        for point in record.points:
            place = point.split, point.step
            if place <= expert.points.get(record.number, ("", 0)):
                raise InvalidRequestError(f"the points of {reference} are not in the order of split and step")
            expert.points[record.number] = place
        new = len(record.points)
        if version is not None:
            new = sum(here is None for _, here in _points(session, version, record.points))
        expert.counts[record.number] += new
        if expert.counts[record.number] > self._service.limits.points:
            raise InvalidRequestError(f"the curve of {reference} has more than {self._service.limits.points} points")

    def _aliases(self, expert: _Expert, record: records.AliasesRecord) -> None:
        for alias, target in record.aliases.items():
            if expert.deleted.get(target.number, True):
                raise InvalidRequestError(f"{record.expert}@{alias} points to a version that it does not hold")
        expert.complete = True

    def _find_odd_ranks(self, session: Session) -> Iterator[str]:
        """Yield versions that do not fit their base model, where its targets are known."""
        table = models.BaseModel
        for (fingerprint, targets), reference in self._used.items():
            ranks = self._bases.get(fingerprint) or session.scalar(
                select(table.targets).where(table.fingerprint == fingerprint)
            )
            odd = base_models.find_disagreement(self._targets[targets], ranks) if ranks else None
            if odd is not None:
                yield f"{reference} does not fit its base model {fingerprint[:12]}: {odd}"


def _read_run(service: Service, record: records.RunRecord, contents: _Contents) -> RunFile:
    """Read a run of an archive with its samples, with the checks of a pushed run.

    Raises:
        InvalidRequestError, ResultsError: it is not a run, or contradicts its samples.
        TooLargeError: it exceeds the limit.
    """
    where = f"a run of {record.namespace}"
    samples = contents.samples(record.samples, where)
    header = record.header.encode()
    if decode_header(header, where).samples_digest != record.samples:
        raise InvalidRequestError(f"{where} has other samples than its header says")
    return service.validate_run(header + b"\n" + samples, where)


def _conflict(conflicts: list[str]) -> ConflictError:
    more = f" (and {len(conflicts) - 1} more such conflicts)" if len(conflicts) > 1 else ""
    return ConflictError(f"nothing was imported: {conflicts[0]}{more}")


def _find_conflicts(session: Session, record: Record) -> Iterator[str]:
    """Yield conflicts with immutable data of the registry, and limits exceeded together with it."""
    if isinstance(record, records.BaseModelRecord) and record.targets is not None:
        base = session.scalar(select(models.BaseModel).where(models.BaseModel.fingerprint == record.fingerprint))
        if base is not None and base.targets is not None and base.targets != record.targets:
            yield f"the base model {record.fingerprint[:12]} has other targets here"
        if base is not None and base.targets is None:
            odd = base_models.find_odd_version(session, base, record.targets)
            if odd is not None:
                yield f"an expert of the base model {record.fingerprint[:12]} disagrees with its targets: {odd}"
    if isinstance(record, records.ExpertRecord):
        expert = session.scalar(select(models.Expert).where(models.Expert.path == record.expert))
        if expert is not None and expert.kind != record.kind:
            yield f"{record.expert} is of kind {expert.kind} here, of kind {record.kind} in the archive"
        if expert is not None:
            tags = set(session.scalars(select(models.Tag.tag).where(models.Tag.expert_id == expert.id)))
            if len(tags.union(record.tags)) > MAX_TAGS:
                yield f"{record.expert} would have more than {MAX_TAGS} tags"
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
        names = set(
            session.scalars(
                select(models.Metric.name)
                .join(models.Version, models.Version.id == models.Metric.version_id)
                .join(models.Expert, models.Expert.id == models.Version.expert_id)
                .where(models.Expert.path == record.expert, models.Version.number == record.number)
            )
        )
        if len(names.union(record.metrics)) > MAX_METRICS:
            yield f"{record.expert}@{record.number} would have more than {MAX_METRICS} metrics"
    if isinstance(record, records.PointsRecord):
        version = _version(session, record.expert, record.number)
        if version is not None and any(
            there != point for point, there in _points(session, version, record.points) if there is not None
        ):
            yield f"{record.expert}@{record.number} has another reward curve here"


class _Importer:
    """The second and the third pass."""

    def __init__(self, service: Service, contents: _Contents, tokens: bool) -> None:
        self.result = Imported()
        self._service = service
        self._database = service.database
        self._store = service.store
        self._actor = service.actor
        self._contents = contents
        self._tokens = tokens
        self._reserved: dict[bytes, datetime] = {}
        self._history: list[models.AliasEvent] = []
        self._events = 0
        self._diverged = False
        self._logs = False

    def blob(self, content: records.Content) -> None:
        """The order of an upload: row, bytes, and later the version or the run."""
        with self._database.write() as session:
            self._reserved[bytes.fromhex(content.digest)] = blobs.reserve(session, content.digest, len(content.data))
        if self._store.put(content.digest, content.data):
            self.result.add("blobs")

    def write(self, chunks: Iterable[list[Record]]) -> None:
        """Write all records, in one transaction."""
        with self._database.write() as session:
            self._logs = not session.scalar(select(func.count()).select_from(models.AuditEntry))
            for chunk in chunks:
                for record in chunk:
                    self._record(session, record)
                    session.flush()
                session.expunge_all()

    def _record(self, session: Session, record: Record) -> None:
        match record:
            case records.NamespaceRecord():
                self._namespace(session, record)
            case records.BaseModelRecord():
                self._base_model(session, record)
            case records.ExpertRecord():
                self._expert(session, record)
            case records.PurgedRecord():
                self._purged(session, record.path, record.last)
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
        experts.refresh(session, row, at=row.updated_at)
        row.last = max(row.last, record.last, experts.last_of_purged(session, record.expert))
        if new:
            self.result.add("experts")
        else:
            if row.description != record.description:
                self.result.keep(f"the description of {record.expert}")
            if (row.deleted_at is None) != (record.deleted_at is None):
                self.result.keep(f"{record.expert}, which is {'not ' if row.deleted_at is None else ''}deleted here")
        history = select(models.AliasEvent).where(models.AliasEvent.expert_id == row.id)
        self._history = list(session.scalars(history.order_by(models.AliasEvent.id)))
        self._events, self._diverged = 0, False

    def _purged(self, session: Session, path: str, last: int) -> None:
        """Reserve the version numbers of a purged name."""
        if experts.last_of_purged(session, path) >= last:
            return
        experts.record_purged(session, path, last)
        row = session.scalar(select(models.Expert).where(models.Expert.path == path).with_for_update())
        if row is not None:
            row.last = max(row.last, last)
        self.result.add("purged names")

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
            file = decode_expert(self._contents.expert(record.digest), record.expert, canonical=False)
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
        deleted = select(models.Version.number).where(
            models.Version.expert_id == expert.id, models.Version.deleted_at.is_not(None)
        )
        deleted_here = set(session.scalars(deleted))
        for alias, target in record.aliases.items():
            values = _values(target)
            if target.number in deleted_here:
                self._keep_alias(session, expert, alias, rows[alias].number if alias in rows else None, target.number)
            elif alias not in rows:
                session.add(models.Alias(expert_id=expert.id, alias=alias, **values))
                self.result.add("aliases")
            else:
                for name, value in values.items():
                    setattr(rows[alias], name, value)
        experts.refresh(session, expert, at=expert.updated_at)

    def _keep_alias(self, session: Session, expert: models.Expert, alias: str, here: int | None, deleted: int) -> None:
        """Leave an alias unchanged whose new version is deleted here; record it in the history."""
        self.result.keep(f"{expert.path}@{alias}, whose version {deleted} is deleted here")
        session.add(
            models.AliasEvent(
                expert_id=expert.id,
                alias=alias,
                number=here,
                previous=deleted,
                at=audit.now(),
                by=str(self._actor),
                reason=f"version {deleted} is deleted here",
            )
        )

    def _run(self, session: Session, record: records.RunRecord) -> None:
        insert_once(session, models.Namespace, name=record.namespace, description="", created_at=record.created_at)
        self._hold(session, record.samples)
        new = runs.insert(
            session,
            namespaces.find(session, record.namespace).id,
            _read_run(self._service, record, self._contents),
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
        if record.action == "expert.purge" and is_name(record.object):
            # Archives of an older t2 have the numbers of purged names only in the audit log.
            last = record.detail.get("last")
            if type(last) is int and 0 <= last <= MAX_ARCHIVED_VERSION:
                self._purged(session, str(parse_name(record.object)), last)
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
    session: Session, version: models.Version, points: tuple[PointOfCurve, ...]
) -> Iterator[tuple[PointOfCurve, PointOfCurve | None]]:
    """Each point with the one that the registry has in its place."""
    table = models.CurvePoint
    steps = [point.step for point in points]
    if not steps:
        return
    fields = tuple(PointOfCurve.model_fields)
    rows = session.execute(
        select(*(getattr(table, name) for name in fields)).where(
            table.version_id == version.id, table.step.between(min(steps), max(steps))
        )
    )
    there = {(row.split, row.step): PointOfCurve(**dict(zip(fields, row, strict=True))) for row in rows}
    for point in points:
        yield point, there.get((point.split, point.step))
