"""Which documents train, validate, and make up a step."""

from __future__ import annotations

import pytest

from t2.core.digests import doc_hash
from t2.core.errors import TaskError
from t2.training.split import batch_docs, split_docs
from tests.harness import tiny
from tests.training import planted


def task_of(training, test):
    return tiny.choice_task("split", {"training": training, "test": test})


def test_halves_are_equal_disjoint_and_follow_from_contents_and_seed() -> None:
    rows = planted.rows(41)
    halves = split_docs(task_of(rows, planted.rows(5, start=500)), seed=3)
    assert (len(halves.train), len(halves.validation)) == (20, 21)
    assert not set(halves.train_hashes) & set(halves.validation_hashes)
    assert set(halves.train_hashes) | set(halves.validation_hashes) == {doc_hash(row) for row in rows}
    assert [doc_hash(doc) for doc in halves.train] == halves.train_hashes
    shuffled = split_docs(task_of(rows[::-1], planted.rows(5, start=500)), seed=3)
    assert shuffled.digest() == halves.digest()
    assert split_docs(task_of(rows, planted.rows(5, start=500)), seed=4).digest() != halves.digest()
    small = split_docs(task_of(rows, planted.rows(5, start=500)), 3, train_docs=4, validation_docs=6)
    assert (small.train_hashes, small.validation_hashes) == (halves.train_hashes[:4], halves.validation_hashes[:6])


def test_repeated_and_scored_documents_are_left_out() -> None:
    rows, scored = planted.rows(10), planted.rows(4, start=500)
    halves = split_docs(task_of([*rows, *rows[:5], *scored[:2]], scored), seed=0)
    used = [*halves.train_hashes, *halves.validation_hashes]
    assert sorted(used) == sorted(doc_hash(row) for row in rows)


def test_validation_documents_serve_only_where_test_documents_are_scored() -> None:
    rows, scored = planted.rows(10), planted.rows(4, start=500)
    halves = split_docs(tiny.choice_task("split", {"validation": rows, "test": scored}), seed=0)
    assert len(halves.train) == len(halves.validation) == 5
    with pytest.raises(TaskError, match="no training documents besides those it scores"):
        split_docs(tiny.choice_task("split", {"validation": rows}), seed=0)
    with pytest.raises(TaskError, match="has 1 training documents"):
        split_docs(task_of([rows[0], scored[0]], scored), seed=0)


def test_steps_go_through_all_documents_in_epochs_of_different_order() -> None:
    steps = [list(batch_docs(10, 4, step, seed=1)) for step in range(5)]
    flat = [doc for step in steps for doc in step]
    assert all(len(step) == 4 for step in steps)
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert list(batch_docs(10, 4, 3, seed=1)) == steps[3]
    assert list(batch_docs(10, 4, 3, seed=2)) != steps[3]
    assert sorted(batch_docs(3, 256, 7, seed=0)) == [0, 1, 2]
