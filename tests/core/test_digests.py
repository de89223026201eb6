"""Equal values have equal digests, whatever the order of their keys."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2.core.digests import canonical_json, digest_of, doc_hash, sha256_file
from t2.core.manifest import pack_hashes, unpack_hashes

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON))
def test_the_order_of_keys_does_not_change_a_digest(value: dict[str, Any]) -> None:
    turned = {key: value[key] for key in reversed(value)}
    assert canonical_json(turned) == canonical_json(value)
    assert doc_hash(turned) == doc_hash(value)
    assert len(doc_hash(value)) == 12
    assert digest_of({**value, "key": 1}) != digest_of({**value, "key": 2})


def test_canonical_json_refuses_what_is_not_json() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json({"x": math.nan})


def test_a_document_of_other_values_has_a_hash() -> None:
    assert doc_hash({"x": Path("a")}) == doc_hash({"x": Path("a")}) != doc_hash({"x": Path("b")})


def test_a_file_has_the_digest_of_its_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


@given(st.lists(st.binary(min_size=6, max_size=6).map(bytes.hex)))
def test_document_hashes_are_packed_as_a_set(hashes: list[str]) -> None:
    packed = pack_hashes(hashes)
    assert unpack_hashes(packed) == sorted(set(hashes))
    assert pack_hashes(reversed(hashes)) == packed


@pytest.mark.parametrize("packed", ["AAAA", "A", "!!!!!!!!", "é"])
def test_what_is_no_pack_of_hashes_is_refused(packed: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        unpack_hashes(packed)
