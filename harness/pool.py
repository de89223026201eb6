"""Adaptation pools: the labelled docs that a search may see, none of which is scored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.task import Task

from t2.core.digests import doc_hash
from t2.core.errors import DataError, TaskError
from t2.core.seeds import generator
from t2.harness.overlap import DocMarks
from t2.harness.rows import ChosenDocs, as_sequence, iterate, rows_with, share_content
from t2.harness.tasks import TaskDocs

CARVED = 20
"""Docs taken out of the scored ones where a task has no other labelled docs."""


LOOKED_UP = 20
"""Most docs that are looked up individually before all scored docs are read."""


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
    docs: Sequence[Any]
    scored: frozenset[str]
    kept: Sequence[Any] | None = None
    absent: DataError | None = None


def find_pool(task: Task, samples: Collection[int] | None = None, *, labelled: bool = True) -> Pool:
    """The adaptation pool of a task: validation, training or few-shot docs, the first that shares none with the scored.

    Docs that ask what a scored one asks, under another label or in other words of the prompt, are left out of it. Where
    there is none, :data:`CARVED` docs are taken out of the scored ones (half of them, where they are fewer than twice
    as many), chosen by a hash of what is asked, so that the choice depends on neither seed, shots, strategy, limit nor
    labels. With ``samples`` they come from the docs that are not sampled.

    Args:
        task: as lm-eval is about to run it.
        samples: positions of the docs to score; None scores all.
        labelled: whether docs will be drawn. Otherwise a pool that is not carved is neither read nor hashed, and has no
            docs and no hashes.
    """
    docs = as_sequence(task.eval_docs)
    hashes = [doc_hash(doc) for doc in iterate(docs)] if labelled else []
    scored = frozenset(hashes)
    for split, read in _splits(task):
        try:
            found = as_sequence(read())
        except KeyError:
            continue  # the task names a split that its data set does not have
        except DataError as error:
            return Pool(split, (), scored, absent=error)
        if not labelled:
            if len(found) and not share_content(found, docs) and _has_unscored_question(task, docs, found):
                return Pool(split, (), scored)
        elif others := _select_unscored(task, docs, found, scored):
            return Pool(split, ChosenDocs(found, [others[digest] for digest in sorted(others)]), scored)
    hashes = hashes or [doc_hash(doc) for doc in iterate(docs)]
    scored = frozenset(hashes)
    wanted = {hashes[i] for i in samples if i < len(hashes)} if samples else set()
    first = {digest: i for i, digest in reversed(list(enumerate(hashes))) if digest not in wanted}
    asked = {digest: doc_hash(_asked(task, docs[i])) for digest, i in first.items()}
    count = min(CARVED, len(first) if samples else len(first) // 2)
    taken = set(sorted(first, key=lambda digest: (asked[digest], digest))[:count])
    pool = tuple(docs[first[digest]] for digest in sorted(taken))
    remaining = [i for i, digest in enumerate(hashes) if digest not in taken]
    kept = None if samples or not taken else _select(docs, remaining)
    return Pool("carved out of the scored docs", pool, scored - taken, kept)


def _select_unscored(task: Task, scored: Sequence[Any], found: Sequence[Any], hashes: frozenset[str]) -> dict[str, int]:
    """Return the positions of the docs that ask something no scored doc asks, by content hash.

    Args:
        task: the task.
        scored: the scored docs.
        found: the docs of another split.
        hashes: content hashes of the scored docs.

    Returns:
        Empty if one of the found docs is a scored one.
    """
    marks = DocMarks(task)
    asked: frozenset[str | None] | None = None
    others: dict[str, int] = {}
    for index, doc in enumerate(iterate(found)):
        digest = doc_hash(doc)
        if digest in hashes:
            return {}
        if asked is None:
            asked = frozenset(marks.asked(one) for one in iterate(scored)) - {None}
        if marks.asked(doc) not in asked:
            others[digest] = index
    return others


def _has_unscored_question(task: Task, scored: Sequence[Any], found: Sequence[Any]) -> bool:
    """Whether a found doc asks something no scored doc asks; stops at the first such doc."""
    marks = DocMarks(task)
    every: frozenset[str | None] | None = None
    for count, doc in enumerate(iterate(found)):
        question = marks.asked(doc)
        # Docs with the same question have the same values in all fields of the question.
        fields = {name: doc[name] for name in marks.fields or () if isinstance(doc, dict) and name in doc}
        if question is None or every is not None:
            known = every or frozenset()
        elif count < LOOKED_UP and any(isinstance(value, str) for value in fields.values()):
            known = frozenset(marks.asked(scored[i]) for i in rows_with(scored, fields))
        else:
            known = every = frozenset(marks.asked(one) for one in iterate(scored))
        if question is None or question not in known:
            return True
    return False


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
    drawn: list[Any] = []
    for doc in _untrained_first(pool, docs.task, order, frozenset(trained)):
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


def _untrained_first(pool: Pool, task: Task, order: Iterable[int], trained: frozenset[str]) -> Iterator[Any]:
    """Yield docs in the given order, those that an expert was trained on last; reads on demand."""
    marks, last = DocMarks(task), []
    for i in map(int, order):
        doc = pool.docs[i]
        if trained and not trained.isdisjoint(marks.of(doc)):
            last.append(i)
        else:
            yield doc
    for i in last:
        yield pool.docs[i]


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
