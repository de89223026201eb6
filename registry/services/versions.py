"""Versions: publishing, resolving references, listing, metrics, deletion."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Double, Integer, Row, Select, bindparam, cast, func, literal, null, select, union_all
from sqlalchemy.orm import Session

from t2.core.errors import ConflictError, InvalidRequestError, NotFoundError, nearest
from t2.core.expertfile import ExpertFile
from t2.core.manifest import unpack_hashes
from t2.core.references import PRODUCTION, ExpertName, Reference
from t2.registry.db import models
from t2.registry.db.database import VARIED, insert_once
from t2.registry.db.lookups import any_of, columns
from t2.registry.names import MAX_METRICS, MAX_NUMBER, MAX_VERSION
from t2.registry.schemas import Page, Version, VersionDetail, VersionQuery, known
from t2.registry.services import audit, base_models, experts
from t2.registry.services.actor import Actor, Limits
from t2.registry.services.paging import Order, fetch_page

_VERSION, _EXPERT, _BLOB, _BASE = (
    columns(table) for table in (models.Version, models.Expert, models.Blob, models.BaseModel)
)
_METRIC, _ALIAS, _TAG = (columns(table) for table in (models.Metric, models.Alias, models.Tag))
_FIELDS = {
    "name": _EXPERT.path,
    "version": _VERSION.number,
    "digest": _VERSION.digest,
    "size": _BLOB.size,
    "kind": _VERSION.kind,
    "task": _VERSION.task,
    "domain": _VERSION.domain,
    "method": _VERSION.method,
    "description": _VERSION.description,
    "base_model": _BASE.model_id,
    "base_fingerprint": _BASE.fingerprint,
    "matrices": _VERSION.matrices,
    "values": _VERSION["values"],
    "training_docs": _VERSION.training_docs,
    "created_at": _VERSION.created_at,
    "created_by": _VERSION.created_by,
    "deleted_at": _VERSION.deleted_at,
}
"""The fields of a version that are columns, in their order in a row, after its two ids."""
_JOINED = (
    select(_VERSION.id, _VERSION.expert_id, *_FIELDS.values())
    .join_from(models.Version.__table__, models.Expert.__table__, _VERSION.expert_id == _EXPERT.id)
    .join(models.Blob.__table__, _VERSION.digest == _BLOB.digest)
    .join(models.BaseModel.__table__, _VERSION.base_model_id == _BASE.id)
)
_ALIVE = _EXPERT.deleted_at.is_(None), _VERSION.deleted_at.is_(None)
_RESOLVED = _JOINED.add_columns(_VERSION.manifest).where(*_ALIVE)
_LIVE_ID = (
    select(_VERSION.id)
    .join_from(models.Version.__table__, models.Expert.__table__, _VERSION.expert_id == _EXPERT.id)
    .where(*_ALIVE, _EXPERT.path == bindparam("path"), _VERSION.number == bindparam("version"))
)
_BY_ID = _JOINED.where(_VERSION.id == bindparam("id"))
_OF_EXPERT = _JOINED.where(_VERSION.expert_id == bindparam("expert"))
_SAME = select(models.Version).where(
    models.Version.expert_id == bindparam("expert"), models.Version.digest == bindparam("digest")
)
_BY_NUMBER = Order(models.Version.number, models.Version.number, descending=True)
_NAMED = _RESOLVED.where(_EXPERT.path == bindparam("path"))
_ALIASED = (
    select(_ALIAS.number)
    .where(_ALIAS.expert_id == _EXPERT.id, _ALIAS.alias == bindparam("alias"))
    .correlate(models.Expert.__table__)
    .scalar_subquery()
)
_RESOLVING = {
    "content": _RESOLVED.where(_VERSION.digest == bindparam("digest")).order_by(_VERSION.id).limit(1),
    "digest": _NAMED.where(_VERSION.digest == bindparam("digest")),
    "version": _NAMED.where(_VERSION.number == bindparam("version")),
    "alias": _NAMED.where(_VERSION.number == _ALIASED),
    "default": _NAMED.where(_VERSION.number == func.coalesce(_ALIASED, _EXPERT.latest)),
}
"""How a reference is looked up, by what it names a version with."""
_LATEST = _JOINED.where(any_of(_VERSION.expert_id, "experts"), _VERSION.number == _EXPERT.latest)
_NEWEST = (
    _JOINED.add_columns(_VERSION.base_model_id)
    .where(_VERSION.expert_id == bindparam("expert"), _VERSION.deleted_at.is_(None))
    .order_by(_VERSION.number.desc())
    .limit(1)
)
_DETAILS = (
    select(literal("metric"), _METRIC.version_id, cast(null(), Integer), _METRIC.name, _METRIC.value).where(
        any_of(_METRIC.version_id, "versions")
    ),
    select(literal("alias"), _ALIAS.expert_id, _ALIAS.number, _ALIAS.alias, cast(null(), Double)).where(
        any_of(_ALIAS.expert_id, "experts")
    ),
    select(literal("tag"), _TAG.expert_id, cast(null(), Integer), _TAG.tag, cast(null(), Double)).where(
        any_of(_TAG.expert_id, "experts")
    ),
)
_OF_VERSIONS, _OF_EXPERTS = union_all(*_DETAILS[:2]), union_all(*_DETAILS)


def publish(
    session: Session,
    actor: Actor,
    name: ExpertName,
    file: ExpertFile,
    *,
    description: str,
    key: str | None,
    request: str,
    limits: Limits,
) -> Version:
    """Make a version of a file whose bytes are in the store already.

    Args:
        key: the idempotency key.
        request: digest of everything the client asked for under it.

    Raises:
        ConflictError: as :meth:`~t2.registry.client.base.RegistryClient.publish`.
            Also if the expert has used up its version numbers.
        InvalidRequestError: the ranks differ from the base model's.
    """
    expert = experts.ensure(session, actor, name, file.manifest.kind)
    at = audit.now()
    if key is not None:
        earlier = _earlier(session, actor, key, request, limits)
        if earlier is not None:
            return earlier
    base = base_models.ensure(session, file.manifest.base)
    base_models.check_ranks(base, file.manifest)
    same = session.scalar(_SAME, {"expert": expert.id, "digest": file.digest})
    if same is not None and same.deleted_at is not None:
        raise ConflictError(f"{name}@{same.number} has this content and is deleted; restore it instead")
    published = None
    if same is None:
        number = expert.last + 1
        if number > MAX_VERSION:
            raise ConflictError(f"{name} has used its last version number, {MAX_VERSION}; upload under another name")
        same = insert(
            session,
            expert,
            base,
            file,
            number=number,
            description=description,
            created_at=at,
            created_by=str(actor),
        )
        audit.record(session, actor, "version.create", f"{name}@{number}", digest=file.digest)
        published = experts.refresh(session, expert, live=1, last=number)
    if key is not None:
        session.add(
            models.IdempotencyKey(subject=str(actor), key=key, request=request, version_id=same.id, created_at=at)
        )
    return published or get(session, name, same.number).model_copy(update={"created": False})


def find(session: Session, name: ExpertName, number: int, *, deleted: bool = False) -> models.Version:
    """A version's row.

    Raises:
        NotFoundError: there is none.
    """
    found = None
    if 1 <= number <= MAX_NUMBER:
        found = session.execute(
            select(models.Version, models.Expert.deleted_at)
            .join(models.Expert, models.Version.expert_id == models.Expert.id)
            .where(models.Expert.path == str(name), models.Version.number == number)
        ).one_or_none()
    if found is None or (found[1] is not None and not deleted):
        experts.find(session, name, deleted=deleted)
        raise NotFoundError(f"there is no version {number} of {name}")
    row = found[0]
    if row.deleted_at is not None and not deleted:
        raise NotFoundError(f"{name}@{number} is deleted; it can be restored")
    return row


def live_id(reader: Session | Connection, name: ExpertName, number: int) -> int | None:
    """The id of a version that is not deleted; None where there is none."""
    found: int | None = None
    if 1 <= number <= MAX_NUMBER:
        found = reader.scalar(_LIVE_ID, {"path": str(name), "version": number})
    return found


def id_of(session: Session, name: ExpertName, number: int) -> int:
    """The id of a version that is not deleted.

    Raises:
        NotFoundError: there is none, and why.
    """
    found = live_id(session, name, number)
    return found if found is not None else find(session, name, number).id


def get(session: Session, name: ExpertName, number: int) -> Version:
    """A version that is not deleted."""
    return shape(session, session.execute(_BY_ID, {"id": id_of(session, name, number)}).all())[0]


def resolve(session: Session, reference: Reference) -> VersionDetail:
    """The version that a reference means.

    Raises:
        NotFoundError: there is none.
    """
    values: dict[str, Any]
    if reference.expert is None:
        how, values = "content", {"digest": reference.digest}
    else:
        values = {"path": str(reference.expert)}
        if reference.digest is not None:
            how, values["digest"] = "digest", reference.digest
        elif reference.version is not None:
            how, values["version"] = "version", min(reference.version, MAX_NUMBER)
        else:
            how = "default" if reference.alias is None else "alias"
            values["alias"] = PRODUCTION if reference.alias is None else reference.alias
    rows = session.execute(_RESOLVING[how], values).all()
    if not rows:
        raise _unresolved(session, reference)
    return known(VersionDetail, {**vars(shape(session, rows)[0]), "manifest": rows[0].manifest})


def list_versions(session: Session, name: ExpertName, *, cursor: str | None, limit: int) -> Page[Version]:
    """Versions of one expert, newest first."""
    expert_id = experts.id_of(session, name)
    rows, next_cursor = fetch_page(
        session,
        _OF_EXPERT,
        _BY_NUMBER,
        query=["versions", expert_id],
        cursor=cursor,
        limit=limit,
        position=lambda row: (row.number, row.number),
        values={"expert": expert_id},
        kept=True,
    )
    return Page(items=shape(session, rows), next=next_cursor)


def search(session: Session, query: VersionQuery, *, cursor: str | None, limit: int) -> Page[Version]:
    """Versions of all experts, newest first."""
    statement = joined().where(models.Expert.deleted_at.is_(None), models.Version.deleted_at.is_(None))
    if query.fingerprint is not None:
        statement = statement.where(models.Version.base_model_id.in_(base_models.ids_of(session, query.fingerprint)))
    for column, wanted in (
        (models.Version.kind, query.kind),
        (models.Version.domain, query.domain),
        (models.Version.digest, query.digest),
    ):
        if wanted is not None:
            statement = statement.where(column == wanted)
    if query.alias is not None:
        statement = statement.join(
            models.Alias,
            (models.Alias.expert_id == models.Version.expert_id) & (models.Alias.number == models.Version.number),
        ).where(models.Alias.alias == query.alias)
    rows, next_cursor = fetch_page(
        session,
        statement.execution_options(**{VARIED: True}),
        Order(models.Version.id, models.Version.id, descending=True),
        query=["search", query.model_dump(mode="json")],
        cursor=cursor,
        limit=limit,
        position=lambda row: (row.id, row.id),
    )
    return Page(items=shape(session, rows), next=next_cursor)


def set_metrics(session: Session, actor: Actor, name: ExpertName, number: int, metrics: Mapping[str, float]) -> Version:
    """Set metrics of a version.

    Raises:
        InvalidRequestError: one is not finite, or there would be more than 100.
    """
    expert = experts.find(session, name, lock=True)
    version = find(session, name, number)
    for key, value in metrics.items():
        if not abs(value) <= sys.float_info.max:
            raise InvalidRequestError(f"metric {key}: it is not a finite number")
        if not insert_once(session, models.Metric, version_id=version.id, name=key, value=value):
            session.merge(models.Metric(version_id=version.id, name=key, value=value))
    session.flush()
    if (
        len(session.scalars(select(models.Metric.name).where(models.Metric.version_id == version.id)).all())
        > MAX_METRICS
    ):
        raise InvalidRequestError(f"{name}@{number} would have more than {MAX_METRICS} metrics")
    experts.refresh(session, expert)
    audit.record(session, actor, "version.metrics", f"{name}@{number}", metrics=dict(metrics))
    return get(session, name, number)


def delete(session: Session, actor: Actor, name: ExpertName, number: int | None) -> None:
    """Mark a version or an expert as deleted.

    Raises:
        ConflictError: an alias points to the version.
    """
    expert = experts.find(session, name, lock=True)
    if number is None:
        expert.deleted_at = at = audit.now()
        experts.refresh(session, expert, at=at)
        audit.record(session, actor, "expert.delete", str(name))
        return
    version = find(session, name, number)
    aliases = session.scalars(
        select(models.Alias.alias).where(models.Alias.expert_id == expert.id, models.Alias.number == number)
    ).all()
    if aliases:
        raise ConflictError(f"{name}@{number} is what the alias {aliases[0]} points to; move or remove the alias first")
    version.deleted_at = audit.now()
    experts.refresh(session, expert, live=-1)
    audit.record(session, actor, "version.delete", f"{name}@{number}")


def restore(session: Session, actor: Actor, name: ExpertName, number: int | None) -> None:
    """Undo :func:`delete`; nothing happens where it is not deleted."""
    expert = experts.find(session, name, deleted=number is None, lock=True)
    if number is None:
        if expert.deleted_at is not None:
            expert.deleted_at = None
            experts.refresh(session, expert)
            audit.record(session, actor, "expert.restore", str(name))
        return
    version = find(session, name, number, deleted=True)
    if version.deleted_at is not None:
        version.deleted_at = None
        experts.refresh(session, expert, live=1)
        audit.record(session, actor, "version.restore", f"{name}@{number}")


def joined() -> Select[*tuple[Any, ...]]:
    """Versions with what :func:`shape` needs from other tables, and without their manifests, which are large."""
    return _JOINED


def latest(session: Session | Connection, experts: Sequence[int]) -> tuple[dict[int, Version], dict[int, list[str]]]:
    """The latest versions and the tags of experts, by the experts' ids; those without any are not there."""
    rows = session.execute(_LATEST, {"experts": experts}).all()
    tags: dict[int, list[str]] = {}
    found = _shape(rows, session.execute(_OF_EXPERTS, {"versions": [row.id for row in rows], "experts": experts}), tags)
    return {row.expert_id: version for row, version in zip(rows, found, strict=True)}, tags


