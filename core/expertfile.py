"""The expert file: one safetensors file of 1-D vectors with the manifest in its header, under a strict profile.

The safetensors library by itself accepts duplicate keys, path-like names, holes and NaN; this reader does not. It
needs no torch, so that a registry can check uploads.

The profile: a header of at most :data:`MAX_HEADER_BYTES`; exactly one metadata key, :data:`METADATA_KEY`, with the
manifest as canonical JSON, its labels of at most :data:`MAX_LABEL` characters and no NUL anywhere; 1-D tensors of type
F32, F16 or BF16 whose names look like parameter names; data without holes, overlap or trailing bytes; finite values;
ranks as in the manifest.

The layout is canonical too, so that one expert has one digest: the header is JSON without spaces, metadata first, then
the tensors by type (F32, BF16, F16) and name, in the order of their data, and spaces pad it to a multiple of 8 bytes.
The safetensors library writes the same layout. Uploads and written files must have it; files that have a digest already
can be read without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydantic
import safetensors

from t2.core.digests import sha256
from t2.core.errors import ExpertFileError
from t2.core.files import atomic_write
from t2.core.manifest import Manifest, pack_hashes, unpack_hashes

METADATA_KEY = "t2"
MAX_HEADER_BYTES = 1024 * 1024
"""Room for the four hashes each of 30,000 training documents, and for the names of 500 matrices."""
MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_LABEL = 200
"""Most characters of manifest fields that are indexed columns of the registry."""
_NUL = re.compile(r"(?<!\\)(\\\\)*\\u0000")
"""Matches a NUL character in JSON text, which PostgreSQL cannot store."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
"""Bytes per value by type; the order is the canonical order of types."""

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ExpertFile:
    """An expert as read from its file.

    Attributes:
        manifest: what it says of itself.
        vectors: z of each matrix, by parameter name, shape (r,), float32.
        digest: hex SHA-256 of the file, the expert's identity.
    """

    manifest: Manifest
    vectors: dict[str, Vector]
    digest: str


def encode_expert(manifest: Manifest, vectors: Mapping[str, Vector]) -> bytes:
    """The bytes of an expert's file; the same expert always gives the same bytes.

    Raises:
        ExpertFileError: names or ranks disagree with the manifest, a value is not finite, or a text breaks the profile.
    """
    arrays = {name: np.ascontiguousarray(vector, dtype="<f4") for name, vector in sorted(vectors.items())}
    odd = next((name for name in arrays if np.ndim(vectors[name]) != 1), None)
    if odd is not None:
        raise ExpertFileError(f"{manifest.name} cannot be written as an expert file: {odd} is not a vector")
    try:
        text = manifest.canonical()
        header = _canonical_header(text, {name: ("F32", len(array)) for name, array in arrays.items()})
    except ValueError as error:
        raise ExpertFileError(f"{manifest.name} cannot be written as an expert file: {error}") from error
    data = b"".join((header, *(array.tobytes() for array in arrays.values())))
    decode_expert(data, manifest.name)
    return data


