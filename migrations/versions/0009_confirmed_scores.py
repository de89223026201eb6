"""Add the confirmation of scores and the references by which runs name experts.

The values of existing runs come from their headers: their means were checked against the samples when the runs were
pushed. Scores of lm-eval's placeholder metric ``bypass`` are dropped.
"""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_BATCH = 500
_RUN = sa.table("run", sa.column("id", sa.Integer), sa.column("header", sa.Text))
_SCORE = sa.table(
    "run_score",
    sa.column("run_id", sa.Integer),
    sa.column("position", sa.Integer),
    sa.column("metric", sa.String),
    *(sa.column(name, sa.Double) for name in ("score", "low", "high")),
    sa.column("confirmed", sa.Boolean),
)
_EXPERT = sa.table(
    "run_expert",
    sa.column("run_id", sa.Integer),
    sa.column("position", sa.Integer),
    sa.column("reference", sa.String),
)
_RANKED = ["board_id", "metric", "filter", "confirmed", "score", "run_id"]
_FIRST = ["board_id", "position", "confirmed", "run_id"]


def upgrade() -> None:
    op.add_column("run_score", sa.Column("confirmed", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("run_expert", sa.Column("reference", sa.String(length=300), nullable=True))
    _read_headers()
    op.execute(sa.update(_SCORE).where(_SCORE.c.metric == "bypass").values(score=None, low=None, high=None))
    op.create_index("ix_run_score_ranked", "run_score", _RANKED)
    op.create_index("ix_run_score_first", "run_score", _FIRST)
    op.drop_index("ix_run_score_board", table_name="run_score")


def downgrade() -> None:
    op.create_index("ix_run_score_board", "run_score", ["board_id", "metric", "filter", "score", "run_id"])
    op.drop_index("ix_run_score_first", table_name="run_score")
    op.drop_index("ix_run_score_ranked", table_name="run_score")
    op.drop_column("run_expert", "reference")
    op.drop_column("run_score", "confirmed")


def _read_headers() -> None:
    connection = op.get_bind()
    last = -1
    while True:
        rows = connection.execute(
            sa.select(_RUN.c.id, _RUN.c.header).where(_RUN.c.id > last).order_by(_RUN.c.id).limit(_BATCH)
        ).all()
        if not rows:
            return
        last = rows[-1].id
        headers = {row.id: _parse(row.header) for row in rows}
        means = [
            {"run": run_id, "place": place}
            for run_id, header in headers.items()
            for place, score in enumerate(header.get("scores", ()))
            if score.get("aggregation") == "mean"
        ]
        references = [
            {"run": run_id, "place": place, "reference": expert["reference"]}
            for run_id, header in headers.items()
            for place, expert in enumerate(header.get("experts", ()))
            if expert.get("reference") and len(expert["reference"]) <= 300
        ]
        for table, found in ((_SCORE, means), (_EXPERT, references)):
            values: dict[str, Any] = {"confirmed": sa.true()}
            if table is _EXPERT:
                values = {"reference": sa.bindparam("reference")}
            where = table.c.run_id == sa.bindparam("run"), table.c.position == sa.bindparam("place")
            if found:
                connection.execute(sa.update(table).where(*where).values(values), found)


def _parse(header: str) -> dict[str, Any]:
    try:
        found = json.loads(header)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