def newest(session: Session, expert_id: int) -> tuple[Version | None, int | None, Sequence[str]]:
    """The latest version of an expert that is not deleted, the id of its base model, and the expert's tags."""
    rows = session.execute(_NEWEST, {"expert": expert_id}).all()
    tags: dict[int, list[str]] = {}
    ids = {"versions": [row.id for row in rows], "experts": [expert_id]}
    found = _shape(rows, session.execute(_OF_EXPERTS, ids), tags)
    return (found[0] if found else None), (rows[0].base_model_id if rows else None), tags.get(expert_id, ())


def shape(session: Session, rows: Sequence[Row[*tuple[Any, ...]]]) -> list[Version]:
    """Versions as clients see them, in one more query however many they are."""
    if not rows:
        return []
    ids = {"versions": [row.id for row in rows], "experts": list({row.expert_id for row in rows})}
    return _shape(rows, session.execute(_OF_VERSIONS, ids), {})


def _shape(
    rows: Sequence[Row[*tuple[Any, ...]]], details: Iterable[Row[*tuple[Any, ...]]], tags: dict[int, list[str]]
) -> list[Version]:
    """Put rows of versions and the details of them together; the tags of experts go into ``tags``."""
    metrics: dict[int, dict[str, float]] = {row.id: {} for row in rows}
    aliases: dict[tuple[int, int], list[str]] = {}
    for what, of, number, name, value in details:
        if what == "metric":
            metrics[of][name] = value
        elif what == "alias":
            aliases.setdefault((of, number), []).append(name)
        else:
            tags.setdefault(of, []).append(name)
    found = []
    for row in rows:
        version_id, expert_id, *fields = row
        values: dict[str, Any] = dict(zip(_FIELDS, fields, strict=False))
        values["aliases"] = tuple(sorted(aliases.get((expert_id, values["version"]), ())))
        values["metrics"] = dict(sorted(metrics[version_id].items()))
        values["created"] = True
        found.append(known(Version, {name: values[name] for name in Version.model_fields}))
    return found


