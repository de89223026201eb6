"""Cards: all that a list tells of an expert, in its row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_BATCH = 1000
_UTC = sa.DateTime(timezone=True)
_EXPERT = sa.table(
    "expert",
    *(sa.column(name) for name in ("id", "path", "kind", "description", "live", "latest", "card")),
    *(sa.column(name, _UTC) for name in ("created_at", "updated_at", "deleted_at", "carded_at")),
)
_VERSION = sa.table(
    "version",
    *(sa.column(name) for name in ("id", "expert_id", "number", "digest", "kind", "base_model_id", "task", "domain")),
    *(sa.column(name) for name in ("method", "description", "matrices", "values", "training_docs", "created_by")),
    *(sa.column(name, _UTC) for name in ("created_at", "deleted_at")),
)
_BLOB = sa.table("blob", sa.column("digest"), sa.column("size"))
_BASE = sa.table("base_model", sa.column("id"), sa.column("model_id"), sa.column("fingerprint"))
_METRIC = sa.table("metric", sa.column("version_id"), sa.column("name"), sa.column("value"))
_ALIAS = sa.table("alias", sa.column("expert_id"), sa.column("number"), sa.column("alias"))
_TAG = sa.table("tag", sa.column("expert_id"), sa.column("tag"))


def upgrade() -> None:
    op.add_column("expert", sa.Column("card", sa.Text()))
    op.add_column("expert", sa.Column("carded_at", _UTC))
    connection = op.get_bind()
    write = (
        sa.update(_EXPERT)
        .where(_EXPERT.c.id == sa.bindparam("expert"))
        .values(card=sa.bindparam("made"), carded_at=_EXPERT.c.updated_at)
    )
    last = 0
    while experts := connection.execute(
        sa.select(_EXPERT).where(_EXPERT.c.id > last).order_by(_EXPERT.c.id).limit(_BATCH)
    ).all():
        last = experts[-1].id
        connection.execute(write, [{"expert": row, "made": card} for row, card in _cards(connection, experts)])


def downgrade() -> None:
    op.drop_column("expert", "carded_at")
    op.drop_column("expert", "card")


def _cards(connection: sa.Connection, experts: Sequence[Any]) -> Iterator[tuple[int, str]]:
    # The ids of a batch are a range: no list of them has to go with each query.
    span = (experts[0].id, experts[-1].id)
    latest = {
        row.expert_id: row
        for row in connection.execute(
            sa.select(_VERSION, _BLOB.c.size, _BASE.c.model_id, _BASE.c.fingerprint)
            .join_from(
                _VERSION, _EXPERT, (_VERSION.c.expert_id == _EXPERT.c.id) & (_VERSION.c.number == _EXPERT.c.latest)
            )
            .join(_BLOB, _BLOB.c.digest == _VERSION.c.digest)
            .join(_BASE, _BASE.c.id == _VERSION.c.base_model_id)
            .where(_EXPERT.c.id.between(*span))
        )
    }
    metrics: dict[int, dict[str, float]] = {}
    of_latest = (_METRIC.c.version_id == _VERSION.c.id) & _VERSION.c.expert_id.between(*span)
    for version, name, value in connection.execute(
        sa.select(_METRIC).join(_VERSION, of_latest).order_by(_METRIC.c.name)
    ):
        metrics.setdefault(version, {})[name] = value
    aliases: dict[tuple[int, int], list[str]] = {}
    for expert, number, alias in connection.execute(sa.select(_ALIAS).where(_ALIAS.c.expert_id.between(*span))):
        aliases.setdefault((expert, number), []).append(alias)
    tags: dict[int, list[str]] = {}
    for expert, tag in connection.execute(sa.select(_TAG).where(_TAG.c.expert_id.between(*span))):
        tags.setdefault(expert, []).append(tag)
    for row in experts:
        version = latest.get(row.id)
        card = {
            "name": row.path,
            "kind": row.kind,
            "description": row.description,
            "tags": sorted(tags.get(row.id, ())),
            "versions": row.live,
            "latest": None,
            "created_at": _time(row.created_at),
            "updated_at": _time(row.updated_at),
            "deleted_at": _time(row.deleted_at),
        }
        if version is not None:
            card["latest"] = {
                "name": row.path,
                "version": version.number,
                "digest": version.digest,
                "size": version.size,
                "kind": version.kind,
                "task": version.task,
                "domain": version.domain,
                "method": version.method,
                "description": version.description,
                "base_model": version.model_id,
                "base_fingerprint": version.fingerprint,
                "matrices": version.matrices,
                "values": version.values,
                "training_docs": version.training_docs,
                "aliases": sorted(aliases.get((row.id, version.number), ())),
                "metrics": dict(sorted(metrics.get(version.id, {}).items())),
                "created_at": _time(version.created_at),
                "created_by": version.created_by,
                "deleted_at": _time(version.deleted_at),
                "created": True,
            }
        yield row.id, json.dumps(card, ensure_ascii=False, separators=(",", ":"))


def _time(value: datetime | None) -> str | None:
    if value is None:
        return None
    value = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    return value.isoformat().replace("+00:00", "Z")
