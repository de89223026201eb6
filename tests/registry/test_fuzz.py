"""Experts that are almost valid, or not at all: nothing but a refusal, or a file that keeps the profile to the letter.

``T2_TEST_FUZZ=100000`` makes that many files, instead of some thousands.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t2.core.digests import sha256
from t2.core.errors import ExpertFileError, InvalidRequestError, TooLargeError
from t2.core.expertfile import MAX_FILE_BYTES, MAX_HEADER_BYTES, ExpertFile, decode_expert
from t2.core.manifest import pack_hashes
from t2.core.references import ExpertName
from t2.registry.services.actor import Limits
from t2.registry.services.service import Service
from tests.registry.registries import STORAGES, registry
from tests.registry.samples import expert_bytes

COUNT = int(os.environ.get("T2_TEST_FUZZ", "4000"))
SEED = int(os.environ.get("T2_TEST_SEED", "0"))
ITEM = {"F32": 4, "F16": 2, "BF16": 2}


def profile(data: bytes) -> dict[str, Any]:
    """docs/formats.md, said once more, by other means than the product's. Returns the header."""
    assert 8 <= len(data) <= 64 * 2**20
    size = int.from_bytes(data[:8], "little")
    assert size <= 2**20
    assert 8 + size <= len(data)
    header = strict_json(data[8 : 8 + size].decode("utf-8"))
    assert type(header) is dict
    metadata = header["__metadata__"]
    assert set(metadata) == {"t2"}
    manifest = strict_json(metadata["t2"])
    assert json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False) == metadata["t2"]
    manifest_profile(manifest)
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    assert {name: entry["shape"][0] for name, entry in tensors.items()} == manifest["targets"]
    assert tensors
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"][0]):
        assert 1 <= len(name) <= 200
        assert re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", name, re.ASCII)
        assert entry.keys() == {"dtype", "shape", "data_offsets"}
        (rank,) = entry["shape"]
        start, stop = entry["data_offsets"]
        assert all(type(number) is int for number in (rank, start, stop))
        assert rank >= 1
        assert start == end
        assert stop == start + rank * ITEM[entry["dtype"]]
        end = stop
        assert np.isfinite(values(entry["dtype"], data[8 + size + start : 8 + size + stop])).all()
    assert 8 + size + end == len(data)
    ordered = sorted(tensors, key=lambda name: ("F32 BF16 F16".index(tensors[name]["dtype"]), name))
    plain = {name: {key: tensors[name][key] for key in ("dtype", "shape", "data_offsets")} for name in ordered}
    assert data[8 : 8 + size] == laid_out({"__metadata__": metadata, **plain})
    assert [tensors[name]["data_offsets"][0] for name in ordered] == sorted(
        entry["data_offsets"][0] for entry in tensors.values()
    )
    return tensors


def laid_out(header: dict[str, Any]) -> bytes:
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
    return raw + b" " * (-len(raw) % 8)


def manifest_profile(manifest: dict[str, Any]) -> None:
    fields = {"schema_version", "kind", "name", "base", "targets", "task", "domain", "method", "training"}
    fields |= {"training_docs", "parents"}
    assert manifest.keys() - {"labels"} == fields
    assert type(manifest["schema_version"]) is int
    assert manifest["schema_version"] == 1
    assert manifest["kind"] in {"expert", "classifier", "mixture"}
    base = manifest["base"]
    assert base.keys() == {"id", "revision", "fingerprint"}
    for label in (manifest["name"], base["id"], *manifest["targets"], *manifest.get("labels", ["x"])):
        assert type(label) is str
        assert 1 <= len(label) <= 200
    if "labels" in manifest:
        assert manifest["labels"]
    for text in (manifest["task"], manifest["domain"], manifest["method"], base["revision"]):
        assert text is None or len(text) <= 200
    assert re.fullmatch("[0-9a-f]{64}", base["fingerprint"])
    assert all(type(rank) is int and rank >= 1 for rank in manifest["targets"].values())
    assert type(manifest["training"]) is dict
    assert not any("\x00" in text for text in texts(manifest))
    hashes = base64.b64decode(manifest["training_docs"], validate=True)
    assert len(hashes) % 6 == 0
    parts = [hashes[i : i + 6] for i in range(0, len(hashes), 6)]
    assert parts == sorted(set(parts))
    for parent in manifest["parents"]:
        assert parent.keys() == {"digest", "alpha"}
        assert re.fullmatch("[0-9a-f]{64}", parent["digest"])
        assert type(parent["alpha"]) is float
        assert math.isfinite(parent["alpha"])


def texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for one in value:
            yield from texts(one)
    elif isinstance(value, str):
        yield value


def strict_json(text: str) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({name for name, _ in items}) == len(items)
        return dict(items)

    def constant(name: str) -> None:
        raise AssertionError(name)

    text.encode()  # no lone surrogates, however they are written
    value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def values(dtype: str, raw: bytes) -> Any:
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[dtype]).astype("<f4")


def judged(data: bytes) -> ExpertFile | None:
    """What the reader makes of bytes: a refusal in one line, or a file that is as it must be."""
    try:
        file = decode_expert(data, "upload")
    except ExpertFileError as error:
        check_line(error)
        return None
    tensors = profile(data)
    read = dict(safetensors.deserialize(data))
    assert read.keys() == tensors.keys() == file.vectors.keys()
    for name, vector in file.vectors.items():
        assert vector.dtype == np.float32
        np.testing.assert_array_equal(vector, values(read[name]["dtype"], bytes(read[name]["data"])))
    assert file.digest == sha256(data)
    return file


def check_line(error: Exception) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 1000


def corpus() -> list[bytes]:
    """Valid experts of every kind and type."""
    docs = pack_hashes(f"{i:012x}" for i in range(5))
    made = [
        expert_bytes(0),
        expert_bytes(1, matrices=1, rank=1),
        expert_bytes(2, matrices=9, rank=3, training={"lr": 0.1, "deep": [{"a": [None, True, 1e300]}]}),
        expert_bytes(
            3, kind="mixture", parents=({"digest": "d" * 64, "alpha": -0.5}, {"digest": "e" * 64, "alpha": 1})
        ),
        expert_bytes(4, kind="classifier", labels=("math", "Grüße ✓ 😀")),
        expert_bytes(5, task=None, domain=None, method=None, training_docs=docs),
    ]
    for dtype in ("F16", "BF16"):
        entries = {"b.weight": ("F32", np.ones(2, "<f4").tobytes()), "a.weight": (dtype, b"\x80\x3f" * 4)}
        made.append(assemble(*disassembled(made[0]), tensors=entries))
    return made


