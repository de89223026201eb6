"""Adaptation pools: the labelled docs that a search may see, none of which is scored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.task import Task

from t2.core.digests import doc_hash
from t2.core.errors import DataError, TaskError
from t2.core.seeds import generator
from t2.harness.overlap import DocMarks
from t2.harness.tasks import TaskDocs

CARVED = 20
"""Docs taken out of the scored ones where a task has no other labelled docs."""


@dataclass(frozen=True)
class Pool:
    """The adaptation pool of one task.

    Attributes:
        split: where its docs come from.
        docs: distinct, in the order of their content hash.
        scored: content hashes of all docs that may be scored.
        kept: the docs that remain to be scored, where the pool was carved out of them; else None.
        absent: why the docs of the split cannot be read, which matters only to those who draw from it.
    """

    split: str
    docs: tuple[Any, ...]
    scored: frozenset[str]
    kept: Sequence[Any] | None = None
    absent: DataError | None = None


def find_pool(task: Task, samples: Collection[int] | None = None) -> Pool:
    """The adaptation pool of a task: validation, training or few-shot docs, the first that shares none with the scored.

    Docs that ask what a scored one asks, under another label or in other words of the prompt, are left out of it. Where
    there is none, :data:`CARVED` docs are taken out of the scored ones (half of them, where they are fewer than twice
    as many), chosen by a hash of what is asked, so that the choice depends on neither seed, shots, strategy, limit nor
    labels. With ``samples`` they come from the docs that are not sampled.

    Args:
        task: as lm-eval is about to run it.
        samples: positions of the docs to score; None scores all.
    """
    docs = task.eval_docs
    hashes = [doc_hash(doc) for doc in docs]
    scored = frozenset(hashes)
    for split, read in _splits(task):
        try:
            found = {doc_hash(doc): doc for doc in read()}
        except KeyError:
            continue  # the task names a split that its data set does not have
        except DataError as error:
            return Pool(split, (), scored, absent=error)
        if found and not scored & found.keys():
            others = _others(task, docs, found)
            if others:
                return Pool(split, tuple(others[digest] for digest in sorted(others)), scored)
    wanted = {hashes[i] for i in samples if i < len(hashes)} if samples else set()
    first = {digest: i for i, digest in reversed(list(enumerate(hashes))) if digest not in wanted}
    asked = {digest: doc_hash(_asked(task, docs[i])) for digest, i in first.items()}
    count = min(CARVED, len(first) if samples else len(first) // 2)
    taken = set(sorted(first, key=lambda digest: (asked[digest], digest))[:count])
    pool = tuple(docs[first[digest]] for digest in sorted(taken))
    remaining = [i for i, digest in enumerate(hashes) if digest not in taken]
    kept = None if samples or not taken else _select(docs, remaining)
    return Pool("carved out of the scored docs", pool, scored - taken, kept)


def _others(task: Task, scored: Iterable[Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The found docs, by content hash, that ask something else than the scored ones."""
    marks = DocMarks(task)
    asked = {marks.asked(doc) for doc in scored} - {None}
    return {digest: doc for digest, doc in found.items() if marks.asked(doc) not in asked}


def draw(pool: Pool, docs: TaskDocs, shots: int, seed: int, trained: Collection[str] = ()) -> list[Any]:
    """Draw ``shots`` labelled docs from a pool.

    Args:
        pool: the pool.
        docs: the task.
        shots: how many.
        seed: the user's ``adapt_seed``.
        trained: marks of docs that an expert was trained on; they are drawn only where there are too few others, since
            an expert looks better on them than it is.

    Raises:
        TaskError: the pool is empty, unlabelled, or smaller than ``shots``.
        DataError: its docs cannot be read.
    """
    if pool.absent is not None:
        raise pool.absent
    if not pool.docs:
        raise TaskError(
            f"task {docs.name} has no docs to adapt on (no validation, training or few-shot docs that are not scored, "
            "and too few scored docs to set some aside); use adapt=expert or mix, or a task with more docs"
        )
    order = generator(seed, "adaptation docs", docs.name).permutation(len(pool.docs))
    marks, seen = DocMarks(docs.task), frozenset(trained)
    candidates = sorted(
        (pool.docs[int(i)] for i in order), key=lambda doc: bool(seen) and not seen.isdisjoint(marks.of(doc))
    )
    drawn: list[Any] = []
    for doc in candidates:
        if docs.labelled(doc):
            drawn.append(doc)
        if len(drawn) == shots:
            return drawn
    if not drawn:
        raise TaskError(
            f"task {docs.name}: none of the {len(pool.docs)} docs of its adaptation pool ({pool.split}) has a label; "
            "adapt=best, cem and auto need labels, use expert, mix, prompt or classifier"
        )
    raise TaskError(
        f"task {docs.name}: shots={shots} exceeds the {len(drawn)} labelled docs of its adaptation pool "
        f"({pool.split}); lower shots"
    )


@contextlib.contextmanager
def carved(task: Task, pool: Pool) -> Iterator[None]:
    """Inside the context lm-eval sees only the docs that a carved pool leaves to be scored."""
    if pool.kept is None:
        yield
        return
    method = "test_docs" if task.has_test_docs() else "validation_docs"
    setattr(task, method, lambda: pool.kept)
    try:
        yield
    finally:
        delattr(task, method)


def _splits(task: Any) -> Iterator[tuple[str, Callable[[], Iterable[Any]]]]:
    if task.has_validation_docs():
        yield "validation docs", lambda: task.validation_docs() or ()
    if task.has_training_docs():
        yield "training docs", lambda: task.training_docs() or ()
    config = getattr(task, "fewshot_cfg", None)
    if config is not None and (config.split is not None or config.samples is not None):
        yield "few-shot docs", lambda: task.fewshot_docs() or ()


def _asked(task: Any, doc: Any) -> Any:
    """What a doc asks, without its label: poisoned labels must not move the pool."""
    text = task.doc_to_text(doc)
    choices = task.doc_to_choice(doc) if getattr(task.config, "doc_to_choice", None) is not None else None
    if isinstance(text, int):
        return choices
    return [text, choices] if text or choices is not None else doc


def _select(docs: Any, indices: list[int]) -> Sequence[Any]:
    selected: Sequence[Any] = docs.select(indices) if hasattr(docs, "select") else [docs[i] for i in indices]
    return selected
