"""The ask/tell protocol of a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Candidate = tuple[float, ...]
"""Coefficients α, rounded, so that a repeated candidate is recognised."""

Key = tuple[float, float]
"""What a candidate is ranked by: its score (higher is better), then the tie-breaking mean log-likelihood."""


class Search(Protocol):
    """A search for the candidate with the largest key."""

    def ask(self) -> list[Candidate]:
        """The next generation; empty when the search has ended."""
        ...

    def tell(self, candidates: Sequence[Candidate], keys: Sequence[Key]) -> None:
        """Report the keys of the candidates last asked for, in their order."""
        ...

    @property
    def stopped(self) -> str | None:
        """Why the search has ended, or None while it has not."""
        ...
