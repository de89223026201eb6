"""Base models, and the ranks that experts of them must have."""

from __future__ import annotations

from collections.abc import Mapping

import pydantic
from sqlalchemy import Connection, bindparam, or_, select
from sqlalchemy.orm import Session

from t2.core.errors import ConflictError, InvalidRequestError, NotFoundError
from t2.core.manifest import BaseModelRef, Manifest
from t2.registry.db import models
from t2.registry.db.database import insert_once
from t2.registry.schemas import BaseModelInfo, Page, Targets
from t2.registry.services import audit
from t2.registry.services.actor import Actor
from t2.registry.services.paging import Order, fetch_page

_TARGETS = pydantic.TypeAdapter(Targets)
_PRINTED = select(models.BaseModel).where(models.BaseModel.fingerprint == bindparam("fingerprint"))
_IDS = select(models.BaseModel.id).where(
    or_(models.BaseModel.fingerprint == bindparam("base"), models.BaseModel.model_id == bindparam("base"))
)


def ensure(session: Session, base: BaseModelRef) -> models.BaseModel:
    """The base model of an upload, made when new, without targets.

    While there are none it is held as it is until the transaction ends: they are not told between the check of an
    upload's ranks and its commit.
    """
    row = _known(session, base)
    if row.targets is None:
        session.refresh(row, with_for_update={"read": True})
    return row


def put(
    session: Session, actor: Actor, fingerprint: str, id: str, revision: str | None, targets: Mapping[str, int]
) -> BaseModelInfo:
    """Tell the ranks of a base model's matrices.

    Raises:
        ConflictError: other ranks are known already, or a version is there that disagrees with these.
        InvalidRequestError: ``targets`` is empty or exceeds a limit.
    """
    try:
        targets = _TARGETS.validate_python(dict(targets), strict=True)
    except pydantic.ValidationError as error:
        raise InvalidRequestError(
            f"targets: give the rank of each adaptable matrix, each at least 1; {error.errors()[0]['msg']}"
        ) from error
    base = BaseModelRef(id=id, revision=revision, fingerprint=fingerprint)
    row = _known(session, base)
    session.refresh(row, with_for_update=True)
    if row.targets is not None:
        if row.targets != dict(targets):
            raise ConflictError(f"the base model {fingerprint[:12]} has other targets already, and they are immutable")
        return shape(row)
    odd = find_odd_version(session, row, targets)
    if odd is not None:
        raise ConflictError(f"an expert of the base model {fingerprint[:12]} disagrees with these targets: {odd}")
    row.targets = dict(targets)
    audit.record(session, actor, "base-model.put", fingerprint, matrices=len(targets))
    return shape(row)


def find_odd_version(session: Session, row: models.BaseModel, targets: Mapping[str, int]) -> str | None:
    """Describe the first version of a base model that disagrees with targets; None if all agree."""
    versions = select(models.Version.manifest).where(models.Version.base_model_id == row.id)
    for manifest in session.scalars(versions.execution_options(yield_per=500)):
        odd = find_disagreement(manifest["targets"], targets)
        if odd is not None:
            return odd
    return None


def check_ranks(row: models.BaseModel, manifest: Manifest) -> None:
    """Check an upload against the ranks of its base model, where they are known.

    Raises:
        InvalidRequestError: it has a matrix that the base model has not, or of another rank.
    """
    if row.targets is not None:
        odd = find_disagreement(manifest.targets, row.targets)
        if odd is not None:
            raise InvalidRequestError(f"the expert does not fit its base model {row.model_id}: {odd}")


def find(session: Session, fingerprint: str) -> models.BaseModel:
    """Raises NotFoundError where there is none."""
    row = session.scalar(_PRINTED, {"fingerprint": fingerprint})
    if row is None:
        raise NotFoundError(f"there is no base model with the fingerprint {fingerprint}")
    return row


def ids_of(session: Session | Connection, base: str) -> list[int]:
    """The ids of the base models with a fingerprint or an id."""
    return list(session.scalars(_IDS, {"base": base}))


def list_base_models(session: Session, *, cursor: str | None, limit: int) -> Page[BaseModelInfo]:
    """Oldest first."""
    table = models.BaseModel
    rows, next_cursor = fetch_page(
        session,
        select(table),
        Order(table.id, table.id, descending=False),
        query="base-models",
        cursor=cursor,
        limit=limit,
        position=lambda row: (row[0].id, row[0].id),
    )
    return Page(items=[shape(row) for (row,) in rows], next=next_cursor)


def shape(row: models.BaseModel) -> BaseModelInfo:
    """As clients see it."""
    return BaseModelInfo(
        fingerprint=row.fingerprint,
        id=row.model_id,
        revision=row.revision,
        targets=row.targets,
        created_at=row.created_at,
    )


def _known(session: Session, base: BaseModelRef) -> models.BaseModel:
    """Its row, made when new, which it hardly ever is."""
    row = session.scalar(_PRINTED, {"fingerprint": base.fingerprint})
    if row is not None:
        return row
    insert_once(
        session,
        models.BaseModel,
        fingerprint=base.fingerprint,
        model_id=base.id,
        revision=base.revision,
        targets=None,
        created_at=audit.now(),
    )
    return find(session, base.fingerprint)


def find_disagreement(expert: Mapping[str, int], base: Mapping[str, int]) -> str | None:
    """The first matrix of an expert that its base model does not have, or has with another rank."""
    for name, rank in expert.items():
        if base.get(name) != rank:
            return f"{name} has rank {rank}, the base model {base.get(name, 'no such matrix')}"
    return None
