"""Experts, versions, aliases, curves and what belongs to them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "base_model",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("model_id", sa.String(length=200), nullable=False),
        sa.Column("revision", sa.Text(), nullable=True),
        sa.Column("targets", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("length(fingerprint) = 64", name=op.f("ck_base_model_fingerprint")),
        sa.PrimaryKeyConstraint("id", name="pk_base_model"),
        sa.UniqueConstraint("fingerprint", name="uq_base_model_fingerprint"),
    )
    op.create_index("ix_base_model_model_id", "base_model", ["model_id"], unique=False)
    op.create_table(
        "blob",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("touched_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("length(digest) = 64", name=op.f("ck_blob_digest")),
        sa.CheckConstraint("size > 0", name=op.f("ck_blob_size")),
        sa.PrimaryKeyConstraint("digest", name="pk_blob"),
    )
    op.create_index("ix_blob_touched_at", "blob", ["touched_at"], unique=False)
    op.create_table(
        "namespace",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column(
            "name",
            sa.String(length=129).with_variant(sa.String(length=129, collation="C"), "postgresql"),
            nullable=False,
        ),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_namespace"),
        sa.UniqueConstraint("name", name="uq_namespace_name"),
    )
    op.create_table(
        "expert",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("namespace_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column(
            "path",
            sa.String(length=129).with_variant(sa.String(length=129, collation="C"), "postgresql"),
            nullable=False,
        ),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("search_text", sa.Text(), nullable=False),
        sa.Column("last", sa.Integer(), nullable=False),
        sa.Column("live", sa.Integer(), nullable=False),
        sa.Column("latest", sa.Integer(), nullable=True),
        sa.Column("task", sa.Text(), nullable=True),
        sa.Column("domain", sa.Text(), nullable=True),
        sa.Column("base_model_id", sa.Integer(), nullable=True),
        sa.Column("score", sa.Double(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("kind IN ('expert', 'classifier', 'mixture')", name=op.f("ck_expert_kind")),
        sa.CheckConstraint("last >= 0 AND live >= 0 AND live <= last", name=op.f("ck_expert_counts")),
        sa.ForeignKeyConstraint(["base_model_id"], ["base_model.id"], name="fk_expert_base_model_id"),
        sa.ForeignKeyConstraint(["namespace_id"], ["namespace.id"], name="fk_expert_namespace_id"),
        sa.PrimaryKeyConstraint("id", name="pk_expert"),
        sa.UniqueConstraint("namespace_id", "name", name="uq_expert_namespace_id_name"),
        sa.UniqueConstraint("path", name="uq_expert_path"),
    )
    op.create_index("ix_expert_base_updated", "expert", ["base_model_id", "updated_at", "id"], unique=False)
    op.create_index("ix_expert_created", "expert", ["created_at", "id"], unique=False)
    op.create_index("ix_expert_domain_updated", "expert", ["domain", "updated_at", "id"], unique=False)
    op.create_index("ix_expert_kind_updated", "expert", ["kind", "updated_at", "id"], unique=False)
    op.create_index("ix_expert_namespace_updated", "expert", ["namespace_id", "updated_at", "id"], unique=False)
    op.create_index("ix_expert_score", "expert", ["score", "id"], unique=False)
    op.create_index("ix_expert_task_updated", "expert", ["task", "updated_at", "id"], unique=False)
    op.create_index("ix_expert_updated", "expert", ["updated_at", "id"], unique=False)
    op.create_table(
        "alias_event",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("expert_id", sa.Integer(), nullable=False),
        sa.Column("alias", sa.String(length=63), nullable=False),
        sa.Column("number", sa.Integer(), nullable=True),
        sa.Column("previous", sa.Integer(), nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("by", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["expert_id"], ["expert.id"], name="fk_alias_event_expert_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_alias_event"),
    )
    op.create_index("ix_alias_event_expert", "alias_event", ["expert_id", "id"], unique=False)
    op.create_table(
        "tag",
        sa.Column("expert_id", sa.Integer(), nullable=False),
        sa.Column("tag", sa.String(length=100), nullable=False),
        sa.ForeignKeyConstraint(["expert_id"], ["expert.id"], name="fk_tag_expert_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("expert_id", "tag", name="pk_tag"),
    )
    op.create_index("ix_tag_tag", "tag", ["tag", "expert_id"], unique=False)
    op.create_table(
        "version",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("expert_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("base_model_id", sa.Integer(), nullable=False),
        sa.Column("task", sa.Text(), nullable=True),
        sa.Column("domain", sa.Text(), nullable=True),
        sa.Column("method", sa.Text(), nullable=True),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("matrices", sa.Integer(), nullable=False),
        sa.Column("values", sa.Integer(), nullable=False),
        sa.Column("training_docs", sa.Integer(), nullable=False),
        sa.Column("manifest", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("number >= 1", name=op.f("ck_version_number")),
        sa.ForeignKeyConstraint(["base_model_id"], ["base_model.id"], name="fk_version_base_model_id"),
        sa.ForeignKeyConstraint(["digest"], ["blob.digest"], name="fk_version_digest"),
        sa.ForeignKeyConstraint(["expert_id"], ["expert.id"], name="fk_version_expert_id"),
        sa.PrimaryKeyConstraint("id", name="pk_version"),
        sa.UniqueConstraint("expert_id", "digest", name="uq_version_expert_id_digest"),
        sa.UniqueConstraint("expert_id", "number", name="uq_version_expert_id_number"),
    )
    op.create_index("ix_version_base", "version", ["base_model_id", "kind", "id"], unique=False)
    op.create_index("ix_version_digest", "version", ["digest"], unique=False)
    op.create_table(
        "alias",
        sa.Column("expert_id", sa.Integer(), nullable=False),
        sa.Column("alias", sa.String(length=63), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_by", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["expert_id", "number"], ["version.expert_id", "version.number"], name="fk_alias_version"
        ),
        sa.PrimaryKeyConstraint("expert_id", "alias", name="pk_alias"),
    )
    op.create_index("ix_alias_alias", "alias", ["alias", "expert_id"], unique=False)
    op.create_table(
        "curve_point",
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("split", sa.String(length=16), nullable=False),
        sa.Column("reward", sa.Double(), nullable=False),
        sa.Column("score", sa.Double(), nullable=False),
        sa.Column("kl", sa.Double(), nullable=True),
        sa.Column("learning_rate", sa.Double(), nullable=True),
        sa.Column("gradient_norm", sa.Double(), nullable=True),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.CheckConstraint("split IN ('train', 'validation')", name=op.f("ck_curve_point_split")),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name="fk_curve_point_version_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("version_id", "step", "split", name="pk_curve_point"),
    )
    op.create_table(
        "metric",
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name="fk_metric_version_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("version_id", "name", name="pk_metric"),
    )
    op.create_index("ix_metric_name_value", "metric", ["name", "value", "version_id"], unique=False)
    op.create_table(
        "parent",
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("alpha", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name="fk_parent_version_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("version_id", "position", name="pk_parent"),
    )
    op.create_index("ix_parent_digest", "parent", ["digest"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_parent_digest", table_name="parent")
    op.drop_table("parent")
    op.drop_index("ix_metric_name_value", table_name="metric")
    op.drop_table("metric")
    op.drop_table("curve_point")
    op.drop_index("ix_alias_alias", table_name="alias")
    op.drop_table("alias")
    op.drop_index("ix_version_digest", table_name="version")
    op.drop_index("ix_version_base", table_name="version")
    op.drop_table("version")
    op.drop_index("ix_tag_tag", table_name="tag")
    op.drop_table("tag")
    op.drop_index("ix_alias_event_expert", table_name="alias_event")
    op.drop_table("alias_event")
    op.drop_index("ix_expert_updated", table_name="expert")
    op.drop_index("ix_expert_task_updated", table_name="expert")
    op.drop_index("ix_expert_score", table_name="expert")
    op.drop_index("ix_expert_namespace_updated", table_name="expert")
    op.drop_index("ix_expert_kind_updated", table_name="expert")
    op.drop_index("ix_expert_domain_updated", table_name="expert")
    op.drop_index("ix_expert_created", table_name="expert")
    op.drop_index("ix_expert_base_updated", table_name="expert")
    op.drop_table("expert")
    op.drop_table("namespace")
    op.drop_index("ix_blob_touched_at", table_name="blob")
    op.drop_table("blob")
    op.drop_index("ix_base_model_model_id", table_name="base_model")
    op.drop_table("base_model")