def disassembled(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Header, manifest and data of a file."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return header, json.loads(header["__metadata__"]["t2"]), data[8 + size :]


def assemble(
    header: dict[str, Any],
    manifest: dict[str, Any],
    body: bytes,
    *,
    tensors: dict[str, tuple[str, bytes]] | None = None,
) -> bytes:
    if tensors is not None:
        header, body = {"__metadata__": {}}, b""
        for name, (dtype, raw) in tensors.items():
            shape = [len(raw) // ITEM[dtype]]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(raw)]}
            body += raw
        manifest = {**manifest, "targets": {name: header[name]["shape"][0] for name in tensors}}
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    header = {**header, "__metadata__": {"t2": text}}
    return framed(laid_out(header), body)


def framed(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


CORPUS = corpus()
TOKENS = [
    *(
        b"NaN",
        b"Infinity",
        b"-0",
        b"1e999",
        b"0x1",
        b"1.0",
        b"true",
        b"null",
        b'""',
        b"[]",
        b"{}",
        b"[" * 2000,
        b'{"a":' * 500,
    ),
    *(
        b"\\ud800",
        b"\\u0000",
        b"\x00",
        b"\xff\xfe",
        b"\xc0\xaf",
        b"\xef\xbb\xbf",
        b"../../../etc/passwd",
        b"__metadata__",
    ),
    *(b'"t2":"', b"F64", b"I8", b"18446744073709551616", b"9" * 5000, b"-1", b",", b"}", b" ", b"\\", b'"', b"\n"),
]


def mutated(random: np.random.Generator) -> bytes:
    """A valid file after one to four accidents."""
    data = bytearray(CORPUS[random.integers(len(CORPUS))])
    for _ in range(random.integers(1, 5)):
        at = int(random.integers(len(data) + 1))
        size = min(int.from_bytes(data[:8], "little"), len(data)) if len(data) >= 8 else 0
        in_header = 8 + int(random.integers(size + 1))
        match int(random.integers(12)):
            case 0 if data:
                data[at % len(data)] ^= 1 << int(random.integers(8))
            case 1:
                del data[at:]
            case 2:
                data += random.bytes(int(random.integers(1, 40)))
            case 3:
                del data[at : at + int(random.integers(1, 30))]
            case 4:
                data[at:at] = data[at : at + int(random.integers(1, 60))]
            case 5:
                other = CORPUS[random.integers(len(CORPUS))]
                data[at:] = other[int(random.integers(len(other))) :]
            case 6:
                length = int(
                    random.choice([size + int(random.integers(-9, 10)), 2**63, 2**64 - 1, 0, 2**20 + 1, len(data)])
                )
                data[:8] = (length % 2**64).to_bytes(8, "little")
            case 7 | 8:
                token = TOKENS[random.integers(len(TOKENS))]
                cut = int(random.integers(4))
                data[in_header : in_header + cut] = token
                # Most such changes should be met by the parser behind the length, not by the length.
                data[:8] = (size + len(token) - cut).to_bytes(8, "little", signed=True) if size else data[:8]
            case 9 if size and in_header < len(data):
                data[in_header] = b"0123456789"[random.integers(10)]
            case 10 if len(data) > 8 + size + 4:
                place = 8 + size + int(random.integers(len(data) - 8 - size - 4))
                data[place : place + 4] = np.array([np.nan, np.inf, -np.inf, 0], "<f4")[random.integers(4)].tobytes()
            case _ if data:
                data[at % len(data)] = int(random.integers(256))
    return bytes(data)


def test_mutated_files() -> None:
    random = np.random.default_rng(SEED)
    accepted = 0
    for turn in range(COUNT * 9 // 10):
        data = mutated(random)
        try:
            accepted += judged(data) is not None
        except BaseException as error:
            error.add_note(f"turn {turn} of seed {SEED}: {data!r}")
            raise
    print(f"{COUNT * 9 // 10} mutated files, {accepted} accepted")
    assert 0 < accepted < COUNT * 3 // 10


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["", "../x", "a" * 201, "\x00", "f" * 64, "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ["a.weight", "a..b", ".a", "a.", "/etc/passwd", "a/b", "", "é", "a" * 201, "__metadata__", "a\n", "1a"]
)


@st.composite
def edited(draw: st.DrawFn) -> bytes:
    """A valid file after edits of its structure that keep it well-formed."""
    header, manifest, body = disassembled(draw(st.sampled_from(CORPUS)))
    for _ in range(draw(st.integers(0, 3))):
        tensors = [name for name in header if name != "__metadata__"]
        match draw(st.integers(0, 9)):
            case 0:
                field = draw(st.sampled_from([*manifest, "labels", "extra"]))
                manifest[field] = draw(JSON)
            case 1:
                manifest.pop(draw(st.sampled_from(sorted(manifest))), None)
            case 2 if isinstance(manifest.get("base"), dict):
                manifest["base"][draw(st.sampled_from(["id", "revision", "fingerprint", "more"]))] = draw(JSON)
            case 3 if tensors:
                entry = header[draw(st.sampled_from(tensors))]
                if isinstance(entry, dict):
                    entry[draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))] = draw(
                        JSON
                        | st.sampled_from(["F64", "F16", "BF16", "I8", "BOOL"])
                        | st.lists(st.integers(-1, 40), max_size=3)
                    )
            case 4 if tensors:
                name = draw(NAMES)
                header[name] = header.pop(draw(st.sampled_from(tensors)))
                if isinstance(manifest.get("targets"), dict):
                    manifest["targets"][name] = 8
            case 5:
                header[draw(NAMES)] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
            case 6:
                body += draw(st.binary(max_size=9))
            case 7:
                manifest["training"] = draw(st.dictionaries(st.text(max_size=4), JSON, max_size=3))
            case 8:
                manifest["parents"] = draw(
                    st.lists(st.fixed_dictionaries({"digest": st.just("d" * 64), "alpha": st.floats() | st.integers()}))
                )
            case _:
                docs = draw(st.binary(max_size=20))
                manifest["training_docs"] = base64.b64encode(docs).decode() + draw(st.sampled_from(["", "=", "\n"]))
    try:
        data = assemble(header, manifest, body)
    except (UnicodeEncodeError, KeyError):
        data = CORPUS[0]
    if draw(st.booleans()):
        size = int.from_bytes(data[:8], "little")
        text = data[8 : 8 + size]
        change: Callable[[bytes], bytes] = draw(
            st.sampled_from(
                [
                    lambda text: text + b"  ",
                    lambda text: b"\xef\xbb\xbf" + text,
                    lambda text: text.replace(b'"dtype"', b'"dtype": "F32", "dtype"', 1),
                    lambda text: text.replace(b'{"', b'{"__metadata__": {}, "', 1),
                    lambda text: text.replace(b"a", b"\\u0061"),
                    lambda text: text.replace(b":", b" :"),
                    lambda text: text.replace(b"[", b"[" * 900),
                    lambda text: text.decode("utf-8", "replace").encode("utf-16"),
                ]
            )
        )
        data = framed(change(text), data[8 + size :])
    return data


@settings(
    max_examples=max(COUNT // 10, 1),
    deadline=None,
    database=None,
    derandomize="T2_TEST_SEED" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
@given(edited())
def test_edited_files(data: bytes) -> None:
    judged(data)


@pytest.fixture(params=STORAGES)
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    with registry(request.param, tmp_path, request) as made:
        made.limits = Limits(upload_bytes=20_000)
        yield made


def test_uploads_are_refused_in_one_way_or_kept_whole(service: Service) -> None:
    """What the reader accepts the database takes as well, and what it refuses leaves nothing."""
    random = np.random.default_rng(SEED)
    outcomes: Counter[str] = Counter()
    digests = set()
    texts: list[Any] = ["\x00", "a\x00b", "\ud7ff", "😀", "'; DROP TABLE expert; --", "x" * 199, "\u202e", "%s", "\r\n"]
    texts += ["x" * 100_000]
    files = [
        expert_bytes(seed, matrices=4, rank=8, **{field: text})
        for seed, text in enumerate(texts)
        for field in ("name", "task", "domain", "method")
        if field != "name" or len(text) <= 200
    ]
    files += [mutated(random) for _ in range(max(200, COUNT // 50))]
    for turn, data in enumerate(files):
        name = ExpertName("fuzz", f"e{turn}")
        try:
            version = service.publish(name, data)
        except (InvalidRequestError, TooLargeError) as error:
            outcomes[type(error).__name__] += 1
            check_line(error)
            continue
        outcomes["accepted"] += 1
        profile(data)
        assert service.download(version.digest) == data
        assert service.get_expert(name).latest is not None
        digests.add(version.digest)
    assert {info.digest for info in service.store.list()} == digests
    assert len(service.list_experts(limit=200).items) == min(outcomes["accepted"], 200)
    assert outcomes["InvalidRequestError"] > 100
    assert outcomes["accepted"] > 10


def test_memory_is_bounded_by_the_limits() -> None:
    """At most four times the file and eighty times the longest header, whatever the bytes say."""
    header, manifest, body = disassembled(CORPUS[0])
    full = MAX_HEADER_BYTES
    plain = json.dumps(header)[:-1]

    def stuffed(unit: str, close: str = "", head: str = '{"x":[', tail: str = "1]}") -> bytes:
        count = (full - 100) // (len(unit) + len(close))
        return framed((head + unit * count + close * count + tail).encode(), b"")

    many = ",".join(f'"a{i:05}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(full // 60))
    deep = json.dumps({**manifest, "training": {"x": [[]] * (full // 3 - 2000)}}, sort_keys=True, separators=(",", ":"))
    files = {
        "lists": stuffed("[],"),
        "objects": stuffed('{"a":1},'),
        "numbers": stuffed("1,"),
        "floats": stuffed("1.5,"),
        "nested": stuffed("[", "]"),
        "nested objects": stuffed('{"a":', "}", head='{"x":', tail="}"),
        "keys": framed(("{" + ",".join(f'"{i}":1' for i in range(full // 11)) + "}").encode(), b""),
        "long number": framed(b'{"x":' + b"9" * (full - 10) + b"}", b""),
        "long text": framed(b'{"x":"' + b"\\u00ff" * (full // 7) + b'"}', b""),
        "tensors": framed((plain + "," + many + "}").encode()[:full], body),
        "manifest": framed(laid_out({**header, "__metadata__": {"t2": deep}}), body),
        "announced header": (2**63).to_bytes(8, "little") + b"{}",
        "announced tensor": assemble(
            {**header, "a.weight": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64]}}, manifest, body
        ),
        "large": framed(b"{}", bytes(MAX_FILE_BYTES - 10)),
        "too large": bytes(MAX_FILE_BYTES + 1),
        "valid": expert_bytes(0, matrices=20, rank=50_000),
    }
    peaks = {}
    for name, data in files.items():
        tracemalloc.start()
        try:
            accepted = judged_quietly(data)
            peaks[name] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert accepted == (name in {"valid", "manifest"}), name
        size = len(data) if len(data) <= MAX_FILE_BYTES else 0
        assert peaks[name] <= 4 * size + 80 * min(full, len(data)) + 100_000, (name, peaks[name] / len(data))
    print({name: f"{peak / 2**20:.1f} MiB" for name, peak in peaks.items()})


def judged_quietly(data: bytes) -> bool:
    try:
        decode_expert(data, "upload")
    except ExpertFileError:
        return False
    return True
