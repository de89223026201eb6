"""Docs of a split without loading them all: hashed in Arrow batches, compared by column, read one by one."""

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
    """Some docs of a split in an order of their own; each is read when it is used."""

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
    """Docs that can be read by their position: a data set as it is, anything else as a list."""
    return docs if isinstance(docs, (Dataset, list, tuple)) else list(docs)


def iterate(docs: Any) -> Iterator[Any]:
    """The docs as indexing gives them, of a data set a batch at a time."""
    if not _is_plain(docs) or require_decoding(docs.features):
        yield from docs
        return
    for table in docs.with_format("arrow").iter(_BATCH):
        # As datasets' own Python formatter does for a row.
        columns = table.to_pydict()
        for row in range(len(table)):
            yield {name: column[row] for name, column in columns.items()}


def share_content(docs: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether some of the docs are among the others, by their content hash.

    Only docs whose texts all occur among the others are hashed: equal docs have equal texts in every column.
    """
    fields = sorted(_text_fields(docs) & _text_fields(others))
    if not fields:
        return not {doc_hash(doc) for doc in iterate(others)}.isdisjoint(map(doc_hash, iterate(docs)))
    candidates = _matching(docs, {field: _texts(others, field) for field in fields})
    if not len(candidates):
        return False
    hashes = {doc_hash(docs[int(i)]) for i in candidates}
    wanted = {field: _texts(docs, field).take(candidates) for field in fields}
    return any(doc_hash(others[int(i)]) in hashes for i in _matching(others, wanted))


def rows_with(docs: Sequence[Any], values: Mapping[str, Any]) -> Sequence[int]:
    """Positions of the docs that hold the given texts; of all docs where no column of texts can be compared."""
    fields = [name for name in sorted(_text_fields(docs)) if isinstance(values.get(name), str)]
    if not fields:
        return range(len(docs))
    found = _matching(docs, {name: pyarrow.array([values[name]], pyarrow.large_string()) for name in fields})
    return [int(i) for i in found]


def _matching(docs: Sequence[Any], values: Mapping[str, Any]) -> Any:
    mask = np.ones(len(docs), dtype=bool)
    for field, known in values.items():
        mask &= pyarrow.compute.is_in(_texts(docs, field), value_set=known).to_numpy(zero_copy_only=False)
    return np.flatnonzero(mask)


def _is_plain(docs: Any) -> bool:
    return isinstance(docs, Dataset) and docs.format["type"] is None


def _text_fields(docs: Sequence[Any]) -> set[str]:
    """Names of the columns that hold texts, or nothing."""
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
