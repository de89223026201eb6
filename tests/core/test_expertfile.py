"""The strict profile of expert files: whole and exact, or refused in one line that names the rule."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from t2.core.errors import ExpertFileError
from t2.core.expertfile import (
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    METADATA_KEY,
    Vector,
    decode_expert,
    encode_expert,
    read_expert,
    rewrite_expert,
    write_expert,
)
from t2.core.manifest import BaseModelRef, Manifest, Parent, pack_hashes, unpack_hashes

DOWN, UP = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"
BASE = BaseModelRef(id="tiny", fingerprint="a" * 64)
VECTORS: dict[str, Vector] = {
    UP: np.array([0.5, 1.0, -2.25], dtype=np.float32),
    DOWN: np.array([1.0, 3e-39], dtype=np.float32),
}


def manifest(**fields: Any) -> Manifest:
    values: dict[str, Any] = {"name": "tiny-math", "base": BASE, "targets": {UP: 3, DOWN: 2}, **fields}
    return Manifest(**values)


VALID = encode_expert(manifest(), VECTORS)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    return header, data[8 + size :]


def join(header: dict[str, Any] | str, body: bytes) -> bytes:
    """Build a file from a header; a header given as a mapping gets the canonical layout."""
    if isinstance(header, str):
        text = header.encode()
    else:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
        text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def changed(change: Callable[[dict[str, Any]], Any], body: bytes | None = None) -> bytes:
    """The valid file with its header changed in place."""
    header, old = split(VALID)
    change(header)
    return join(header, old if body is None else body)


def with_manifest(text: str) -> bytes:
    return changed(lambda header: header["__metadata__"].update({METADATA_KEY: text}))


def with_tensor(values: npt.ArrayLike, dtype: str, shape: list[int], targets: dict[str, int]) -> bytes:
    """A file of one tensor, written by hand."""
    body = np.asarray(values).tobytes()
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(body)]}
    metadata = {METADATA_KEY: manifest(targets=targets).canonical()}
    return join({"__metadata__": metadata, UP: entry}, body)


def test_a_round_trip_is_exact() -> None:
    given = manifest(
        kind="mixture",
        task="t2_gsm8k",
        domain="math",
        method="reinforce",
        training={"lr": 2e-3, "seed": 7, "note": "é ∑"},
        training_docs=pack_hashes(["00ff00ff00ff", "aabbccddeeff"]),
        parents=(Parent(digest="b" * 64, alpha=0.25),),
    )
    data = encode_expert(given, VECTORS)
    read = decode_expert(data, "x")
    assert read.manifest == given
    assert read.digest == hashlib.sha256(data).hexdigest()
    assert read.vectors.keys() == VECTORS.keys()
    for name, vector in VECTORS.items():
        assert read.vectors[name].dtype == np.float32
        assert read.vectors[name].tobytes() == vector.tobytes()
    assert unpack_hashes(read.manifest.training_docs) == ["00ff00ff00ff", "aabbccddeeff"]


def test_equal_experts_have_equal_bytes() -> None:
    turned = {name: VECTORS[name] for name in reversed(VECTORS)}
    other = manifest(targets={DOWN: 2, UP: 3}, training={"b": 1, "a": 2})
    assert encode_expert(manifest(training={"a": 2, "b": 1}), VECTORS) == encode_expert(other, turned)
    assert encode_expert(manifest(name="other"), VECTORS) != VALID


def test_the_file_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    digest = write_expert(tmp_path / "new" / "x.safetensors", manifest(), VECTORS)
    loaded = safetensors.numpy.load_file(tmp_path / "new" / "x.safetensors")
    assert {name: vector.tolist() for name, vector in loaded.items()} == {
        name: vector.tolist() for name, vector in VECTORS.items()
    }
    assert read_expert(tmp_path / "new" / "x.safetensors").digest == digest


def test_truncated_anywhere_it_is_refused() -> None:
    for length in range(len(VALID)):
        with pytest.raises(ExpertFileError) as caught:
            decode_expert(VALID[:length], "cut.safetensors")
        assert str(caught.value).startswith("cut.safetensors is not a valid expert file: it is truncated"), length


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[new] = header.pop(old)

    return change


def entry(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(fields)


def shifted(header: dict[str, Any]) -> None:
    """Every tensor four bytes further on: a hole at the start."""
    for name in (UP, DOWN):
        header[name]["data_offsets"] = [offset + 4 for offset in header[name]["data_offsets"]]


def overlapping(header: dict[str, Any]) -> None:
    start = header[DOWN]["data_offsets"][0]
    header[UP]["data_offsets"] = [start, start + 12]


def many_tensors(count: int) -> bytes:
    header: dict[str, Any] = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}
    header["__metadata__"] = {METADATA_KEY: manifest().canonical()}
    return join(header, b"")


BODY = split(VALID)[1]
TEXT = split(VALID)[0]["__metadata__"][METADATA_KEY]
FIRST, SECOND = (json.dumps({name: split(VALID)[0][name]})[1:-1] for name in (DOWN, UP))
META = json.dumps({"__metadata__": {METADATA_KEY: TEXT}})[1:-1]

BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is truncated (0 bytes)"),
    "oversized header": (
        join(json.dumps(split(VALID)[0]) + " " * MAX_HEADER_BYTES, BODY),
        f"exceeds the limit of {MAX_HEADER_BYTES}",
    ),
    "absurd header size": (b"\xff" * 64, "a header of 18446744073709551615 bytes"),
    "oversized file": (VALID + bytes(MAX_FILE_BYTES), f"exceed the limit of {MAX_FILE_BYTES}"),
    "a pickle": (pickle.dumps({"weight": [1.0, 2.0]}), "a pickle or a PyTorch checkpoint"),
    "a PyTorch checkpoint": (b"PK\x03\x04" + bytes(60), "a pickle or a PyTorch checkpoint"),
    "header not UTF-8": (struct.pack("<Q", 4) + b"{\xff\xfe}", "header is not JSON"),
    "header not JSON": (join("{]", b""), "header is not JSON"),
    "header nested without end": (join("[" * 50_000, b""), "header is not JSON"),
    "header with an endless number": (join('{"a":' + "9" * 10_000 + "}", b""), "header is not JSON"),
    "header a list": (join("[]", b""), "not a JSON object"),
    "duplicate tensor": (join(f"{{{META},{FIRST},{SECOND},{SECOND}}}", BODY), "duplicate key"),
    "duplicate metadata": (join(f"{{{META},{META},{FIRST},{SECOND}}}", BODY), "duplicate key"),
    "duplicate manifest field": (with_manifest(TEXT[:-1] + ',"name":"tiny-math"}'), "duplicate key"),
    "no metadata": (changed(lambda header: header.pop("__metadata__")), "the one key 't2'"),
    "extra metadata key": (changed(lambda header: header["__metadata__"].update(format="pt")), "the one key 't2'"),
    "metadata not text": (changed(lambda header: header.update(__metadata__={METADATA_KEY: {}})), "the one key 't2'"),
    "manifest not JSON": (with_manifest("{"), "manifest is malformed"),
    "manifest a list": (with_manifest("[]"), "manifest field manifest"),
    "manifest with NaN": (with_manifest(TEXT.replace('"training":{}', '"training":{"x":NaN}')), "not canonical JSON"),
    "manifest without a name": (with_manifest(TEXT.replace('"name":"tiny-math",', "")), "manifest field name"),
    "manifest of another version": (
        with_manifest(TEXT.replace('"schema_version":1', '"schema_version":2')),
        "manifest field schema_version",
    ),
    "manifest with an unknown field": (with_manifest(TEXT[:-1] + ',"zeal":1}'), "manifest field zeal"),
    "manifest with a bad fingerprint": (with_manifest(TEXT.replace("a" * 64, "a" * 63)), "base.fingerprint"),
    "manifest with bad document hashes": (
        with_manifest(TEXT.replace('"training_docs":""', '"training_docs":"AAAA"')),
        "manifest is malformed",
    ),
    "manifest with spaces": (with_manifest(json.dumps(json.loads(TEXT), sort_keys=True)), "not canonical JSON"),
    # Canonical JSON sorts keys at every level, not only the first.
    "manifest unsorted": (
        with_manifest(
            TEXT.replace(
                f'"fingerprint":"{BASE.fingerprint}","id":"tiny"', f'"id":"tiny","fingerprint":"{BASE.fingerprint}"'
            )
        ),
        "not canonical JSON",
    ),
    "manifest with a long task": (
        with_manifest(TEXT.replace('"task":null', f'"task":"{"x" * 201}"')),
        "manifest field task: at most 200 characters",
    ),
    "manifest with a long domain": (
        with_manifest(TEXT.replace('"domain":null', f'"domain":"{"é" * 201}"')),
        "manifest field domain: at most 200 characters",
    ),
    "manifest with a long method": (
        with_manifest(TEXT.replace('"method":null', f'"method":"{"x" * 201}"')),
        "manifest field method: at most 200 characters",
    ),
    "manifest with a long revision": (
        with_manifest(TEXT.replace('"revision":null', f'"revision":"{"x" * 201}"')),
        "manifest field base.revision: at most 200 characters",
    ),
    "a NUL in a label": (with_manifest(TEXT.replace('"task":null', '"task":"a\\u0000"')), "manifest field task"),
    "a NUL in the name": (with_manifest(TEXT.replace('"name":"tiny', '"name":"\\u0000tiny')), "holds a NUL character"),
    "a NUL in the training": (
        with_manifest(TEXT.replace('"training":{}', '"training":{"a":["\\\\\\u0000"]}')),
        "holds a NUL character",
    ),
    "a NUL in a key of the training": (
        with_manifest(TEXT.replace('"training":{}', '"training":{"\\u0000":1}')),
        "holds a NUL character",
    ),
    "no tensors": (join(f"{{{META}}}", b""), "it holds no vectors"),
    "path-like name": (changed(rename(UP, "../../etc/passwd")), "'../../etc/passwd' is not a parameter name"),
    "absolute name": (changed(rename(UP, "/weight")), "is not a parameter name"),
    "empty name": (changed(rename(UP, "")), "is not a parameter name"),
    "name with a line break": (changed(rename(UP, "a\nb")), "is not a parameter name"),
    "overlong name": (changed(rename(UP, "a" * 201)), "is not a parameter name"),
    "50,000 empty tensors": (many_tensors(50_000), "a header of"),
    "an empty tensor": (many_tensors(1), "t0 is not a vector"),
    "integers": (with_tensor(np.ones(3, np.int32), "I32", [3], {UP: 3}), "has type I32"),
    "doubles": (with_tensor(np.ones(3), "F64", [3], {UP: 3}), "has type F64"),
    "two dimensions": (with_tensor(np.ones((3, 1), np.float32), "F32", [3, 1], {UP: 3}), "is not a vector"),
    "no dimension": (with_tensor(np.ones(1, np.float32), "F32", [], {UP: 1}), "is not a vector"),
    "shape of booleans": (changed(entry(UP, shape=[True])), "is not a vector"),
    "shape of fractions": (changed(entry(UP, shape=[3.0])), "is not a vector"),
    "negative shape": (changed(entry(UP, shape=[-3])), "is not a vector"),
    "entry not an object": (changed(lambda header: header.update({UP: 3})), "malformed header entry"),
    "entry with another key": (changed(entry(UP, stride=1)), "malformed header entry"),
    "offsets of another length": (changed(entry(UP, data_offsets=[0, 8])), "has wrong data offsets"),
    "offsets backwards": (changed(entry(UP, data_offsets=[12, 0])), "has wrong data offsets"),
    "negative offsets": (changed(entry(UP, data_offsets=[-12, 0])), "has wrong data offsets"),
    "offsets beyond the data": (changed(entry(UP, data_offsets=[1000, 1012])), "it is truncated"),
    "a hole": (changed(shifted, bytes(4) + BODY), "holes or overlaps"),
    "overlap": (changed(overlapping), "holes or overlaps"),
    "trailing bytes": (VALID + b"\0", "1 bytes trail its data"),
    "NaN": (with_tensor(np.array([1, np.nan], "f4"), "F32", [2], {UP: 2}), f"{UP}[1] is nan"),
    "infinity": (with_tensor(np.array([-np.inf], "f4"), "F32", [1], {UP: 1}), f"{UP}[0] is -inf"),
    "infinity in BF16": (with_tensor(np.array([0x7F80], "<u2"), "BF16", [1], {UP: 1}), f"{UP}[0] is inf"),
    "rank unlike the manifest": (
        with_tensor(np.ones(3, "f4"), "F32", [3], {UP: 4}),
        f"{UP} has 3 values, the manifest says 4",
    ),
    "tensor not in the manifest": (
        with_tensor(np.ones(3, "f4"), "F32", [3], {DOWN: 3, UP: 3}),
        f"{DOWN} has no values, the manifest says 3",
    ),
}


HEADER = VALID[8 : -len(BODY)]
PLAIN = HEADER.rstrip(b" ")
TURNED = {name: dict(reversed(part.items())) for name, part in split(VALID)[0].items()}


def framed(header: bytes, body: bytes = BODY) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def padded(text: str) -> bytes:
    raw = text.encode()
    return raw + b" " * (-len(raw) % 8)


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def exchanged() -> bytes:
    """Swap the data of the two tensors."""
    header, body = split(VALID)
    middle = header[DOWN]["data_offsets"][1]
    header[UP]["data_offsets"] = [0, len(body) - middle]
    header[DOWN]["data_offsets"] = [len(body) - middle, len(body)]
    return framed(padded(compact(header)), body[middle:] + body[:middle])


def ordered(*names: str) -> str:
    return compact({name: split(VALID)[0][name] for name in names})


LAYOUTS = {
    "leading white space": framed(b" " * 8 + HEADER),
    "leading line breaks": framed(b"\n\n\n\n\r\n\t " + HEADER),
    "more padding": framed(HEADER + b" " * 8),
    "padding to another multiple": framed(HEADER + b" " * 64),
    "no padding": framed(PLAIN + b" " if len(PLAIN) % 8 == 0 else PLAIN),
    "padding of tabs": framed(PLAIN + b"\t" * (8 - len(PLAIN) % 8)),
    "spaces between": framed(padded(json.dumps(split(VALID)[0]))),
    "metadata last": framed(padded(ordered(DOWN, UP, "__metadata__"))),
    "tensors in another order": framed(padded(ordered("__metadata__", UP, DOWN))),
    "keys of entries in another order": framed(padded(compact(TURNED))),
    "escaped characters": framed(padded(PLAIN.decode().replace("model", "\\u006dodel"))),
    "data in another order": exchanged(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_expert_has_one_layout_and_so_one_digest(layout: str) -> None:
    with pytest.raises(ExpertFileError, match=r"^x is not a valid expert file: its header is not canonical"):
        decode_expert(LAYOUTS[layout], "x")
    read = decode_expert(LAYOUTS[layout], "x", canonical=False)
    again = rewrite_expert(LAYOUTS[layout], "x")
    assert decode_expert(again, "x").manifest == read.manifest
    assert again == encode_expert(read.manifest, read.vectors)


def test_the_layout_is_that_of_the_safetensors_library() -> None:
    arrays = {
        f"{dtype}.{name}": np.ones(size, dtype)
        for dtype in ("float16", "float32")
        for name, size in [("b", 3), ("a", 1), ("c", 2)]
    }
    text = manifest(
        name="\x01\x1f\x7f\x80\\ \b\f\n\r\t é😀\u2028/",
        targets={name: len(array) for name, array in arrays.items()},
    ).canonical()
    data = safetensors.numpy.save(arrays, metadata={METADATA_KEY: text})
    assert decode_expert(data, "x").vectors.keys() == arrays.keys()
    assert rewrite_expert(data, "x") == data
    assert safetensors.numpy.save(VECTORS, metadata={METADATA_KEY: manifest().canonical()}) == VALID


def test_a_backslash_before_u0000_is_no_nul() -> None:
    given = manifest(task="\\u0000", training={"a": "\\\\u0000"})
    assert decode_expert(encode_expert(given, VECTORS), "x").manifest == given


@pytest.mark.parametrize(
    "fields",
    [
        {"task": "x" * 201},
        {"domain": "a\x00"},
        {"training": {"note": "\x00"}},
        {"training": {"note": "\ud800"}},
    ],
)
def test_what_an_upload_refuses_is_not_written(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ExpertFileError):
        write_expert(tmp_path / "x.safetensors", manifest(**fields), VECTORS)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_layout_is_read_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(LAYOUTS["more padding"])
    assert read_expert(path).digest == hashlib.sha256(LAYOUTS["more padding"]).hexdigest()
    with pytest.raises(ExpertFileError, match="not canonical"):
        read_expert(path, canonical=True)


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_named_in_one_line(rule: str) -> None:
    data, why = BROKEN[rule]
    with pytest.raises(ExpertFileError) as caught:
        decode_expert(data, "bad.safetensors")
    assert why in str(caught.value)
    assert str(caught.value).startswith("bad.safetensors is not a valid expert file: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_files_that_are_broken_here_differ_from_the_valid_one_in_the_named_place_only() -> None:
    assert decode_expert(changed(lambda header: None), "x").vectors[UP].tolist() == [0.5, 1.0, -2.25]
    assert decode_expert(with_manifest(TEXT), "x").manifest == manifest()
    assert decode_expert(with_tensor(np.ones(3, "f4"), "F32", [3], {UP: 3}), "x").vectors[UP].tolist() == [1, 1, 1]


@given(st.data())
def test_mutated_bytes_are_refused_or_valid(data: st.DataObject) -> None:
    raw = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(["replace", "insert", "delete", "flip"])):
            case "replace":
                piece = data.draw(st.binary(max_size=8))
                raw[at : at + len(piece)] = piece
            case "insert":
                raw[at:at] = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(TOKENS)))
            case "delete":
                del raw[at : at + data.draw(st.integers(1, min(8, len(raw) - 1)))]
            case "flip":
                raw[at] ^= 1 << data.draw(st.integers(0, 7))
    refused_or_valid(bytes(raw))


TOKENS = [b"{", b"}", b'"', b",", b"\\ud800", b"null", b"1e999", b"-1", b"NaN", b"[[[[", b"\\u0000"]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(field=st.sampled_from(sorted(Manifest.model_fields)), value=JSON)
def test_a_manifest_with_any_value_in_a_field_is_refused_or_valid(field: str, value: Any) -> None:
    values = json.loads(TEXT)
    values[field] = value
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    header, body = split(VALID)
    header["__metadata__"][METADATA_KEY] = text
    refused_or_valid(join(header, body))


@given(part=st.sampled_from(["dtype", "shape", "data_offsets"]), value=JSON)
def test_a_tensor_entry_with_any_value_is_refused_or_valid(part: str, value: Any) -> None:
    refused_or_valid(changed(entry(UP, **{part: value})))


def refused_or_valid(data: bytes) -> None:
    try:
        read = decode_expert(data, "x")
    except ExpertFileError:
        return
    assert {name: len(vector) for name, vector in read.vectors.items()} == read.manifest.targets
    assert all(np.isfinite(vector).all() for vector in read.vectors.values())
    again = decode_expert(encode_expert(read.manifest, read.vectors), "x")
    assert again.manifest == read.manifest


def test_a_lone_surrogate_in_the_manifest_is_refused() -> None:
    header, body = split(VALID)
    header["__metadata__"][METADATA_KEY] = TEXT.replace('"training":{}', '"training":{"x":"\ud800"}')
    with pytest.raises(ExpertFileError):
        decode_expert(join(json.dumps(header), body), "x")


@pytest.mark.parametrize(
    ("dtype", "raw", "expected"),
    [
        ("F16", np.array([1.0, -0.5, 65504.0], "<f2"), [1.0, -0.5, 65504.0]),
        ("BF16", np.array([0x3F80, 0xBF00, 0x7F7F], "<u2"), [1.0, -0.5, 3.3895313892515355e38]),
    ],
)
def test_half_precision_is_read_exactly(dtype: str, raw: npt.NDArray[Any], expected: list[float]) -> None:
    read = decode_expert(with_tensor(raw, dtype, [3], {UP: 3}), "x")
    assert read.vectors[UP].dtype == np.float32
    assert read.vectors[UP].tolist() == expected


@pytest.mark.parametrize(
    ("vectors", "why"),
    [
        ({UP: VECTORS[UP]}, f"{DOWN} has no values, the manifest says 2"),
        ({**VECTORS, "extra.weight": VECTORS[UP]}, "extra.weight has 3 values, the manifest says none"),
        ({**VECTORS, UP: np.ones(4, "f4")}, f"{UP} has 4 values, the manifest says 3"),
        ({**VECTORS, UP: np.array([1, np.nan, 1], "f4")}, f"{UP}[1] is nan"),
        ({**VECTORS, UP: np.ones((3, 1), "f4")}, "is not a vector"),
        ({}, "it holds no vectors"),
    ],
)
def test_what_cannot_be_read_is_not_written(vectors: dict[str, Vector], why: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(ExpertFileError) as caught:
        write_expert(path, manifest(), vectors)
    assert why in str(caught.value)
    assert "tiny-math" in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_absent_file_and_a_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(ExpertFileError, match=r"cannot read the expert .*gone\.safetensors: No such file"):
        read_expert(tmp_path / "gone.safetensors")
    with pytest.raises(ExpertFileError, match="Is a directory"):
        read_expert(tmp_path)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ExpertFileError, match="over the limit"):
        read_expert(path)
