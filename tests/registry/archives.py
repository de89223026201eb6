"""Write, read and edit archives of registries."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

from t2.core.digests import canonical_json
from t2.registry.portable import tar
from t2.registry.portable.exporting import export
from t2.registry.portable.importing import Imported, restore
from t2.registry.services.doctor import examine
from t2.registry.services.service import Service
from tests.registry.registries import ACTOR


def exported(service: Service, namespace: str | None = None) -> bytes:
    file = io.BytesIO()
    export(service.database, service.store, file, namespace=namespace)
    return file.getvalue()


def imported(service: Service, archive: bytes, *, tokens: bool = False) -> Imported:
    result = restore(service.database, service.store, ACTOR, io.BytesIO(archive), tokens=tokens)
    assert not [finding for finding in examine(service.database, service.store, deep=True) if finding.wrong]
    return result


def members(archive: bytes) -> list[tuple[str, bytes]]:
    return list(tar.read_members(io.BytesIO(archive), 1 << 26))


def packed(parts: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    for name, data in parts:
        tar.write_member(file, name, data)
    tar.write_end(file)
    return file.getvalue()


def edited(archive: bytes, edit: Callable[[list[dict[str, Any]]], object]) -> bytes:
    """Return an archive with edited records."""
    parts = members(archive)
    blobs = [part for part in parts if not part[0].startswith("records/")]
    lines = [json.loads(line) for name, data in parts if name.startswith("records/") for line in data.splitlines()]
    edit(lines)
    first, rest = lines[0], lines[1:]
    text = [json.dumps(line).encode() for line in rest]
    return packed([("records/1.jsonl", json.dumps(first).encode()), *blobs, ("records/2.jsonl", b"\n".join(text))])


def find(lines: list[dict[str, Any]], type: str) -> dict[str, Any]:
    return next(line for line in lines if line["type"] == type)


def header(lines: list[dict[str, Any]], **changes: Any) -> str:
    """Return the header of the last run with changed fields."""
    return canonical_json({**json.loads(find(lines[::-1], "run")["header"]), **changes})
