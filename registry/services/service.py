"""The registry itself: features, transactions and blobs put together. The embedded client is this and nothing more."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

import pydantic
from sqlalchemy.exc import IntegrityError

from t2.core.curve import CurvePoint
from t2.core.digests import digest_of
from t2.core.errors import (
    ConflictError,
    ExpertFileError,
    InvalidRequestError,
    NotFoundError,
    RegistryError,
    ResultsError,
    TooLargeError,
)
from t2.core.expertfile import ExpertFile, decode_expert
from t2.core.references import (
    ExpertName,
    Reference,
    is_digest,
)
from t2.core.results import TaskResult, TaskRun
from t2.core.runfile import RunFile, decode_run, read_samples
from t2.registry.blobs.base import BlobStore
from t2.registry.db.database import Database
from t2.registry.names import (
    check_alias,
    check_key,
    check_metric,
    check_name,
    check_namespace,
    check_note,
    check_tag,
    known_namespace,
)
from t2.registry.schemas import (
    AliasEvent,
    AliasInfo,
    AliasRun,
    AuditEntry,
    BaseModelInfo,
    Board,
    BoardPage,
    BoardQuery,
    Curve,
    Expert,
    ExpertQuery,
    Judgement,
    Lineage,
    Namespace,
    NewToken,
    Page,
    Run,
    RunDetail,
    RunQuery,
    Scope,
    TokenInfo,
    VerdictQuery,
    Version,
    VersionDetail,
    VersionQuery,
)
from t2.registry.services import (
    aliases,
    audit,
    base_models,
    blobs,
    boards,
    curves,
    experts,
    lineage,
    namespaces,
    runs,
    tokens,
    verdicts,
    versions,
)
from t2.registry.services.actor import Actor, Limits

_TEXT = 4000
_LABEL = 200
_TRIES = 3
_EXPERTS = pydantic.TypeAdapter(Page[Expert])


class Service:
    """A registry over a database and a blob store, acting for one actor.

    It is a :class:`~t2.registry.client.base.RegistryClient`, where the methods are described. Instances are cheap and
    safe to share between threads.
    """

    def __init__(
        self, database: Database, store: BlobStore, actor: Actor, *, limits: Limits | None = None, location: str = ""
    ) -> None:
        """Put a registry together; its tables must exist already (:mod:`t2.registry.db.migrate`)."""
        self.database = database
        self.store = store
        self.actor = actor
        self.limits = limits or Limits()
        self.location = location or database.location

    def acting_for(self, actor: Actor) -> Service:
        """The same registry on behalf of another."""
        return Service(self.database, self.store, actor, limits=self.limits, location=self.location)

    def publish(
        self, name: ExpertName, data: bytes, *, description: str = "", idempotency_key: str | None = None
    ) -> Version:
        check_name(name)
        file = self.validate(data, str(name))
        check_note("description", description)
        _text("description", description)
        check_key(idempotency_key)
        request = digest_of([str(name), file.digest, description])
        changed: IntegrityError | None = None
        for _ in range(_TRIES):
            with self.database.write() as session:
                made = blobs.reserve(session, file.digest, len(data))
            self.store.put(file.digest, data)
            try:
                with self.database.write() as session:
                    if blobs.hold(session, file.digest, made):
                        return versions.publish(
                            session,
                            self.actor,
                            name,
                            file,
                            description=description,
                            key=idempotency_key,
                            request=request,
                            limits=self.limits,
                        )
            except IntegrityError as error:  # another upload under the same key came first
                changed = error
        raise ConflictError(f"{name} is being changed by others; try again") from changed

    def validate(self, data: bytes, source: str, *, canonical: bool = True) -> ExpertFile:
        """Check the bytes of an upload; ``canonical`` is False for files from another registry.

        Raises:
            TooLargeError: over the limit.
            InvalidRequestError: it breaks the strict profile of expert files.
        """
        if len(data) > self.limits.upload_bytes:
            raise TooLargeError(f"the file has {len(data)} bytes, the limit is {self.limits.upload_bytes}")
        try:
            return decode_expert(data, source, canonical=canonical)
        except ExpertFileError as error:
            raise InvalidRequestError(str(error)) from error

    def get_expert(self, name: ExpertName) -> Expert:
        return Expert.model_validate_json(self.get_expert_json(name))

    def get_expert_json(self, name: ExpertName) -> str:
        """:meth:`get_expert` as the JSON of its answer, which lies ready in the database."""
        with self.database.glance() as connection:
            return experts.get(connection, name)

    def list_experts(
        self, query: ExpertQuery | None = None, *, cursor: str | None = None, limit: int = 50
    ) -> Page[Expert]:
        return _EXPERTS.validate_json(self.list_experts_json(query or ExpertQuery(), cursor=cursor, limit=limit))

    def list_experts_json(self, query: ExpertQuery, *, cursor: str | None = None, limit: int = 50) -> str:
        """:meth:`list_experts` as the JSON of its answer, whose items lie ready in the database."""
        for field in ("text", "task", "domain", "base"):
            _text(field, getattr(query, field) or "")
        with self.database.glance() as connection:
            items, following = experts.list_experts(connection, query, cursor=cursor, limit=limit)
        return f'{{"items":[{",".join(items)}],"next":{json.dumps(following)}}}'

    def describe_expert(self, name: ExpertName, description: str) -> Expert:
        _text("description", description)
        with self.database.write() as session:
            card = experts.describe(session, self.actor, name, description)
        return Expert.model_validate_json(card)

    def resolve(self, reference: Reference) -> VersionDetail:
        with self.database.read() as session:
            return versions.resolve(session, reference)

    def list_versions(self, name: ExpertName, *, cursor: str | None = None, limit: int = 50) -> Page[Version]:
        with self.database.read() as session:
            return versions.list_versions(session, name, cursor=cursor, limit=limit)

    def search_versions(self, query: VersionQuery, *, cursor: str | None = None, limit: int = 50) -> Page[Version]:
        _text("domain", query.domain or "")
        with self.database.read() as session:
            return versions.search(session, query, cursor=cursor, limit=limit)

    def download(self, digest: str) -> bytes:
        self.kept(digest)
        return self.store.get(digest)

    def kept(self, digest: str) -> tuple[int, str]:
        """Bytes of a content that a version which is not deleted has, or a run, and the ending of such files' names.

        Raises:
            NotFoundError: neither has it.
        """
        _digest(digest)
        with self.database.read() as session:
            return blobs.find_readable(session, digest)

    def set_metrics(self, name: ExpertName, version: int, metrics: Mapping[str, float]) -> Version:
        for metric in metrics:
            check_metric(metric)
        with self.database.write() as session:
            return versions.set_metrics(session, self.actor, name, version, metrics)

    def list_aliases(self, name: ExpertName) -> Sequence[AliasInfo]:
        with self.database.read() as session:
            return aliases.list_aliases(session, name)

    def set_alias(self, name: ExpertName, alias: str, version: int, *, reason: str = "") -> AliasInfo:
        check_alias(alias)
        _text("reason", reason)
        with self.database.write() as session:
            return aliases.set_alias(session, self.actor, name, alias, version, reason)

    def delete_alias(self, name: ExpertName, alias: str, *, reason: str = "") -> None:
        check_alias(alias)
        check_note("reason", reason)
        _text("reason", reason)
        with self.database.write() as session:
            aliases.delete_alias(session, self.actor, name, alias, reason)

    def alias_history(
        self, name: ExpertName, alias: str | None = None, *, cursor: str | None = None, limit: int = 50
    ) -> Page[AliasEvent]:
        with self.database.read() as session:
            return aliases.history(session, name, alias, cursor=cursor, limit=limit)

    def change_tags(self, name: ExpertName, *, add: Iterable[str] = (), remove: Iterable[str] = ()) -> Expert:
        add, remove = list(add), list(remove)
        for tag in (*add, *remove):
            check_tag(tag)
        with self.database.write() as session:
            card = experts.change_tags(session, self.actor, name, add, remove)
        return Expert.model_validate_json(card)

    def delete(self, name: ExpertName, version: int | None = None) -> None:
        with self.database.write() as session:
            versions.delete(session, self.actor, name, version)

    def restore(self, name: ExpertName, version: int | None = None) -> None:
        with self.database.write() as session:
            versions.restore(session, self.actor, name, version)

    def add_points(self, name: ExpertName, version: int, points: Sequence[CurvePoint]) -> int:
        with self.database.write() as session:
            return curves.add_points(session, self.actor, name, version, points, self.limits)

    def curve(self, name: ExpertName, version: int, *, split: str | None = None, points: int | None = None) -> Curve:
        curves.check_wanted(split, points)
        with self.database.glance() as connection:
            found = versions.live_id(connection, name, version)
            if found is not None:
                return curves.curve(connection, found, split, points)
        with self.database.read() as session:
            return curves.curve(session, versions.id_of(session, name, version), split, points)

    def curve_json(self, name: ExpertName, version: int, *, split: str | None, points: int | None) -> bytes:
        """Return :meth:`curve` as JSON."""
        curves.check_wanted(split, points)
        with self.database.glance() as connection:
            found = versions.live_id(connection, name, version)
            if found is not None:
                return curves.curve_json(connection, found, split, points)
        with self.database.read() as session:
            return curves.curve_json(session, versions.id_of(session, name, version), split, points)

    def lineage(self, digest: str) -> Lineage:
        _digest(digest)
        with self.database.read() as session:
            return lineage.lineage(session, digest, self.limits)

    def push_run(self, namespace: str, data: bytes) -> Run:
        check_namespace(namespace)
        file = self.validate_run(data, f"a run of {namespace}")
        for _ in range(_TRIES):
            with self.database.write() as session:
                made = blobs.reserve(session, file.run.samples_digest, len(file.samples))
            self.store.put(file.run.samples_digest, file.samples)
            with self.database.write() as session:
                if blobs.hold(session, file.run.samples_digest, made):
                    return runs.push(session, self.actor, namespace, file)
        raise ConflictError(f"the samples of a run of {namespace} are being collected as garbage; try again")

    def validate_run(self, data: bytes, source: str) -> RunFile:
        """Check a run's bytes.

        Raises:
            TooLargeError: over the limit.
            InvalidRequestError: not a run's file, or at odds with its samples.
        """
        if len(data) > self.limits.upload_bytes:
            raise TooLargeError(f"the file has {len(data)} bytes, the limit is {self.limits.upload_bytes}")
        try:
            return decode_run(data, source)
        except ResultsError as error:
            raise InvalidRequestError(str(error)) from error

    def list_runs(self, query: RunQuery | None = None, *, cursor: str | None = None, limit: int = 50) -> Page[Run]:
        query = query or RunQuery()
        for field in ("task", "base", "expert", "strategy"):
            _text(field, getattr(query, field) or "")
        with self.database.read() as session:
            return runs.list_runs(session, query, cursor=cursor, limit=limit)

    def get_run(self, namespace: str, digest: str) -> RunDetail:
        _digest(digest)
        with self.database.read() as session:
            return runs.detail(session, known_namespace(namespace), digest)

    def delete_run(self, namespace: str, digest: str) -> None:
        _digest(digest)
        with self.database.write() as session:
            runs.remove(session, self.actor, known_namespace(namespace), digest)

    def list_boards(
        self, *, task: str | None = None, base: str | None = None, cursor: str | None = None, limit: int = 50
    ) -> Page[Board]:
        _text("task", task or "")
        _text("base", base or "")
        with self.database.read() as session:
            return boards.list_boards(session, task=task, base=base, cursor=cursor, limit=limit)

    def board(self, query: BoardQuery, *, cursor: str | None = None, limit: int = 50) -> BoardPage:
        for field in ("task", "base", "task_version", "metric", "filter"):
            _text(field, getattr(query, field) or "")
        with self.database.read() as session:
            return boards.board(session, query, cursor=cursor, limit=limit)

    def alias_runs(self, name: ExpertName, alias: str, *, cursor: str | None = None, limit: int = 50) -> Page[AliasRun]:
        check_alias(alias)
        with self.database.read() as session:
            return runs.alias_runs(session, name, alias, cursor=cursor, limit=limit)

    def verdict(self, query: VerdictQuery) -> Judgement:
        for field in ("baseline", "candidate", "noise", "tasks", "metric", "filter"):
            given = getattr(query, field)
            for value in given if isinstance(given, tuple) else [given]:
                _text(field, value or "")
        return verdicts.judge(self, query, self._measured, limit=self.limits.compared_bytes)

    def _measured(self, run: Run) -> TaskResult:
        """Return the results of a run.

        They lack the record, which may be long, and the time, which an older t2 did not check.
        """
        header = self.get_run(run.namespace, run.digest).header
        try:
            samples = self.store.get(run.samples_digest)
        except NotFoundError as error:
            # A row points to it, so its absence is the registry's fault and not the client's.
            raise RegistryError(str(error)) from error
        stated = TaskRun.model_validate({**header, "record": None, "evaluated_at": None})
        try:
            return TaskResult(stated, read_samples(samples))
        except ResultsError as error:
            raise ConflictError(f"{run.reference} cannot be compared: {error}") from error

    def create_namespace(self, name: str, description: str = "") -> Namespace:
        check_name(ExpertName(name, name))
        _text("description", description)
        with self.database.write() as session:
            return namespaces.create(session, self.actor, name, description)

    def list_namespaces(self, *, cursor: str | None = None, limit: int = 50) -> Page[Namespace]:
        with self.database.read() as session:
            return namespaces.list_namespaces(session, cursor=cursor, limit=limit)

    def put_base_model(
        self, fingerprint: str, id: str, revision: str | None, targets: Mapping[str, int]
    ) -> BaseModelInfo:
        _text("id", id)
        if len(revision or "") > _LABEL:
            raise InvalidRequestError(f"revision: {len(revision or '')} characters, the limit is {_LABEL}")
        _text("revision", revision or "")
        with self.database.write() as session:
            try:
                return base_models.put(session, self.actor, fingerprint, id, revision, targets)
            except pydantic.ValidationError as error:
                raise InvalidRequestError(
                    "base model: give its fingerprint of 64 hex digits and an id of 1 to 200 characters"
                ) from error

    def get_base_model(self, fingerprint: str) -> BaseModelInfo:
        if not is_digest(fingerprint):
            raise NotFoundError(f"there is no base model with the fingerprint {fingerprint[:80]!r}")
        with self.database.read() as session:
            return base_models.shape(base_models.find(session, fingerprint))

    def list_base_models(self, *, cursor: str | None = None, limit: int = 50) -> Page[BaseModelInfo]:
        with self.database.read() as session:
            return base_models.list_base_models(session, cursor=cursor, limit=limit)

    def create_token(self, name: str, scopes: Sequence[Scope], *, days: float | None = None) -> NewToken:
        with self.database.write() as session:
            return tokens.create(session, self.actor, name, scopes, days)

    def list_tokens(self) -> Sequence[TokenInfo]:
        with self.database.read() as session:
            return tokens.list_tokens(session)

    def revoke_token(self, id: int) -> TokenInfo:
        with self.database.write() as session:
            return tokens.revoke(session, self.actor, id)

    def audit(self, *, cursor: str | None = None, limit: int = 50) -> Page[AuditEntry]:
        with self.database.read() as session:
            return audit.list_entries(session, cursor=cursor, limit=limit)

    def check(self) -> None:
        """Return when database and store can be used.

        Raises:
            UnavailableError: one of them cannot.
        """
        with self.database.read() as session:
            session.connection().exec_driver_sql("SELECT 1")
        self.store.check()

    def close(self) -> None:
        self.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _text(what: str, value: str) -> None:
    if len(value) > _TEXT:
        raise InvalidRequestError(f"{what}: {len(value)} characters, the limit is {_TEXT}")
    if "\x00" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise InvalidRequestError(f"{what}: it holds a NUL, or a character that is not Unicode")


def _digest(value: str) -> None:
    if not is_digest(value):
        raise NotFoundError("a digest is 64 hex digits in lower case")
