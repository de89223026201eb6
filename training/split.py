"""Which documents train and which validate, or which few train alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.task import Task

from t2.core.digests import digest_of, doc_hash
from t2.core.errors import TaskError
from t2.core.seeds import derive_seed, generator
from t2.harness.overlap import DocMarks, marks_of
from t2.harness.pool import draw, find_pool
from t2.harness.tasks import TaskDocs


@dataclass(frozen=True)
class Halves:
    """Training and validation documents, and their content hashes in the same order.

    Attributes:
        marks: all hashes by which the documents of both halves are known again, their content hashes among them.
            Where a few train alone, there is nothing in the validation half.
    """

    train: list[Any]
    validation: list[Any]
    train_hashes: list[str]
    validation_hashes: list[str]
    marks: frozenset[str]

    def digest(self) -> str:
        """Hex SHA-256 over both halves' hashes."""
        return digest_of([self.train_hashes, self.validation_hashes])


def split_docs(task: Task, seed: int, train_docs: int | None = None, validation_docs: int | None = None) -> Halves:
    """Split a task's training documents into equal halves for training and validation.

    The documents are those of the task's training split; without one, of its validation split where test documents are
    what is scored. Each content counts once, and what is among the scored documents, under whatever label, is left out.
    The order in which the task gives them does not matter.

    Args:
        task: the task.
        seed: the user's seed.
        train_docs: keep at most so many in the training half.
        validation_docs: keep at most so many in the validation half.

    Raises:
        TaskError: the task has no such documents, or fewer than two.
    """
    name = str(task.task_name)
    if task.has_training_docs():
        docs = list(task.training_docs())
    elif task.has_validation_docs() and task.has_test_docs():
        docs = list(task.validation_docs())
    else:
        raise TaskError(
            f"task {name} has no training documents besides those it scores; give it a training_split, or train on "
            "another task of its domain"
        )
    marks = DocMarks(task)
    scored = {mark for doc in task.eval_docs for mark in marks.of(doc)}
    unique = {doc_hash(doc): doc for doc in docs if scored.isdisjoint(marks.of(doc))}
    kept = sorted(unique, key=lambda digest: derive_seed(seed, "halves", digest))
    if len(kept) < 2:
        raise TaskError(f"task {name} has {len(kept)} training documents that it does not score; two are the least")
    half = len(kept) // 2
    train, validation = kept[:half][:train_docs], kept[half:][:validation_docs]
    trained, validated = [unique[d] for d in train], [unique[d] for d in validation]
    return Halves(trained, validated, train, validation, marks_of(task, [*trained, *validated]))


def draw_shots(docs: TaskDocs, shots: int, seed: int) -> Halves:
    """The documents that ``adapt=cem`` with so many ``shots`` and this ``adapt_seed`` draws of a task, to train on.

    They are those of a search with experts that were trained on no document of the pool; it draws such documents last.

    Args:
        docs: the task.
        shots: how many.
        seed: the user's seed.

    Raises:
        TaskError: the task has too few labelled documents that it does not score.
        DataError: its documents cannot be read.
    """
    drawn = draw(find_pool(docs.task), docs, shots, seed)
    return Halves(drawn, [], [doc_hash(doc) for doc in drawn], [], marks_of(docs.task, drawn))


def batch_docs(docs: int, batch: int, step: int, seed: int) -> Sequence[int]:
    """Indices of the documents of one step: epochs of all documents, each in its own order, cut into steps.

    It follows from the seed and the step alone, so a resumed run goes on with the same documents.

    Args:
        docs: number of training documents.
        batch: documents in a step; more than there are means all of them.
        step: number of the step, from 0.
        seed: the user's seed.
    """
    size = min(batch, docs)
    picked: list[int] = []
    position = step * size
    while len(picked) < size:
        epoch, offset = divmod(position + len(picked), docs)
        order = generator(seed, "order", epoch).permutation(docs)
        picked.extend(order[offset : offset + size - len(picked)].tolist())
    return picked