def decode_expert(data: bytes, source: str, *, canonical: bool = True) -> ExpertFile:
    """Read and check the bytes of an expert's file.

    Args:
        data: the whole file.
        source: what to call it in an error.
        canonical: refuse any layout except the canonical one.

    Raises:
        ExpertFileError: the bytes break the strict profile; the message names ``source`` and the rule.
    """

    def fail(why: str) -> ExpertFileError:
        # What it quotes of the file may be as long as the file.
        return ExpertFileError(f"{source} is not a valid expert file: {why if len(why) <= 400 else why[:400] + '…'}")

    if len(data) > MAX_FILE_BYTES:
        raise fail(f"{len(data)} bytes exceed the limit of {MAX_FILE_BYTES}")
    if len(data) < 8:
        raise fail(f"it is truncated ({len(data)} bytes)")
    size = int.from_bytes(data[:8], "little")
    if data[:4] == b"PK\x03\x04" or (data[0] == 0x80 and 2 <= data[1] <= 5 and size > MAX_HEADER_BYTES):
        raise fail("it is a pickle or a PyTorch checkpoint, and experts are safetensors; see t2 expert import")
    if size > MAX_HEADER_BYTES:
        raise fail(f"a header of {size} bytes exceeds the limit of {MAX_HEADER_BYTES}")
    if len(data) < 8 + size:
        raise fail(f"it is truncated ({len(data)} bytes, the header alone needs {8 + size})")
    try:
        header = json.loads(data[8 : 8 + size].decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise fail(f"its header is not JSON without duplicate keys ({error})") from error
    if not isinstance(header, dict):
        raise fail("its header is not a JSON object")
    manifest = _manifest(header.pop("__metadata__", None), fail)
    body = memoryview(data)[8 + size :]
    vectors = _vectors(header, body, fail)
    ranks = {name: len(vector) for name, vector in vectors.items()}
    if ranks != manifest.targets:
        odd = sorted(
            {name for name in ranks.keys() | manifest.targets.keys() if ranks.get(name) != manifest.targets.get(name)}
        )
        raise fail(
            f"{odd[0]} has {ranks.get(odd[0], 'no')} values, the manifest says {manifest.targets.get(odd[0], 'none')}"
        )
    try:
        read = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise fail(f"the safetensors library refuses it ({error})") from error
    if {name for name, _ in read} != set(vectors):
        raise fail("the safetensors library reads other tensors from it")
    if canonical and data[: 8 + size] != _header_of(manifest, header):
        raise fail(
            "its header is not canonical (other white space, padding or order), which would give one expert several "
            "digests; rewrite the file with t2 expert verify --fix"
        )
    return ExpertFile(manifest, vectors, sha256(data))


def rewrite_expert(data: bytes, source: str) -> bytes:
    """Rewrite an expert's file in the canonical layout, with the same manifest and values.

    Raises:
        ExpertFileError: the bytes break another rule of the strict profile.
    """
    file = decode_expert(data, source, canonical=False)
    size = int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8 : 8 + size])
    del tensors["__metadata__"]
    spans = {name: tensors[name]["data_offsets"] for name in _canonical_order(_types(tensors))}
    body = memoryview(data)[8 + size :]
    rewritten = b"".join((_header_of(file.manifest, tensors), *(body[start:end] for start, end in spans.values())))
    decode_expert(rewritten, source)
    return rewritten


def read_expert(path: Path, *, canonical: bool = False) -> ExpertFile:
    """Read an expert's file from disk.

    Args:
        canonical: see :func:`decode_expert`.

    Raises:
        ExpertFileError: it cannot be read, or breaks the strict profile.
    """
    return decode_expert(read_bytes(path), str(path), canonical=canonical)


