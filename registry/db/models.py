"""The registry's tables. What must always hold is a constraint here, not a habit of the code above.

A change here needs a migration in ``migrations/versions``; a test compares the two.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

_PATH = String(129).with_variant(String(129, collation="C"), "postgresql")
"""Sorted by code point on both databases."""
_LABEL = String(200)
_HEX = String(64)
_DELETED = text("deleted_at IS NOT NULL")
_PURGED = text("action = 'expert.purge'")


class Utc(TypeDecorator[datetime]):
    """A point in time; naive in SQLite, which has no zones, and always aware and in UTC here."""

    impl = DateTime(timezone=True)
    cache_ok = True

    @property
    def python_type(self) -> type[datetime]:
        return datetime

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:  # astimezone would assume the local time zone
            raise ValueError("a time without an offset from UTC")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Table(DeclarativeBase):
    """Base of all tables; constraints have names, so that migrations can speak of them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - declared so by SQLAlchemy
        datetime: Utc,
        dict[str, Any]: JSON,
        dict[str, int]: JSON,
        float: Double,
        str: Text,
    }


class Namespace(Table):
    __tablename__ = "namespace"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(_PATH, unique=True)
    description: Mapped[str]
    created_at: Mapped[datetime]


class BaseModel(Table):
    """A base model; ``targets`` is NULL while nobody has told them."""

    __tablename__ = "base_model"

    id: Mapped[int] = mapped_column(primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64), unique=True)
    model_id: Mapped[str] = mapped_column(String(200), index=True)
    revision: Mapped[str | None]
    targets: Mapped[dict[str, int] | None] = mapped_column(JSON(none_as_null=True))
    created_at: Mapped[datetime]

    __table_args__ = (CheckConstraint("length(fingerprint) = 64", name="fingerprint"),)


class Blob(Table):
    """Bytes in the store. The row comes before the bytes and goes after them; see ``services/blobs.py``.

    ``touched_at`` is when an upload last meant to use it: the collection of garbage leaves it alone for a while then.
    """

    __tablename__ = "blob"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    size: Mapped[int]
    created_at: Mapped[datetime]
    touched_at: Mapped[datetime] = mapped_column(index=True)

    __table_args__ = (CheckConstraint("length(digest) = 64", name="digest"), CheckConstraint("size > 0", name="size"))


def _live(name: str, *columns: str) -> Index:
    """An index of experts that are not deleted: nearly all lists are of them alone."""
    where = text("deleted_at IS NULL")
    return Index(name, *columns, postgresql_where=where, sqlite_where=where)


class Expert(Table):
    """A name, and copies of what lists go by from its latest live version, so that a page needs one index.

    ``latest`` is the number of that version, NULL when all are deleted; ``last`` the highest number ever given.
    ``card`` is all that a list tells of the expert, as JSON, so that a page needs one table too; it holds where
    ``carded_at`` is ``updated_at`` (see ``services/cards.py``). On PostgreSQL there is one index more, of the trigrams
    of ``search_text``, where the extension for it may be created.
    """

    __tablename__ = "expert"

    id: Mapped[int] = mapped_column(primary_key=True)
    namespace_id: Mapped[int] = mapped_column(ForeignKey("namespace.id"))
    name: Mapped[str] = mapped_column(String(64))
    path: Mapped[str] = mapped_column(_PATH, unique=True)
    kind: Mapped[str] = mapped_column(String(16))
    description: Mapped[str]
    search_text: Mapped[str]
    last: Mapped[int]
    live: Mapped[int]
    latest: Mapped[int | None]
    task: Mapped[str | None]
    domain: Mapped[str | None]
    base_model_id: Mapped[int | None] = mapped_column(ForeignKey("base_model.id"))
    score: Mapped[float | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None]
    card: Mapped[str | None] = mapped_column(deferred=True)
    carded_at: Mapped[datetime | None]

    namespace: Mapped[Namespace] = relationship(lazy="raise")

    __table_args__ = (
        UniqueConstraint("namespace_id", "name"),
        CheckConstraint("kind IN ('expert', 'classifier', 'mixture')", name="kind"),
        CheckConstraint("last >= 0 AND live >= 0 AND live <= last", name="counts"),
        _live("ix_expert_updated", "updated_at", "id"),
        _live("ix_expert_created", "created_at", "id"),
        _live("ix_expert_score", "score", "id"),
        _live("ix_expert_base_score", "base_model_id", "score", "id"),
        _live("ix_expert_namespace_updated", "namespace_id", "updated_at", "id"),
        _live("ix_expert_base_updated", "base_model_id", "updated_at", "id"),
        _live("ix_expert_task_updated", "task", "updated_at", "id"),
        _live("ix_expert_domain_updated", "domain", "updated_at", "id"),
        _live("ix_expert_kind_updated", "kind", "updated_at", "id"),
        Index("ix_expert_deleted", "updated_at", "id", postgresql_where=_DELETED, sqlite_where=_DELETED),
    )


