"""A run without adaptation docs reads only what it needs; other runs draw the same docs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import pytest
from lm_eval.models.huggingface import HFLM

from t2.core.digests import doc_hash
from t2.core.seeds import generator
from t2.harness import pool as pools
from t2.harness import rows
from t2.harness.overlap import DocMarks
from t2.harness.pool import Pool, draw, find_pool
from t2.harness.rows import iterate, rows_with, share_content
from t2.harness.tasks import TaskDocs
from tests.harness import tiny

MANY = 3000


def read_whole(task: Any) -> tuple[str, list[Any], frozenset[str]]:
    """The pool by its definition: every doc of every split loaded and hashed."""
    scored = {doc_hash(doc) for doc in task.eval_docs}
    marks = DocMarks(task)
    asked = {marks.asked(doc) for doc in task.eval_docs} - {None}
    for split, read in pools._splits(task):
        found = {doc_hash(doc): doc for doc in read()}
        others = {digest: doc for digest, doc in found.items() if marks.asked(doc) not in asked}
        if found and not scored & found.keys() and others:
            return split, [others[digest] for digest in sorted(others)], frozenset(scored)
    return "carved", [], frozenset(scored)


def relabelled(docs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**doc, "gold": (doc["gold"] + 1) % 4} for doc in docs]


TEST, TRAIN = tiny.questions(5), tiny.questions(MANY, 1000)
SPLITS: dict[str, Mapping[str, Any]] = {
    "apart": {"test": TEST, "training": TRAIN},
    "one shared at the end": {"test": TEST, "training": [*TRAIN, TEST[3]]},
    "one asked under another label": {"test": TEST, "training": [*relabelled(TEST), *TRAIN]},
    "all asked under another label": {"test": TEST, "training": relabelled(TEST) * 10},
    "validation shares, training does not": {"test": TEST, "validation": [*TRAIN[:3], TEST[0]], "training": TRAIN},
    "twice the same": {"test": TEST, "training": [*TRAIN[:50], *TRAIN[:50]]},
    "nothing else": {"test": TEST},
}
FORMS: dict[str, Mapping[str, Any]] = {
    "columns": {},
    "a function asks": {"doc_to_text": lambda doc: f"Q: {doc['q']}\nA:"},
    "selected rows": {"process_docs": lambda docs: docs.select(range(len(docs))[::-1])},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SPLITS)
def test_the_pool_is_that_of_reading_every_doc(name: str, form: str) -> None:
    task = tiny.choice_task(data=SPLITS[name], **FORMS[form])
    split, docs, scored = read_whole(task)
    whole, unlabelled = find_pool(task), find_pool(task, labelled=False)
    assert whole.split.startswith(split)
    if split == "carved":
        assert _content(whole) == _content(unlabelled)
        assert whole.kept is not None
    else:
        assert (list(whole.docs), whole.scored, whole.kept) == (docs, scored, None)
        assert (list(unlabelled.docs), unlabelled.split, unlabelled.kept) == ([], whole.split, None)


def _content(pool: Pool) -> Any:
    return pool.split, list(pool.docs), pool.scored, list(pool.kept or ())


def test_the_same_docs_are_drawn_and_only_these_are_read(tiny_lm: HFLM, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny.choice_task(data=SPLITS["apart"])
    docs = read_whole(task)[1]
    order = generator(3, "adaptation docs", "tiny_choice").permutation(MANY)
    pool, read = find_pool(task), 0
    original = rows.ChosenDocs.__getitem__

    def counting(self: rows.ChosenDocs, index: Any) -> Any:
        nonlocal read
        read += 1
        return original(self, index)

    monkeypatch.setattr(rows.ChosenDocs, "__getitem__", counting)
    assert draw(pool, TaskDocs(task, tiny_lm), 10, 3) == [docs[int(i)] for i in order[:10]]
    assert read == 10
    trained = {doc_hash(docs[int(i)]) for i in order[:10:2]}
    assert draw(pool, TaskDocs(task, tiny_lm), 10, 3, trained) == [
        doc for doc in (docs[int(i)] for i in order[:15]) if doc_hash(doc) not in trained
    ]


def test_without_labels_few_docs_are_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny.choice_task(data=SPLITS["apart"])
    hashed = 0

    def counting(doc: Any) -> str:
        nonlocal hashed
        hashed += 1
        return doc_hash(doc)

    for module in (pools, rows):
        monkeypatch.setattr(module, "doc_hash", counting)
    find_pool(task, labelled=False)
    assert hashed <= len(TEST)
    find_pool(task)
    assert hashed >= MANY


def test_batches_hold_what_indexing_gives() -> None:
    content = [
        {"q": str(i), "n": i, "deep": {"a": [i, None]}, "many": [{"x": i}, {"x": None}], "t": None} for i in range(7)
    ]
    plain = datasets.Dataset.from_list(content)
    for docs in (plain, plain.select([5, 1]), plain.with_format("numpy"), content):
        assert all(_same(first, second) for first, second in zip(iterate(docs), docs, strict=True))


def _same(first: Any, second: Any) -> bool:
    return doc_hash(first) == doc_hash(second)


def _cases() -> Iterator[tuple[Any, Any, bool]]:
    one, two = {"q": "a", "n": 1, "r": None}, {"q": "a", "n": 2, "r": "b"}
    yield [one], [two], False
    yield [one, two], [two], True
    yield [{"n": 1}], [{"n": 1}], True
    yield [{"n": 1}], [{"n": 2}], False
    yield ["a"], ["a", "b"], True
    yield [], [one], False


@pytest.mark.parametrize(("docs", "others", "shared"), list(_cases()))
def test_shared_content_is_found_by_any_kind_of_docs(docs: Any, others: Any, shared: bool) -> None:
    assert share_content(docs, others) is shared
    if docs and isinstance(docs[0], dict):
        made = datasets.Dataset.from_list(docs), datasets.Dataset.from_list(others)
        assert share_content(*made) is shared
        assert list(rows_with(made[0], {"q": "a"})) == list(range(len(docs)))
        assert np.all(np.array(rows_with(docs, {"q": "z"})) < len(docs))
