from __future__ import annotations

from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM

from t2.core.digests import doc_hash
from t2.core.errors import DataError, TaskError
from t2.harness.pool import CARVED, carved, draw, find_pool
from t2.harness.tasks import TaskDocs, prompt_text
from tests.harness import tiny


def _hashes(docs: Any) -> list[str]:
    return [doc_hash(doc) for doc in docs]


def test_the_order_is_validation_training_few_shot() -> None:
    everything = tiny.splits(training=tiny.questions(9, 300), fewshot=tiny.questions(5, 400))
    found = [
        find_pool(tiny.choice_task(data={k: v for k, v in everything.items() if k not in left_out})).split
        for left_out in ((), ("validation",), ("validation", "training"))
    ]
    assert found == ["validation docs", "training docs", "few-shot docs"]


def test_a_split_that_shares_a_doc_with_the_scored_ones_is_passed_over() -> None:
    data = tiny.splits(validation=[*tiny.questions(9, 300), *tiny.questions(1)], training=tiny.questions(9, 500))
    assert find_pool(tiny.choice_task(data=data)).split == "training docs"


@pytest.fixture
def alone() -> dict[str, tiny.Rows]:
    """Scored docs and nothing else."""
    return tiny.splits(validation=None, test=tiny.questions(60))


def test_without_other_docs_some_scored_ones_are_set_aside(alone: dict[str, tiny.Rows]) -> None:
    task = tiny.choice_task(data=alone)
    pool = find_pool(task)
    assert pool.kept is not None
    assert len(pool.docs) == CARVED
    assert sorted(_hashes(pool.docs) + _hashes(pool.kept)) == sorted(_hashes(alone["test"]))
    with carved(task, pool):
        assert _hashes(task.eval_docs) == _hashes(pool.kept)
    assert len(task.eval_docs) == 60


def test_what_is_set_aside_depends_on_no_label_and_no_order(alone: dict[str, tiny.Rows]) -> None:
    first = {doc["q"] for doc in find_pool(tiny.choice_task(data=alone)).docs}
    poisoned = [{**row, "gold": (row["gold"] + 1) % 4} for row in reversed(alone["test"])]
    assert {doc["q"] for doc in find_pool(tiny.choice_task(data={"test": poisoned})).docs} == first


def test_no_label_moves_a_task_whose_choices_are_all_it_asks(alone: dict[str, tiny.Rows]) -> None:
    poisoned = [{**row, "gold": (row["gold"] + 1) % 4} for row in alone["test"]]
    tasks = [tiny.choice_task(data={"test": rows}, doc_to_text="") for rows in (alone["test"], poisoned)]
    pools = [find_pool(task) for task in tasks]
    assert {doc["q"] for doc in pools[0].docs} == {doc["q"] for doc in pools[1].docs}
    for clean, other in zip(alone["test"], poisoned, strict=True):
        assert prompt_text(tasks[0], clean) == "\n".join(clean["choices"]) == prompt_text(tasks[1], other)


def test_the_text_of_a_doc_is_never_its_answer() -> None:
    doc = tiny.questions(1)[0]
    assert prompt_text(tiny.text_task(doc_to_text=""), doc) == ""
    assert prompt_text(tiny.rolling_task(), doc).startswith(doc["q"])


def test_few_docs_are_halved(alone: dict[str, tiny.Rows]) -> None:
    pool = find_pool(tiny.choice_task(data={"test": alone["test"][:10]}))
    assert pool.kept is not None
    assert (len(pool.docs), len(pool.kept)) == (5, 5)


def test_sampled_docs_are_never_set_aside(alone: dict[str, tiny.Rows]) -> None:
    task = tiny.choice_task(data=alone)
    sampled = range(0, 60, 2)
    pool = find_pool(task, sampled)
    assert pool.kept is None
    assert not set(_hashes(pool.docs)) & {doc_hash(alone["test"][i]) for i in sampled}


def test_the_drawing_follows_the_seed(tiny_lm: HFLM) -> None:
    task = tiny.choice_task()
    pool, docs = find_pool(task), TaskDocs(task, tiny_lm)
    drawn = _hashes(draw(pool, docs, 10, 0))
    assert drawn == _hashes(draw(pool, docs, 10, 0))
    assert set(drawn) != set(_hashes(draw(pool, docs, 10, 1)))
    assert len(set(drawn)) == 10


def test_what_an_expert_was_trained_on_is_drawn_last(tiny_lm: HFLM) -> None:
    task = tiny.choice_task()
    pool, docs = find_pool(task), TaskDocs(task, tiny_lm)
    trained = set(_hashes(pool.docs)[:25])
    drawn = _hashes(draw(pool, docs, 7, 0, trained))
    assert not set(drawn[:5]) & trained
    assert len(set(drawn) & trained) == 2


@pytest.mark.parametrize(
    ("data", "shots", "line"),
    [
        ({"test": tiny.questions(1)}, 1, "has no docs to adapt on"),
        (
            tiny.splits(validation=[{**q, "gold": -1} for q in tiny.questions(30, 100)]),
            3,
            r"none of the 30 docs .*label",
        ),
        (tiny.splits(), 31, r"shots=31 exceeds the 30 labelled docs of its adaptation pool \(validation docs\)"),
    ],
)
def test_a_pool_that_does_not_do_is_told(data: dict[str, tiny.Rows], shots: int, line: str, tiny_lm: HFLM) -> None:
    task = tiny.choice_task(data=data)
    with pytest.raises(TaskError, match=line):
        draw(find_pool(task), TaskDocs(task, tiny_lm), shots, 0)


def test_generation_docs_without_an_answer_are_unlabelled(tiny_lm: HFLM) -> None:
    rows = [{**row, "answer": ""} for row in tiny.questions(30, 100)]
    labelled = [{**row, "answer": "x"} for row in tiny.questions(2, 200)]
    scored = [{**row, "answer": "y"} for row in tiny.questions(12)]
    task = tiny.text_task(data={"validation": [*rows, *labelled], "test": scored}, doc_to_target="answer")
    docs = TaskDocs(task, tiny_lm)
    assert {doc["answer"] for doc in draw(find_pool(task), docs, 2, 0)} == {"x"}
    with pytest.raises(TaskError, match="shots=3 exceeds the 2 labelled docs"):
        draw(find_pool(task), docs, 3, 0)


def test_data_that_is_absent_matters_only_to_those_who_draw(tiny_lm: HFLM, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny.choice_task()

    def absent() -> Any:
        raise DataError("not on this machine")

    monkeypatch.setattr(task, "validation_docs", absent)
    pool = find_pool(task)
    assert pool.kept is None
    with pytest.raises(DataError, match="not on this machine"):
        draw(pool, TaskDocs(task, tiny_lm), 3, 0)
