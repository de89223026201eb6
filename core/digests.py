"""Digests: one way to hash bytes, files, JSON values and documents."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

DOC_HASH_BYTES = 6


def sha256(data: bytes) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces, UTF-8 as it is, and no NaN: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """Hex SHA-256 of a JSON value's canonical text."""
    return sha256(canonical_json(value).encode())


def doc_hash(doc: Any) -> str:
    """Content hash of a task document, 12 hex characters (48 bits).

    Short, because an expert's manifest carries the hash of every document it was trained on; two sets of 10,000
    documents share a hash by chance with probability 4e-7. Values that are not JSON count by their ``repr`` (dates),
    images by their pixels.
    """
    text = json.dumps(doc, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)
    return sha256(text.encode())[: 2 * DOC_HASH_BYTES]


def _plain(value: Any) -> Any:
    # An image of Pillow, whose repr is its address.
    if all(hasattr(value, name) for name in ("mode", "size", "tobytes")):
        return {"image": [value.mode, list(value.size), sha256(value.tobytes())]}
    return repr(value)
