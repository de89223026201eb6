"""Indexes for a hundred thousand experts: of live rows only, for text, and for the rare value of a filter."""

from __future__ import annotations

import logging

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_LIVE = "deleted_at IS NULL"
_SORTED = {
    "ix_expert_updated": ["updated_at", "id"],
    "ix_expert_created": ["created_at", "id"],
    "ix_expert_score": ["score", "id"],
    "ix_expert_namespace_updated": ["namespace_id", "updated_at", "id"],
    "ix_expert_base_updated": ["base_model_id", "updated_at", "id"],
    "ix_expert_task_updated": ["task", "updated_at", "id"],
    "ix_expert_domain_updated": ["domain", "updated_at", "id"],
    "ix_expert_kind_updated": ["kind", "updated_at", "id"],
}
_VERSIONS = {
    "ix_version_kind": ["kind", "id"],
    "ix_version_domain": ["domain", "id"],
    "ix_version_base_domain": ["base_model_id", "domain", "id"],
}


_SEARCH = "CREATE INDEX ix_expert_search ON expert USING gin (search_text gin_trgm_ops)"


def upgrade() -> None:
    for name, columns in _SORTED.items():
        op.drop_index(name, table_name="expert")
        where = sa.text(_LIVE)
        op.create_index(name, "expert", columns, postgresql_where=where, sqlite_where=where)
    where = sa.text(_LIVE)
    columns = ["base_model_id", "score", "id"]
    op.create_index("ix_expert_base_score", "expert", columns, postgresql_where=where, sqlite_where=where)
    where = sa.text("deleted_at IS NOT NULL")
    op.create_index("ix_expert_deleted", "expert", ["updated_at", "id"], postgresql_where=where, sqlite_where=where)
    for name, columns in _VERSIONS.items():
        op.create_index(name, "version", columns)
    where = sa.text("action = 'expert.purge'")
    op.create_index("ix_audit_purged", "audit", ["object", "id"], postgresql_where=where, sqlite_where=where)
    connection = op.get_bind()
    if connection.dialect.name != "postgresql":
        return
    # A task has one domain as a rule; taken for independent, two that never meet look common, and all rows are walked.
    op.execute("CREATE STATISTICS st_expert_columns (mcv) ON task, domain, kind FROM expert")
    try:
        with connection.begin_nested():
            op.execute("CREATE EXTENSION IF NOT EXISTS pg_trgm")
            op.execute(_SEARCH)
    except sa.exc.DBAPIError as error:
        logging.getLogger("t2.registry").warning(
            "without the extension pg_trgm a search by text reads all experts (%s); to have it, let a superuser run "
            "CREATE EXTENSION pg_trgm, then %s",
            str(error.orig).strip().splitlines()[0],
            _SEARCH,
        )


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        # The extension stays: others may use it by now.
        op.execute("DROP INDEX IF EXISTS ix_expert_search")
        op.execute("DROP STATISTICS IF EXISTS st_expert_columns")
    op.drop_index("ix_audit_purged", table_name="audit")
    for name in _VERSIONS:
        op.drop_index(name, table_name="version")
    op.drop_index("ix_expert_deleted", table_name="expert")
    op.drop_index("ix_expert_base_score", table_name="expert", if_exists=True)
    for name, columns in _SORTED.items():
        op.drop_index(name, table_name="expert")
        op.create_index(name, "expert", columns)
