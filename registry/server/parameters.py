"""Parameters that several operations share."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query

from t2.core.references import ALIAS_PATTERN, DIGEST_PATTERN, NAME_PATTERN
from t2.registry.names import MAX_NOTE_BYTES
from t2.registry.schemas import MAX_PAGE
from t2.registry.server.bodies import MAX_INT, NO_NUL

NamespacePath = Annotated[str, Path(pattern=NAME_PATTERN, description="The expert's namespace.")]
NamePath = Annotated[str, Path(pattern=NAME_PATTERN, description="The expert's name.")]
NumberPath = Annotated[int, Path(ge=1, le=MAX_INT, description="The version's number.")]
AliasPath = Annotated[str, Path(pattern=ALIAS_PATTERN, description="The alias.")]
DigestPath = Annotated[
    str, Path(json_schema_extra={"pattern": DIGEST_PATTERN}, description="SHA-256 of the content, in hex.")
]
"""Checked by the registry itself: what cannot be a digest is not there."""
FingerprintPath = Annotated[
    str, Path(json_schema_extra={"pattern": DIGEST_PATTERN}, description="The base model's fingerprint, in hex.")
]

Cursor = Annotated[
    str | None, Query(max_length=1000, description="`next` of the page before; opaque, and good for the same query.")
]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Items of one page at most.")]
Reason = Annotated[str, Query(max_length=MAX_NOTE_BYTES, pattern=NO_NUL, description="Why, for the history.")]
