"""Add a table of the highest version number of each purged name.

Only the audit log had these numbers, and an import takes the audit log only into an empty registry. After any other
import, new versions of the name got the purged numbers again.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_PATH = sa.String(129).with_variant(sa.String(129, collation="C"), "postgresql")
_MAX = 2**31 - 1


def upgrade() -> None:
    table = op.create_table(
        "purged_expert",
        sa.Column("path", _PATH, nullable=False),
        sa.Column("last", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("path", name="pk_purged_expert"),
        sa.CheckConstraint("last >= 0", name=op.f("ck_purged_expert_last")),
    )
    audit = sa.table("audit", sa.column("action"), sa.column("object", sa.Text), sa.column("detail", sa.JSON))
    purged = sa.select(audit.c.object, audit.c.detail).where(audit.c.action == "expert.purge")
    found: dict[str, int] = {}
    for path, detail in op.get_bind().execute(purged):
        last = detail.get("last") if isinstance(detail, dict) else None
        # An imported log may contain any JSON.
        if type(last) is int and 0 <= last <= _MAX and len(path) <= 129:
            found[path] = max(found.get(path, 0), last)
    if found:
        op.bulk_insert(table, [{"path": path, "last": last} for path, last in found.items()])


def downgrade() -> None:
    op.drop_table("purged_expert")
