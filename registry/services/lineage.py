"""Lineage: what an expert was mixed of, and what was mixed of it."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from t2.core.errors import NotFoundError
from t2.registry.db import models
from t2.registry.schemas import Lineage, LineageEdge, LineageNode
from t2.registry.services.actor import Limits

EDGES_A_NODE = 20
"""How many edges are looked at, for each node that may be told."""
REFERENCES_A_NODE = 20
"""How many of the versions with a content are told."""


def lineage(session: Session, digest: str, limits: Limits) -> Lineage:
    """Ancestors and descendants of a content, nearest first, up to a number of nodes.

    Raises:
        NotFoundError: no version has this content, and none was made of it.
    """
    edges: dict[tuple[str, str], float] = {}
    seen = {digest: None}
    truncated = False
    for upwards in (True, False):
        front = {digest}
        while front and not truncated:
            found = _edges(session, front, upwards, EDGES_A_NODE * limits.lineage_nodes)
            if len(found) > EDGES_A_NODE * limits.lineage_nodes:
                truncated = True
            edges.update(found)
            reached = dict.fromkeys(parent if upwards else child for child, parent in sorted(found))
            front = set()
            for node in reached:
                if node in seen:
                    continue
                if len(seen) >= limits.lineage_nodes:
                    truncated = True
                    break
                seen[node] = None
                front.add(node)
    nodes = _nodes(session, seen)
    if nodes[0].kind is None and not edges:
        raise NotFoundError(f"there is no version with the digest {digest}")
    return Lineage(
        root=digest,
        nodes=tuple(nodes),
        edges=tuple(
            LineageEdge(child=child, parent=parent, alpha=alpha)
            for (child, parent), alpha in sorted(edges.items())
            if child in seen and parent in seen
        ),
        truncated=truncated,
    )


def _edges(session: Session, digests: Iterable[str], upwards: bool, limit: int) -> dict[tuple[str, str], float]:
    """Edges from these contents to their parents, or children; one over the limit where there are more."""
    table = models.Parent
    end: ColumnElement[str] = models.Version.digest if upwards else table.digest  # type: ignore[assignment]
    rows = session.execute(
        select(models.Version.digest, table.digest, table.alpha)
        .join(models.Version, models.Version.id == table.version_id)
        .join(models.Expert, models.Expert.id == models.Version.expert_id)
        .where(end.in_(digests), models.Version.deleted_at.is_(None), models.Expert.deleted_at.is_(None))
        .distinct()
        .limit(limit + 1)
    )
    return {(child, parent): alpha for child, parent, alpha in rows}


def _nodes(session: Session, digests: Iterable[str]) -> list[LineageNode]:
    ordered = list(digests)
    references: dict[str, list[str]] = {digest: [] for digest in ordered}
    kinds: dict[str, str] = {}
    place = func.row_number().over(partition_by=models.Version.digest, order_by=models.Version.id).label("place")
    live = (
        select(models.Version.digest, models.Expert.path, models.Version.number, models.Version.kind, place)
        .join(models.Expert)
        .where(
            models.Version.digest.in_(ordered),
            models.Version.deleted_at.is_(None),
            models.Expert.deleted_at.is_(None),
        )
        .subquery()
    )
    first = select(live).where(live.c.place <= REFERENCES_A_NODE).order_by(live.c.digest, live.c.place)
    for digest, path, number, kind, _ in session.execute(first):
        references[digest].append(f"{path}@{number}")
        kinds[digest] = kind
    return [
        LineageNode(digest=digest, references=tuple(references[digest]), kind=kinds.get(digest))  # type: ignore[arg-type]
        for digest in ordered
    ]