class PurgedExpert(Table):
    """A name whose expert was purged; ``last`` is the highest version number it ever had.

    No new version gets a number up to ``last``, or a reference such as ``team/math@3`` would change its meaning.
    """

    __tablename__ = "purged_expert"

    path: Mapped[str] = mapped_column(_PATH, primary_key=True)
    last: Mapped[int]

    __table_args__ = (CheckConstraint("last >= 0", name="last"),)


class Version(Table):
    """One immutable version. Its blob cannot go while it is here.

    ``manifest`` is kilobytes, and read only where it is asked for.
    """

    __tablename__ = "version"

    id: Mapped[int] = mapped_column(primary_key=True)
    expert_id: Mapped[int] = mapped_column(ForeignKey("expert.id"))
    number: Mapped[int]
    digest: Mapped[str] = mapped_column(ForeignKey("blob.digest"), index=True)
    kind: Mapped[str] = mapped_column(String(16))
    base_model_id: Mapped[int] = mapped_column(ForeignKey("base_model.id"))
    task: Mapped[str | None]
    domain: Mapped[str | None]
    method: Mapped[str | None]
    description: Mapped[str]
    matrices: Mapped[int]
    values: Mapped[int]
    training_docs: Mapped[int]
    manifest: Mapped[dict[str, Any]] = mapped_column(deferred=True)
    created_at: Mapped[datetime]
    created_by: Mapped[str]
    deleted_at: Mapped[datetime | None]

    expert: Mapped[Expert] = relationship(lazy="raise")
    blob: Mapped[Blob] = relationship(lazy="raise")
    base_model: Mapped[BaseModel] = relationship(lazy="raise")

    __table_args__ = (
        UniqueConstraint("expert_id", "number"),
        UniqueConstraint("expert_id", "digest"),
        CheckConstraint("number >= 1", name="number"),
        Index("ix_version_base", "base_model_id", "kind", "id"),
        Index("ix_version_base_domain", "base_model_id", "domain", "id"),
        Index("ix_version_kind", "kind", "id"),
        Index("ix_version_domain", "domain", "id"),
    )


