"""Separate boards of models that share a name, by the identity of the base model.

``base`` becomes the key of a board's model: the identity if the run has one, else the name as before. ``base_name`` is
always the name. Runs that a server of the previous version inserts meanwhile have no ``base_name`` and are found by
``base``.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_TABLES = ("board", "run")


def upgrade() -> None:
    for table in _TABLES:
        op.add_column(table, sa.Column("base_name", sa.String(length=200), nullable=True))
        op.execute(f"UPDATE {table} SET base_name = base")
        op.create_index(f"ix_{table}_base_name", table, ["base_name", "id"])


def downgrade() -> None:
    for table in _TABLES:
        op.drop_index(f"ix_{table}_base_name", table_name=table)
        op.drop_column(table, "base_name")