def insert(
    session: Session,
    expert: models.Expert,
    base: models.BaseModel,
    file: ExpertFile,
    *,
    number: int,
    description: str,
    created_at: datetime,
    created_by: str,
    deleted_at: datetime | None = None,
) -> models.Version:
    """Make a version's row and those of its parents, with what its file says of it; the expert is then refreshed."""
    manifest = file.manifest
    summary: dict[str, Any] = manifest.model_dump(mode="json", exclude={"training_docs"})
    version = models.Version(
        expert_id=expert.id,
        number=number,
        digest=file.digest,
        kind=manifest.kind,
        base_model_id=base.id,
        task=manifest.task,
        domain=manifest.domain,
        method=manifest.method,
        description=description,
        matrices=len(manifest.targets),
        values=sum(manifest.targets.values()),
        training_docs=len(unpack_hashes(manifest.training_docs)),
        manifest=summary,
        created_at=created_at,
        created_by=created_by,
        deleted_at=deleted_at,
    )
    session.add(version)
    session.flush()
    session.add_all(
        models.Parent(version_id=version.id, position=position, digest=parent.digest, alpha=parent.alpha)
        for position, parent in enumerate(manifest.parents)
    )
    return version


def _earlier(session: Session, actor: Actor, key: str, request: str, limits: Limits) -> Version | None:
    """What the same upload under the same key made, if it was not too long ago."""
    row = session.get(models.IdempotencyKey, (str(actor), key))
    if row is None:
        return None
    if audit.now() - row.created_at > timedelta(hours=limits.idempotency_hours):
        session.delete(row)
        session.flush()
        return None
    if row.request != request:
        raise ConflictError("the idempotency key was used for another upload; use a new key for each")
    statement = joined().where(models.Version.id == row.version_id)
    version = shape(session, session.execute(statement).all())[0]
    # A version and the key it came to be under have one time.
    return version.model_copy(update={"created": version.created_at == row.created_at})


def _unresolved(session: Session, reference: Reference) -> NotFoundError:
    """Why a reference means nothing."""
    if reference.expert is not None:
        expert = experts.find(session, reference.expert)
        if reference.version is not None:
            find(session, reference.expert, reference.version)
        elif reference.alias is not None:
            aliases = session.scalars(select(models.Alias.alias).where(models.Alias.expert_id == expert.id))
            missing = f"{expert.path} has no alias {reference.alias}{nearest(reference.alias, aliases)}"
            return NotFoundError(missing)
        elif reference.digest is None:
            return NotFoundError(f"all versions of {expert.path} are deleted")
    return NotFoundError(f"there is no version {reference}")
