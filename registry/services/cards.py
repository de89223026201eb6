"""Cards: all that a list tells of an expert, ready as JSON in its row.

A list of fifty experts is then one query of fifty rows, and not the versions, metrics, aliases and tags of each.
Whoever changes something of these writes the card anew, in the same transaction and with the expert's row locked. A
card is good where its time is that of the expert's last change: one that a server of an older t2 left behind, while the
database was at this schema already, is ignored, and its values are queried. Aliases of older versions are not on a
card: one query per page adds all aliases to the answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, case, select
from sqlalchemy.orm import Session

from t2.registry.db import models
from t2.registry.db.lookups import any_of, columns
from t2.registry.schemas import Expert, Version, known
from t2.registry.services import versions

_EXPERT = columns(models.Expert)
CARD = case((_EXPERT.carded_at == _EXPERT.updated_at, _EXPERT.card)).label("card")
"""The card of an expert for :func:`told`; NULL where it is not good."""
_ROWS = select(
    *(_EXPERT[name] for name in ("id", "path", "kind", "description", "live", "created_at", "updated_at", "deleted_at"))
).where(any_of(_EXPERT.id, "ids"))


_ALIAS = columns(models.Alias)
_ALIASES = (
    select(_ALIAS.expert_id, _ALIAS.alias, _ALIAS.number).where(any_of(_ALIAS.expert_id, "ids")).order_by(_ALIAS.alias)
)


def told(reader: Connection, rows: Sequence[Row[*tuple[Any, ...]]]) -> list[str]:
    """Return the cards of rows that have ``id`` and :data:`CARD`, with the experts' aliases."""
    cards = {row.id: row.card for row in rows if row.card is not None}
    missing = [row.id for row in rows if row.card is None]
    if missing:
        # Experts that were purged after their rows were read are missing.
        cards |= {expert_id: dump_card(expert) for expert_id, expert in made(reader, missing).items()}
    return add_aliases(reader, {row.id: cards[row.id] for row in rows if row.id in cards})


def add_aliases(reader: Session | Connection, cards: Mapping[int, str]) -> list[str]:
    """Add the aliases and their versions to cards, given by the experts' ids."""
    aliases: dict[int, dict[str, int]] = {expert_id: {} for expert_id in cards}
    if cards:
        for expert_id, alias, number in reader.execute(_ALIASES, {"ids": list(cards)}):
            aliases[expert_id][alias] = number
    return [
        f'{card[:-1]},"aliases":{json.dumps(aliases[expert_id], separators=(",", ":"))}}}'
        for expert_id, card in cards.items()
    ]


def dump_card(expert: Expert) -> str:
    """Serialise an expert as the card in its row."""
    return expert.model_dump_json(exclude={"aliases"})


def made(reader: Session | Connection, ids: Sequence[int]) -> dict[int, Expert]:
    """What the tables say of experts, by id, in three queries however many they are."""
    latest, tags = versions.latest(reader, ids)
    return {
        row.id: of(row, latest.get(row.id), tags.get(row.id, ())) for row in reader.execute(_ROWS, {"ids": ids}).all()
    }


def of(row: models.Expert | Row[*tuple[Any, ...]], latest: Version | None, tags: Iterable[str]) -> Expert:
    """An expert as clients see it: its row, the latest version that is not deleted, and its tags."""
    return known(
        Expert,
        {
            "name": row.path,
            "kind": row.kind,
            "description": row.description,
            "tags": tuple(sorted(tags)),
            "versions": row.live,
            "latest": latest,
            "created_at": row.created_at,
            "updated_at": row.updated_at,
            "deleted_at": row.deleted_at,
            "aliases": None,
        },
    )
