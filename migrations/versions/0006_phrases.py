"""How common a phrase is, told from a thousand experts instead of a hundred.

PostgreSQL judges a pattern by how many of the values that it keeps of a column match it. A phrase that a thousandth of
all experts have matched one in a hundred of them now and then, was taken for a common one, and half of the experts were
walked in their order instead of looking the phrase up.
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _keep(1000)


def downgrade() -> None:
    _keep(-1)


def _keep(values: int) -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute(f"ALTER TABLE expert ALTER COLUMN search_text SET STATISTICS {values}")
        op.execute("ANALYZE expert (search_text)")
