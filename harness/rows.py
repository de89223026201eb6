"""Hash, compare and read docs of a split without loading all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import pyarrow  # type: ignore[import-untyped]
import pyarrow.compute  # type: ignore[import-untyped]
from datasets import Dataset, Value
from datasets.features.features import require_decoding

from t2.core.digests import doc_hash

_BATCH = 1000


class ChosenDocs(Sequence[Any]):
    """Selected docs of a split in any order; each is read on access."""

    def __init__(self, docs: Sequence[Any], indices: Sequence[int]) -> None:
        self._docs = docs
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> ChosenDocs: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return ChosenDocs(self._docs, self._indices[index])
        return self._docs[int(self._indices[index])]


def as_sequence(docs: Any) -> Sequence[Any]:
    """Return docs as a sequence: a data set, list or tuple unchanged, anything else as a list."""
    return docs if isinstance(docs, (Dataset, list, tuple)) else list(docs)


def iterate(docs: Any) -> Iterator[Any]:
    """Yield docs as indexing returns them, but read a data set in batches."""
    if not _is_plain(docs) or require_decoding(docs.features):
        yield from docs
        return
    for table in docs.with_format("arrow").iter(_BATCH):
        # Converts values as the Python formatter of datasets does for a row.
        columns = table.to_pydict()
        for row in range(len(table)):
            yield {name: column[row] for name, column in columns.items()}


def share_content(docs: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two sequences have a doc in common, by content hash.

    Only docs whose texts all occur in the other sequence are hashed: equal docs have equal texts in every column.
    """
    fields = sorted(_text_fields(docs) & _text_fields(others))
    if not fields:
        return not {doc_hash(doc) for doc in iterate(others)}.isdisjoint(map(doc_hash, iterate(docs)))
    candidates = _find_matching(docs, {field: _texts(others, field) for field in fields})
    if not len(candidates):
        return False
    hashes = {doc_hash(docs[int(i)]) for i in candidates}
    wanted = {field: _texts(docs, field).take(candidates) for field in fields}
    return any(doc_hash(others[int(i)]) in hashes for i in _find_matching(others, wanted))


def rows_with(docs: Sequence[Any], values: Mapping[str, Any]) -> Sequence[int]:
    """Positions of the docs with the given texts; of all docs if no text column can be compared."""
    fields = [name for name in sorted(_text_fields(docs)) if isinstance(values.get(name), str)]
    if not fields:
        return range(len(docs))
    found = _find_matching(docs, {name: pyarrow.array([values[name]], pyarrow.large_string()) for name in fields})
    return [int(i) for i in found]


def _find_matching(docs: Sequence[Any], values: Mapping[str, Any]) -> Any:
    mask = np.ones(len(docs), dtype=bool)
    for field, known in values.items():
        mask &= pyarrow.compute.is_in(_texts(docs, field), value_set=known).to_numpy(zero_copy_only=False)
    return np.flatnonzero(mask)


def _is_plain(docs: Any) -> bool:
    return isinstance(docs, Dataset) and docs.format["type"] is None


def _text_fields(docs: Sequence[Any]) -> set[str]:
    """Names of the columns that hold only texts and nulls."""
    if isinstance(docs, Dataset):
        found = docs.features.items() if _is_plain(docs) else ()
        return {name for name, one in found if isinstance(one, Value) and one.dtype in ("string", "large_string")}
    if not docs or not all(isinstance(doc, dict) for doc in docs):
        return set()
    names = set.intersection(*(set(doc) for doc in docs))
    return {name for name in names if all(isinstance(doc[name], (str, type(None))) for doc in docs)}


def _texts(docs: Sequence[Any], field: str) -> Any:
    if isinstance(docs, Dataset):
        column = docs.select_columns([field]).with_format("arrow")[:].column(field)
        return column.cast(pyarrow.large_string()).combine_chunks()
    return pyarrow.array([doc[field] for doc in docs], pyarrow.large_string())
