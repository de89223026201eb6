"""The leaderboard: runs of tasks with their scores and experts, by what can be compared."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_LABEL = sa.String(length=200)
_HEX = sa.String(length=64)
_UTC = sa.DateTime(timezone=True)
_INDEXES = {
    "run": {
        "ix_run_digest": ["digest"],
        "ix_run_samples": ["samples"],
        "ix_run_board": ["board_id", "id"],
        "ix_run_namespace": ["namespace_id", "id"],
        "ix_run_task": ["task", "id"],
        "ix_run_base": ["base", "id"],
        "ix_run_base_model": ["base_model_id", "id"],
    },
    "run_score": {"ix_run_score_board": ["board_id", "metric", "filter", "score", "run_id"]},
    "run_expert": {"ix_run_expert_digest": ["digest", "run_id"]},
}


def upgrade() -> None:
    op.create_table(
        "board",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("task", _LABEL, nullable=False),
        sa.Column("task_version", _LABEL, nullable=False),
        sa.Column("n_shot", sa.Integer(), nullable=False),
        sa.Column("base", _LABEL, nullable=False),
        sa.Column("docs", sa.Integer(), nullable=False),
        sa.Column("docs_digest", _HEX, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_board"),
        sa.UniqueConstraint("task", "base", "task_version", "n_shot", "docs_digest", name="uq_board_key"),
        sa.UniqueConstraint("id", "task", "base", name="uq_board_copies"),
        sa.CheckConstraint("n_shot >= 0", name=op.f("ck_board_n_shot")),
        sa.CheckConstraint("docs >= 1", name=op.f("ck_board_docs")),
        sa.CheckConstraint("length(docs_digest) = 64", name=op.f("ck_board_docs_digest")),
    )
    op.create_table(
        "run",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("namespace_id", sa.Integer(), nullable=False),
        sa.Column("digest", _HEX, nullable=False),
        sa.Column("board_id", sa.Integer(), nullable=False),
        sa.Column("task", _LABEL, nullable=False),
        sa.Column("base", _LABEL, nullable=False),
        sa.Column("base_revision", _LABEL, nullable=True),
        sa.Column("base_model_id", sa.Integer(), nullable=True),
        sa.Column("samples", _HEX, nullable=False),
        sa.Column("prompts_digest", _HEX, nullable=False),
        sa.Column("model", _LABEL, nullable=False),
        sa.Column("strategy", _LABEL, nullable=False),
        sa.Column("control", _LABEL, nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=True),
        sa.Column("record_digest", _HEX, nullable=True),
        sa.Column("header", sa.Text(), nullable=False),
        sa.Column("evaluated_at", _UTC, nullable=True),
        sa.Column("created_at", _UTC, nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_run"),
        sa.ForeignKeyConstraint(["namespace_id"], ["namespace.id"], name="fk_run_namespace_id"),
        sa.ForeignKeyConstraint(["base_model_id"], ["base_model.id"], name="fk_run_base_model_id"),
        sa.ForeignKeyConstraint(["samples"], ["blob.digest"], name="fk_run_samples"),
        sa.ForeignKeyConstraint(
            ["board_id", "task", "base"], ["board.id", "board.task", "board.base"], name="fk_run_board"
        ),
        sa.UniqueConstraint("namespace_id", "digest", name="uq_run_namespace_id_digest"),
        sa.UniqueConstraint("id", "board_id", name="uq_run_board"),
        sa.CheckConstraint("length(digest) = 64", name=op.f("ck_run_digest")),
        sa.CheckConstraint("length(prompts_digest) = 64", name=op.f("ck_run_prompts_digest")),
        sa.CheckConstraint("record_digest IS NULL OR length(record_digest) = 64", name=op.f("ck_run_record_digest")),
    )
    op.create_table(
        "run_score",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("board_id", sa.Integer(), nullable=False),
        sa.Column("metric", _LABEL, nullable=False),
        sa.Column("filter", _LABEL, nullable=False),
        sa.Column("score", sa.Double(), nullable=True),
        sa.Column("stderr", sa.Double(), nullable=True),
        sa.Column("low", sa.Double(), nullable=True),
        sa.Column("high", sa.Double(), nullable=True),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("higher_is_better", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "position", name="pk_run_score"),
        sa.ForeignKeyConstraint(
            ["run_id", "board_id"], ["run.id", "run.board_id"], name="fk_run_score_run", ondelete="CASCADE"
        ),
        sa.UniqueConstraint("run_id", "metric", "filter", name="uq_run_score_run_id_metric_filter"),
        sa.CheckConstraint("n >= 0", name=op.f("ck_run_score_n")),
        sa.CheckConstraint(
            "(low IS NULL) = (high IS NULL) AND (low IS NULL OR low <= high)", name=op.f("ck_run_score_interval")
        ),
    )
    op.create_table(
        "run_expert",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("digest", _HEX, nullable=False),
        sa.Column("name", _LABEL, nullable=False),
        sa.Column("domain", _LABEL, nullable=True),
        sa.PrimaryKeyConstraint("run_id", "position", name="pk_run_expert"),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_run_expert_run_id", ondelete="CASCADE"),
        sa.CheckConstraint("length(digest) = 64", name=op.f("ck_run_expert_digest")),
    )
    for table, indexes in _INDEXES.items():
        for name, columns in indexes.items():
            op.create_index(name, table, columns)


def downgrade() -> None:
    # Their samples stay in the store until the collection of garbage finds that nothing has them.
    for table in ("run_expert", "run_score", "run"):
        for name in _INDEXES[table]:
            op.drop_index(name, table_name=table)
        op.drop_table(table)
    op.drop_table("board")
