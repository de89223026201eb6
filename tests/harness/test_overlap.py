"""A question is known again under another label, in another split, and in the task that it was made from."""

from __future__ import annotations

from typing import Any

import pytest
from lm_eval.api.task import Task

from t2.core.digests import doc_hash
from t2.harness.overlap import DocMarks, marks_of
from t2.harness.pool import find_pool
from t2.harness.tasks import load_task
from tests.harness import tiny

ROW = tiny.questions(1)[0]


def same(first: Task, one: dict[str, Any], second: Task, other: dict[str, Any]) -> bool:
    return not DocMarks(first).of(one).isdisjoint(DocMarks(second).of(other))


def rendered(doc: dict[str, Any]) -> str:
    return f"Q: {doc['q']}"


@pytest.mark.parametrize("text", ["Q: {{q}}\nA:", rendered, "q"], ids=["template", "function", "field"])
def test_labels_do_not_matter_and_questions_do(text: Any) -> None:
    task = tiny.choice_task(doc_to_text=text)
    assert same(task, ROW, task, {**ROW, "gold": (ROW["gold"] + 1) % 4, "note": "relabelled"})
    assert not same(task, ROW, task, {**ROW, "q": "another"})
    assert not same(task, ROW, task, {**ROW, "choices": [*ROW["choices"][:3], "another"]})


def test_the_wording_of_the_prompt_does_not_matter() -> None:
    first, second = tiny.choice_task(), tiny.choice_task("other", doc_to_text="{{q}}? Choose.")
    assert same(first, ROW, second, {**ROW, "gold": 0, "source": "elsewhere"})


def test_a_doc_without_a_question_is_known_by_its_content_alone() -> None:
    task = tiny.rolling_task()
    assert DocMarks(task).of(ROW) == {doc_hash(ROW)}
    # Its text is an index of a right choice, so a label.
    labelled = tiny.choice_task(doc_to_text="gold", doc_to_target="q", doc_to_choice="choices")
    assert same(labelled, ROW, labelled, {**ROW, "gold": (ROW["gold"] + 1) % 4})


def test_a_relabelled_copy_of_a_scored_doc_is_no_adaptation_doc() -> None:
    copies = [{**row, "gold": (row["gold"] + 1) % 4} for row in tiny.questions(12)]
    pool = find_pool(tiny.choice_task(data=tiny.splits(validation=[*copies, *tiny.questions(9, 300)])))
    assert (pool.split, len(pool.docs)) == ("validation docs", 9)
    only = find_pool(tiny.choice_task(data=tiny.splits(validation=copies, training=tiny.questions(9, 500))))
    assert only.split == "training docs"


@pytest.mark.parametrize(("derived", "source"), [("t2_gsm8k_steps", "t2_gsm8k"), ("t2_mbpp_programs", "t2_mbpp")])
def test_derived_docs_carry_the_marks_of_their_source(derived: str, source: str) -> None:
    made, rows = load_task(derived), load_task(source)
    origins = {mark: i for i, doc in enumerate(rows.test_docs()) for mark in DocMarks(rows).of(doc)}
    docs = list(made.test_docs())[:50]
    for doc in docs:
        found = {origins[mark] for mark in DocMarks(made).of(doc) if mark in origins}
        assert len(found) == 1
        (row,) = found
        field = "question" if source == "t2_gsm8k" else "text"
        assert list(rows.test_docs())[row][field] == doc[field]
    assert len(marks_of(made, docs)) == 4 * len(docs)
