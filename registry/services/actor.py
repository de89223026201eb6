"""On whose behalf the registry acts, and within which limits."""

from __future__ import annotations

from dataclasses import dataclass

from t2.registry.names import MAX_POINTS_A_CALL


@dataclass(frozen=True)
class Actor:
    """Who asks, for the audit log and for ``created_by``.

    Attributes:
        source: ``api``, ``embedded`` or ``cli``.
        subject: a token's name, or a user of the machine.
    """

    source: str
    subject: str

    def __str__(self) -> str:
        return f"{self.source}:{self.subject}"


@dataclass(frozen=True)
class Limits:
    """What a registry takes at most.

    Attributes:
        upload_bytes: of an expert's file.
        points: of one version's reward curve.
        points_a_call: of one request that adds to it.
        lineage_nodes: of one answer about lineage.
        compared_bytes: of all samples that are compared for one verdict.
        idempotency_hours: for which an upload's key is remembered.
    """

    upload_bytes: int = 64 * 1024 * 1024
    points: int = 100_000
    points_a_call: int = MAX_POINTS_A_CALL
    lineage_nodes: int = 500
    compared_bytes: int = 32 * 1024 * 1024
    idempotency_hours: float = 24.0
