"""Held-out prompts of known domain, on which a dispatch is calibrated and judged.

They come from documents that are never scored: for a classifier from those of its own task that its training did not
touch, else from the pools of the tasks that the experts were trained on. Where a domain has no such documents at hand,
prompts that come with t2 stand in.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task

from t2.adapters.expert import Expert
from t2.adapters.strategies import DomainPrompts
from t2.core.digests import doc_hash
from t2.core.errors import T2Error
from t2.core.manifest import unpack_hashes
from t2.harness.overlap import DocMarks
from t2.harness.pool import find_pool
from t2.harness.tasks import load_task, prompt_text

PER_DOMAIN = 20
"""Prompts of each domain; with them an accuracy of 90% is known to about 7 points a domain."""
SHIPPED = Path(__file__).parent / "domain_prompts.jsonl"

_Text = tuple[str, Any]
"""A prompt and the document that it is of."""

_log = logging.getLogger(__name__)


def held_out_prompts(
    labels: Sequence[str],
    experts: Sequence[Expert],
    classifier: Expert | None = None,
    forbidden: Collection[str] = (),
) -> DomainPrompts:
    """Prompts for each label, drawn by content hash.

    Args:
        labels: the domains.
        experts: whose tasks give prompts of their domains.
        classifier: whose task gives prompts of all domains.
        forbidden: marks of documents (:mod:`t2.harness.overlap`), and hashes of texts, that must not be among them.
    """
    forbidden = frozenset(forbidden)
    found: dict[str, tuple[str, list[str]]] = {}
    if classifier is not None:
        found = _of_classifier(classifier, labels, forbidden)
    else:
        for expert in experts:
            if expert.domain in labels and expert.domain not in found and expert.manifest.task is not None:
                texts = _of_task(expert.manifest.task, forbidden)
                if texts is not None:
                    found[str(expert.domain)] = texts
    for label in labels:
        if label not in found and (shipped := _drawn([(text, None) for text in _shipped(label)], forbidden)):
            found[label] = ("prompts that come with t2", shipped)
    ordered = {label: found[label] for label in labels if label in found}
    prompts = tuple((text, label) for label, (_, texts) in ordered.items() for text in texts)
    return DomainPrompts(prompts, {label: source for label, (source, _) in ordered.items()})


def _of_classifier(
    classifier: Expert, labels: Sequence[str], forbidden: frozenset[str]
) -> dict[str, tuple[str, list[str]]]:
    """What a task like ``t2_domains`` holds besides the documents that the classifier was trained or chosen on."""
    manifest = classifier.manifest
    task, docs, why = _training_docs(manifest.task)
    seen = set(unpack_hashes(manifest.training_docs))
    found: dict[str, list[_Text]] = {label: [] for label in labels}
    for digest, doc in docs:
        label = doc.get("domain")
        if digest not in seen and label in found and isinstance(doc.get("text"), str):
            found[label].append((doc["text"], doc))
    if why:
        _log.info("classifier %s: %s; its held-out prompts are those that come with t2", classifier.name, why)
    return {
        label: (f"documents of {manifest.task} that it was not trained on", kept)
        for label, texts in found.items()
        if (kept := _drawn(texts, forbidden, task))
    }


@cache
def _training_docs(name: str | None) -> tuple[Task | None, tuple[tuple[str, dict[str, Any]], ...], str]:
    """A task and its training documents with their hashes, or why there are none."""
    task, why = _load(name)
    if task is None:
        return None, (), why
    try:
        docs = task.training_docs() if task.has_training_docs() else ()
        return task, tuple((doc_hash(doc), dict(doc)) for doc in docs), ""
    except (T2Error, KeyError) as error:
        return None, (), str(error)


def _of_task(name: str, forbidden: frozenset[str]) -> tuple[str, list[str]] | None:
    """Prompts out of the adaptation pool of an expert's own task."""
    source, task, texts = _pool_prompts(name)
    kept = _drawn(texts, forbidden, task)
    return (source, kept) if kept else None


@cache
def _pool_prompts(name: str) -> tuple[str, Task | None, tuple[_Text, ...]]:
    task, why = _load(name)
    if task is None:
        _log.info("task %s gives no held-out prompts: %s", name, why)
        return "", None, ()
    try:
        pool = find_pool(task)
    except T2Error as error:
        _log.info("task %s gives no held-out prompts: %s", name, error)
        return "", None, ()
    if pool.kept is not None or pool.absent is not None:
        return "", None, ()  # documents that the task scores elsewhere, or none
    return f"{pool.split} of {name}", task, tuple((prompt_text(task, doc), doc) for doc in pool.docs)


@cache
def _load(name: str | None) -> tuple[Task | None, str]:
    if name is None:
        return None, "its task is not known"
    try:
        return load_task(name), ""
    except T2Error as error:
        return None, str(error)


@cache
def _shipped(label: str) -> tuple[str, ...]:
    rows = (json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").splitlines())
    return tuple(row["text"] for row in rows if row["domain"] == label)


def _drawn(texts: Iterable[_Text], forbidden: frozenset[str], task: Task | None = None) -> list[str]:
    """The first so many texts, in the order of their hashes, whose documents are not forbidden."""
    marks = DocMarks(task) if task is not None else None
    distinct = {doc_hash(text): (text, doc) for text, doc in texts}
    allowed = (
        text
        for digest, (text, doc) in sorted(distinct.items(), key=itemgetter(0))
        if digest not in forbidden and (marks is None or forbidden.isdisjoint(marks.of(doc)))
    )
    return list(islice(allowed, PER_DOMAIN))
