"""Which docs are the same: the hashes by which a doc is known again, in another split, another task, or relabelled.

A doc has several *marks*: the hash of its content, the hash of what it asks (its label aside), and where it was made
from a doc of another task, the marks of that one. Two docs that share a mark are the same question.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jinja2
import jinja2.meta
from lm_eval.api.task import Task
from lm_eval.utils import env

from t2.core.digests import doc_hash
from t2.harness.splits import Splits


def asked_hash(question: Mapping[str, Any]) -> str:
    """Hash of what a doc asks, by field; in no other use of :func:`t2.core.digests.doc_hash` can it occur."""
    return doc_hash({"asked": question})


class DocMarks:
    """The marks of a task's docs.

    What a doc asks are the fields that its prompt and choices are made of, so neither their wording nor labels matter;
    where a function makes them, it is the text. A doc with images or sounds, or without any text, has no such mark.

    Args:
        task: the docs' task.
    """

    def __init__(self, task: Task) -> None:
        self._task: Any = task
        dataset = getattr(task, "dataset", None)
        self._splits = dataset if isinstance(dataset, Splits) else None
        self._config: Any = getattr(task, "config", None)
        self._labelled_text = bool(getattr(task, "multiple_input", False))
        self._fields = self._find_fields()

    @property
    def fields(self) -> frozenset[str] | None:
        """Fields that determine a doc's question; None if a function computes the question."""
        return self._fields

    def of(self, doc: Any) -> frozenset[str]:
        """All marks of a doc."""
        marks = {doc_hash(doc)}
        asked = self.asked(doc)
        if asked is not None:
            marks.add(asked)
        if self._splits is not None:
            source = self._splits.source(doc)
            if source is not None:
                row, question = source
                marks |= {doc_hash(row), asked_hash({field: row[field] for field in question})}
        return frozenset(marks)

    def asked(self, doc: Any) -> str | None:
        """The hash of what a doc asks; None where that cannot be told from its label."""
        if self._fields is None:
            question = self._rendered(doc)
        else:
            question = {field: doc[field] for field in sorted(self._fields) if field in doc}
        return asked_hash(question) if any(value not in (None, "", [], {}) for value in question.values()) else None

    def _find_fields(self) -> frozenset[str] | None:
        """The fields that make the question; none where there is no question, None where it has to be rendered."""
        config = self._config
        if config is None or any(getattr(config, f"doc_to_{kind}", None) for kind in ("image", "audio")):
            return frozenset()
        if self._splits is not None and self._splits.question:
            return frozenset(self._splits.question)
        specs = [config.doc_to_choice] if self._labelled_text else [config.doc_to_text, config.doc_to_choice]
        if getattr(self._task, "prompt", None) is not None or any(callable(spec) for spec in specs):
            return None
        found: set[str] = set()
        for spec in specs:
            if isinstance(spec, str):
                try:
                    named = spec in self._task.features
                    found |= {spec} if named else jinja2.meta.find_undeclared_variables(env.parse(spec))
                except jinja2.TemplateError:
                    return None
        return frozenset(found)

    def _rendered(self, doc: Any) -> dict[str, Any]:
        try:
            text = None if self._labelled_text else self._task.doc_to_text(doc)
            choices = self._task.doc_to_choice(doc) if self._config.doc_to_choice is not None else None
        except (AttributeError, LookupError, TypeError, ValueError):
            # A doc that no prompt can be made of matters to those who ask it, not to those who look for it.
            return {}
        return {"choices": choices, "text": text if isinstance(text, str) else None}


def marks_of(task: Task, docs: Iterable[Any]) -> frozenset[str]:
    """The marks of all of some docs of a task."""
    marks = DocMarks(task)
    return frozenset(mark for doc in docs for mark in marks.of(doc))