class Metric(Table):
    """A number about a version."""

    __tablename__ = "metric"

    version_id: Mapped[int] = mapped_column(ForeignKey("version.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    value: Mapped[float]

    __table_args__ = (Index("ix_metric_name_value", "name", "value", "version_id"),)


class Parent(Table):
    """What a version was mixed of; the parent's content may be unknown here, so it is named by digest."""

    __tablename__ = "parent"

    version_id: Mapped[int] = mapped_column(ForeignKey("version.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), index=True)
    alpha: Mapped[float]


class Tag(Table):
    __tablename__ = "tag"

    expert_id: Mapped[int] = mapped_column(ForeignKey("expert.id", ondelete="CASCADE"), primary_key=True)
    tag: Mapped[str] = mapped_column(String(100), primary_key=True)

    __table_args__ = (Index("ix_tag_tag", "tag", "expert_id"),)


class Alias(Table):
    """Where an alias points: to a version of the same expert, which the foreign key sees to."""

    __tablename__ = "alias"

    expert_id: Mapped[int] = mapped_column(primary_key=True)
    alias: Mapped[str] = mapped_column(String(63), primary_key=True)
    number: Mapped[int]
    updated_at: Mapped[datetime]
    updated_by: Mapped[str]

    __table_args__ = (
        ForeignKeyConstraint(["expert_id", "number"], ["version.expert_id", "version.number"], name="fk_alias_version"),
        Index("ix_alias_alias", "alias", "expert_id"),
    )


class AliasEvent(Table):
    """The history of aliases; rows are only ever added. ``number`` is NULL for a removal."""

    __tablename__ = "alias_event"

    id: Mapped[int] = mapped_column(primary_key=True)
    expert_id: Mapped[int] = mapped_column(ForeignKey("expert.id", ondelete="CASCADE"))
    alias: Mapped[str] = mapped_column(String(63))
    number: Mapped[int | None]
    previous: Mapped[int | None]
    at: Mapped[datetime]
    by: Mapped[str]
    reason: Mapped[str]

    __table_args__ = (Index("ix_alias_event_expert", "expert_id", "id"),)


class CurvePoint(Table):
    __tablename__ = "curve_point"

    version_id: Mapped[int] = mapped_column(ForeignKey("version.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    split: Mapped[str] = mapped_column(String(16), primary_key=True)
    reward: Mapped[float]
    score: Mapped[float]
    kl: Mapped[float | None]
    learning_rate: Mapped[float | None]
    gradient_norm: Mapped[float | None]
    seconds: Mapped[float]

    __table_args__ = (CheckConstraint("split IN ('train', 'validation')", name="split"),)


class Board(Table):
    """Runs that can be compared: one task version, number of shots, set of documents and model.

    ``base`` is the model's identity if its runs have one, else its name; ``base_name`` is the name.
    """

    __tablename__ = "board"

    id: Mapped[int] = mapped_column(primary_key=True)
    task: Mapped[str] = mapped_column(_LABEL)
    task_version: Mapped[str] = mapped_column(_LABEL)
    n_shot: Mapped[int]
    base: Mapped[str] = mapped_column(_LABEL)
    base_name: Mapped[str | None] = mapped_column(_LABEL)
    docs: Mapped[int]
    docs_digest: Mapped[str] = mapped_column(_HEX)

    __table_args__ = (
        UniqueConstraint("task", "base", "task_version", "n_shot", "docs_digest", name="uq_board_key"),
        UniqueConstraint("id", "task", "base", name="uq_board_copies"),
        CheckConstraint("n_shot >= 0", name="n_shot"),
        CheckConstraint("docs >= 1", name="docs"),
        CheckConstraint("length(docs_digest) = 64", name="docs_digest"),
        Index("ix_board_base_name", "base_name", "id"),
    )


class Run(Table):
    """One task of one evaluation. Its samples cannot go while it is here.

    ``task`` and ``base`` are copies of the board's, for the indexes of lists; a foreign key sees to it that they agree.
    ``header`` is all that was told of the run, as canonical JSON, and read only where it is asked for.
    """

    __tablename__ = "run"

    id: Mapped[int] = mapped_column(primary_key=True)
    namespace_id: Mapped[int] = mapped_column(ForeignKey("namespace.id"))
    digest: Mapped[str] = mapped_column(_HEX, index=True)
    board_id: Mapped[int]
    task: Mapped[str] = mapped_column(_LABEL)
    base: Mapped[str] = mapped_column(_LABEL)
    base_name: Mapped[str | None] = mapped_column(_LABEL)
    base_revision: Mapped[str | None] = mapped_column(_LABEL)
    base_model_id: Mapped[int | None] = mapped_column(ForeignKey("base_model.id"))
    samples: Mapped[str] = mapped_column(ForeignKey("blob.digest"), index=True)
    prompts_digest: Mapped[str] = mapped_column(_HEX)
    model: Mapped[str] = mapped_column(_LABEL)
    strategy: Mapped[str] = mapped_column(_LABEL)
    control: Mapped[str] = mapped_column(_LABEL)
    seed: Mapped[int | None] = mapped_column(BigInteger)
    record_digest: Mapped[str | None] = mapped_column(_HEX)
    header: Mapped[str] = mapped_column(deferred=True)
    evaluated_at: Mapped[datetime | None]
    created_at: Mapped[datetime]
    created_by: Mapped[str]

    __table_args__ = (
        ForeignKeyConstraint(
            ["board_id", "task", "base"], ["board.id", "board.task", "board.base"], name="fk_run_board"
        ),
        UniqueConstraint("namespace_id", "digest"),
        UniqueConstraint("id", "board_id", name="uq_run_board"),
        CheckConstraint("length(digest) = 64", name="digest"),
        CheckConstraint("length(prompts_digest) = 64", name="prompts_digest"),
        CheckConstraint("record_digest IS NULL OR length(record_digest) = 64", name="record_digest"),
        Index("ix_run_board", "board_id", "id"),
        Index("ix_run_namespace", "namespace_id", "id"),
        Index("ix_run_task", "task", "id"),
        Index("ix_run_base", "base", "id"),
        Index("ix_run_base_name", "base_name", "id"),
        Index("ix_run_base_model", "base_model_id", "id"),
    )


class RunScore(Table):
    """A score of a run; an index sorts a board's scores, confirmed ones first, then the best."""

    __tablename__ = "run_score"

    run_id: Mapped[int] = mapped_column(primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    board_id: Mapped[int]
    metric: Mapped[str] = mapped_column(_LABEL)
    filter: Mapped[str] = mapped_column(_LABEL)
    score: Mapped[float | None]
    stderr: Mapped[float | None]
    low: Mapped[float | None]
    high: Mapped[float | None]
    n: Mapped[int]
    higher_is_better: Mapped[bool]
    confirmed: Mapped[bool] = mapped_column(server_default=false())

    __table_args__ = (
        ForeignKeyConstraint(
            ["run_id", "board_id"], ["run.id", "run.board_id"], name="fk_run_score_run", ondelete="CASCADE"
        ),
        UniqueConstraint("run_id", "metric", "filter"),
        CheckConstraint("n >= 0", name="n"),
        CheckConstraint("(low IS NULL) = (high IS NULL) AND (low IS NULL OR low <= high)", name="interval"),
        Index("ix_run_score_ranked", "board_id", "metric", "filter", "confirmed", "score", "run_id"),
        Index("ix_run_score_first", "board_id", "position", "confirmed", "run_id"),
    )


class RunExpert(Table):
    """An expert of a run, by digest, since the registry may not have its content.

    ``reference`` is the version of a registry by which the run named it, if any.
    """

    __tablename__ = "run_expert"

    run_id: Mapped[int] = mapped_column(ForeignKey("run.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(_HEX)
    name: Mapped[str] = mapped_column(_LABEL)
    domain: Mapped[str | None] = mapped_column(_LABEL)
    reference: Mapped[str | None] = mapped_column(String(300))

    __table_args__ = (
        CheckConstraint("length(digest) = 64", name="digest"),
        Index("ix_run_expert_digest", "digest", "run_id"),
    )


class Token(Table):
    """An access token; of its secret only the SHA-256 is kept."""

    __tablename__ = "token"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    prefix: Mapped[str] = mapped_column(String(16))
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    scopes: Mapped[str] = mapped_column(String(32))
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class AuditEntry(Table):
    """Who did what; rows are only ever added."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime]
    source: Mapped[str] = mapped_column(String(16))
    subject: Mapped[str] = mapped_column(String(100))
    action: Mapped[str] = mapped_column(String(64))
    object: Mapped[str]
    detail: Mapped[dict[str, Any]]

    # Servers of an older t2 read the version numbers of PurgedExpert from here.
    __table_args__ = (Index("ix_audit_purged", "object", "id", postgresql_where=_PURGED, sqlite_where=_PURGED),)


class IdempotencyKey(Table):
    """What an upload under a key did, so that the same upload again does nothing more."""

    __tablename__ = "idempotency_key"

    subject: Mapped[str] = mapped_column(String(100), primary_key=True)
    key: Mapped[str] = mapped_column(String(100), primary_key=True)
    request: Mapped[str] = mapped_column(String(64))
    version_id: Mapped[int] = mapped_column(ForeignKey("version.id", ondelete="CASCADE"))
    created_at: Mapped[datetime] = mapped_column(index=True)