def read_bytes(path: Path) -> bytes:
    """Read the bytes of an expert's file from disk, unchecked.

    Raises:
        ExpertFileError: it cannot be read, or is too large.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ExpertFileError(f"{path} is not a valid expert file: over the limit of {MAX_FILE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise ExpertFileError(f"cannot read the expert {path}: {error.strerror or error}") from error


def is_no_expert(path: Path) -> bool:
    """Whether a file belongs to a training that has not ended, or to an expert about to be replaced, or is no expert.

    A sweep's runs lie two folders deeper, as ``<name>.training/sweep/kl-0.1/``. Beside the expert of a training that
    has ended lies the state after its last step, from which it may go on.
    """
    if path.name == "checkpoint.safetensors" and (path.parent / "expert.safetensors").is_file():
        return True
    folders = [path.parent, *([path.parents[2]] if path.parent.parent.name == "sweep" else [])]
    return any(folder.suffix in (".training", ".replaced", ".copy") for folder in folders)


def write_expert(path: Path, manifest: Manifest, vectors: Mapping[str, Vector]) -> str:
    """Write an expert's file atomically and return its digest.

    Raises:
        ExpertFileError: as :func:`encode_expert`.
        StorageError: the file cannot be written; what was there stays.
    """
    data = encode_expert(manifest, vectors)
    atomic_write(path, data)
    return sha256(data)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("duplicate key")
    return values


def _manifest(metadata: Any, fail: Any) -> Manifest:
    if not isinstance(metadata, dict) or set(metadata) != {METADATA_KEY} or not isinstance(metadata[METADATA_KEY], str):
        raise fail(f"its metadata must hold the one key {METADATA_KEY!r} with the manifest (is it an expert of t2?)")
    text = metadata[METADATA_KEY]
    try:
        manifest = Manifest.model_validate(json.loads(text, object_pairs_hook=_no_duplicates))
        if pack_hashes(unpack_hashes(manifest.training_docs)) != manifest.training_docs:
            raise ValueError("training_docs are not sorted, repeat, or are not the plain base64 of their hashes")
        canonical = manifest.canonical()
        canonical.encode()
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "manifest"
        raise fail(f"manifest field {where}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise fail(f"its manifest is malformed ({error})") from error
    if canonical != text:
        raise fail("its manifest is not canonical JSON")
    for field, value in (
        ("base.revision", manifest.base.revision),
        ("task", manifest.task),
        ("domain", manifest.domain),
        ("method", manifest.method),
    ):
        if value is not None and (len(value) > MAX_LABEL or "\x00" in value):
            raise fail(f"manifest field {field}: at most {MAX_LABEL} characters are allowed, and no NUL")
    if _NUL.search(text):
        raise fail("its manifest holds a NUL character, which a registry cannot store")
    return manifest


def _header_of(manifest: Manifest, tensors: Mapping[str, Any]) -> bytes:
    """Build the canonical header from the checked entries of any header."""
    return _canonical_header(manifest.canonical(), _types(tensors))


def _types(tensors: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    return {name: (entry["dtype"], entry["shape"][0]) for name, entry in tensors.items()}


def _canonical_order(types: Mapping[str, tuple[str, int]]) -> list[str]:
    ranks = {dtype: rank for rank, dtype in enumerate(_ITEM_BYTES)}
    return sorted(types, key=lambda name: (ranks[types[name][0]], name))


def _canonical_header(text: str, types: Mapping[str, tuple[str, int]]) -> bytes:
    """Build the first bytes of an expert's file, up to its data.

    Args:
        text: the manifest's canonical JSON.
        types: type and length of each tensor.
    """
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: text}}
    end = 0
    for name in _canonical_order(types):
        dtype, count = types[name]
        start, end = end, end + count * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _vectors(header: dict[str, Any], body: memoryview, fail: Any) -> dict[str, Vector]:
    if not header:
        raise fail("it holds no vectors")
    spans: list[tuple[int, int]] = []
    vectors: dict[str, Vector] = {}
    for name, entry in header.items():
        if len(name) > 200 or not _NAME.fullmatch(name):
            raise fail(f"{name[:60]!r} is not a parameter name")
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise fail(f"{name} has a malformed header entry")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
            raise fail(f"{name} has type {str(dtype)[:20]}, allowed are {', '.join(_ITEM_BYTES)}")
        if not isinstance(shape, list) or len(shape) != 1 or type(shape[0]) is not int or shape[0] < 1:
            raise fail(f"{name} is not a vector (shape {str(shape)[:40]})")
        if not _is_span(offsets) or offsets[1] - offsets[0] != shape[0] * _ITEM_BYTES[dtype]:
            raise fail(f"{name} has wrong data offsets")
        if offsets[1] > len(body):
            raise fail(f"it is truncated ({name} ends at byte {offsets[1]} of {len(body)})")
        spans.append((offsets[0], offsets[1]))
        vectors[name] = _floats(body[offsets[0] : offsets[1]], dtype)
    # All values at once: hundreds of small arrays take several times as long.
    if not np.isfinite(np.concatenate(list(vectors.values()))).all():
        name, vector = next((name, vector) for name, vector in vectors.items() if not np.isfinite(vector).all())
        bad = int(np.flatnonzero(~np.isfinite(vector))[0])
        raise fail(f"{name}[{bad}] is {vector[bad]}, values must be finite")
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise fail("its data has holes or overlaps")
        end = stop
    if end != len(body):
        raise fail(f"{len(body) - end} bytes trail its data")
    return vectors


def _is_span(value: Any) -> bool:
    """Whether it is two natural numbers; true and false are none."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and type(value[0]) is int
        and type(value[1]) is int
        and 0 <= value[0] <= value[1]
    )


def _floats(raw: memoryview, dtype: str) -> Vector:
    if dtype == "F32":
        return np.frombuffer(raw, dtype="<f4").astype(np.float32)
    if dtype == "F16":
        return np.frombuffer(raw, dtype="<f2").astype(np.float32)
    return (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
