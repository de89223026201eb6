from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from t2.adapters.engine.transformers import TransformersEngine
from t2.core.errors import ArgumentError, TaskError
from t2.harness.base import open_base
from t2.harness.tasks import PromptForm, TaskDocs, load_task
from tests.harness import tiny

MAKERS = {"choice": tiny.choice_task, "text": tiny.text_task, "rolling": tiny.rolling_task}
FORMS = {
    "plain": PromptForm(),
    "few-shot": PromptForm(num_fewshot=2),
    "chat": PromptForm(
        num_fewshot=2, apply_chat_template=True, system_instruction="Be brief.", fewshot_as_multiturn=True
    ),
    "singleturn": PromptForm(num_fewshot=1, apply_chat_template=True, fewshot_as_multiturn=False),
}


def _of_engine(docs: TaskDocs, engine: TransformersEngine, rows: list[Any], **kwargs: Any) -> list[Any]:
    return [answer for some in docs.answer(engine, docs.instances(rows), **kwargs) for answer in some]


def _of_hf(docs: TaskDocs, rows: list[Any]) -> list[Any]:
    requests = [request for some in docs.instances(rows) for request in some]
    return list(getattr(docs.lm, requests[0].request_type)(requests))


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("form", FORMS)
def test_the_batched_engine_answers_as_lm_eval(
    kind: str, form: str, tiny_lm: HFLM, tiny_engine: TransformersEngine
) -> None:
    docs = TaskDocs(MAKERS[kind](data=tiny.splits(fewshot=tiny.questions(6, 700))), tiny_lm, FORMS[form])
    rows = list(docs.task.eval_docs)
    ours, theirs = _of_engine(docs, tiny_engine, rows), _of_hf(docs, rows)
    if kind == "text":
        assert ours == theirs
        assert len(set(ours)) > 3
    elif kind == "rolling":
        assert ours == pytest.approx(theirs, abs=1e-3)
    else:
        assert [ll for ll, _ in ours] == pytest.approx([ll for ll, _ in theirs], abs=1e-3)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


@pytest.mark.parametrize("kind", MAKERS)
def test_long_texts_are_cut_as_lm_eval_cuts_them(kind: str, tiny_folder: Any, tiny_engine: TransformersEngine) -> None:
    lm = open_base(str(tiny_folder), device="cpu", max_length=24)
    docs = TaskDocs(MAKERS[kind](doc_to_text="What is the answer to {{q}}, a long question?"), lm)
    rows = list(docs.task.eval_docs)
    ours, theirs = _of_engine(docs, tiny_engine, rows), _of_hf(docs, rows)
    if kind == "choice":
        ours, theirs = [a[0] for a in ours], [a[0] for a in theirs]
    assert ours == (theirs if kind == "text" else pytest.approx(theirs, abs=1e-3))


def test_an_empty_context_and_a_thinking_part_are_treated_as_lm_eval_does(
    tiny_folder: Any, tiny_engine: TransformersEngine
) -> None:
    empty = TaskDocs(tiny.choice_task(doc_to_text="", target_delimiter=""), open_base(str(tiny_folder), device="cpu"))
    rows = list(empty.task.eval_docs)
    assert [a[0] for a in _of_engine(empty, tiny_engine, rows)] == pytest.approx(
        [a[0] for a in _of_hf(empty, rows)], abs=1e-3
    )
    plain = TaskDocs(tiny.text_task(), empty.lm)
    seen = _of_hf(plain, rows)
    mark = max(set("".join(seen)), key="".join(seen).count)
    for end in (mark, int(empty.lm.tokenizer.convert_tokens_to_ids(mark))):
        thinking = TaskDocs(tiny.text_task(), open_base(str(tiny_folder), device="cpu", think_end_token=end))
        ours = _of_engine(thinking, tiny_engine, rows)
        assert ours == _of_hf(thinking, rows)
        assert ours != seen


@pytest.mark.parametrize("kind", MAKERS)
def test_a_mixed_batch_answers_as_one_run_per_mixture(
    kind: str, tiny_lm: HFLM, tiny_engine: TransformersEngine
) -> None:
    generator = torch.Generator().manual_seed(0)
    ranks = tiny_engine.ranks()
    mixtures = [None, *({n: 1 + 0.3 * torch.randn(r, generator=generator) for n, r in ranks.items()} for _ in range(2))]
    docs = TaskDocs(MAKERS[kind](), tiny_lm)
    requests = docs.instances(list(docs.task.eval_docs))
    rows = [i % 3 for i in range(len(requests))]
    mixed = docs.answer(tiny_engine, requests, mixtures, rows)
    for row, z in enumerate(mixtures):
        own = [i for i, r in enumerate(rows) if r == row]
        alone = docs.answer(tiny_engine, [requests[i] for i in own], [z])
        for i, answers in zip(own, alone, strict=True):
            for a, b in zip(mixed[i], answers, strict=True):
                assert a == b if kind == "text" else a == pytest.approx(b, abs=1e-3)


def test_asking_leaves_the_task_as_it_was(tiny_lm: HFLM) -> None:
    def prompts(task: ConfigurableTask) -> list[Any]:
        task.set_fewshot_seed(5)
        task.config.num_fewshot = 3
        task.build_all_requests(limit=4)
        first = [request.args for request in task.instances]
        task.build_all_requests(limit=4)
        return [*first, *(request.args for request in task.instances)]

    undisturbed = prompts(tiny.text_task(data=tiny.splits(fewshot=tiny.questions(9, 700))))
    task = tiny.text_task(data=tiny.splits(fewshot=tiny.questions(9, 700)))
    task.set_fewshot_seed(5)
    task.config.num_fewshot = 3
    task.build_all_requests(limit=4)
    first = [request.args for request in task.instances]
    docs = TaskDocs(task, tiny_lm, forbidden=["0" * 12])
    doc = task.validation_docs()[0]
    requests = docs.instances([doc])
    docs.metrics(doc, requests[0], ["abc"])
    assert all(not request.resps and not request.filtered_resps for request in [*task.instances, *requests[0]])
    task.build_all_requests(limit=4)
    assert [*first, *(request.args for request in task.instances)] == undisturbed


def test_a_doc_is_no_example_of_its_own_and_scored_docs_are_none(tiny_lm: HFLM) -> None:
    rows = tiny.questions(8, 100)
    task = tiny.text_task(data=tiny.splits(validation=rows, fewshot=rows))
    forbidden = TaskDocs(task, tiny_lm, PromptForm(num_fewshot=4))
    digests = {doc["q"]: digest for doc, digest in zip(rows, _digests(rows), strict=True)}
    docs = TaskDocs(task, tiny_lm, PromptForm(num_fewshot=4), forbidden=[digests[rows[0]["q"]]])
    for doc, request in zip(rows, docs.instances(rows), strict=True):
        examples, asked = request[0].args[0].rsplit("Q: ", 1)
        assert asked.startswith(doc["q"])
        assert f"Q: {doc['q']}\n" not in examples
        assert f"Q: {rows[0]['q']}\n" not in examples
        assert examples.count("Q: ") == 4
    assert any(f"Q: {rows[0]['q']}\n" in r[0].args[0] for r in forbidden.instances(rows[1:]))


def test_a_prompt_is_the_same_in_any_company(tiny_lm: HFLM) -> None:
    docs = TaskDocs(
        tiny.text_task(data=tiny.splits(fewshot=tiny.questions(9, 700))), tiny_lm, PromptForm(num_fewshot=2)
    )
    rows = tiny.questions(5, 100)
    together = [request[0].args for request in docs.instances(rows)]
    assert [docs.instances([row])[0][0].args for row in reversed(rows)] == together[::-1]
    assert len({args[0].split("Q: ")[1] for args in together}) > 1


def test_too_few_examples_are_told(tiny_lm: HFLM) -> None:
    rows = tiny.questions(4, 100)
    task = tiny.text_task(data=tiny.splits(validation=rows, fewshot=rows))
    with pytest.raises(TaskError, match="cannot draw 4 few-shot examples that are neither the doc itself nor"):
        TaskDocs(task, tiny_lm, PromptForm(num_fewshot=4)).instances(rows)


def test_generation_arguments_reach_the_requests(tiny_lm: HFLM, tiny_engine: TransformersEngine) -> None:
    form = PromptForm(gen_kwargs={"max_gen_toks": 3, "until": []})
    docs = TaskDocs(tiny.text_task(), tiny_lm, form)
    request = docs.generation(docs.instances(tiny.questions(1))[0][0])
    assert request.max_new_tokens == 3
    assert all(len(text) <= 3 for text in _of_engine(docs, tiny_engine, tiny.questions(3)))


def test_sampling_follows_its_seed(tiny_lm: HFLM, tiny_engine: TransformersEngine) -> None:
    form = PromptForm(gen_kwargs={"do_sample": True, "temperature": 1.0, "until": []})
    docs = TaskDocs(tiny.text_task(), tiny_lm, form)
    rows = tiny.questions(4)
    same = _of_engine(docs, tiny_engine, rows, seed=1)
    assert same == _of_engine(docs, tiny_engine, rows, seed=1)
    assert same != _of_engine(docs, tiny_engine, rows, seed=2)


def test_no_room_for_a_prompt_is_told(tiny_lm: HFLM) -> None:
    docs = TaskDocs(tiny.text_task(), tiny_lm, PromptForm(gen_kwargs={"max_gen_toks": 512}))
    with pytest.raises(TaskError, match="asks for 512 new tokens, the model holds 512 in all"):
        docs.generation(docs.instances(tiny.questions(1))[0][0])


def test_metrics_and_their_aggregate_are_the_tasks_own(tiny_lm: HFLM) -> None:
    rows = tiny.questions(8)
    docs = TaskDocs(tiny.choice_task(), tiny_lm)
    requests = docs.instances(rows)
    right = [[(0.0 if i == row["gold"] else -1.0, False) for i in range(4)] for row in rows[:6]]
    wrong = [[(0.0 if i != row["gold"] else -1.0, False) for i in range(4)] for row in rows[6:]]
    metrics = [docs.metrics(*triple) for triple in zip(rows, requests, [*right, *wrong], strict=True)]
    assert docs.aggregate(metrics) == 0.75
    assert [docs.right(m) for m in metrics] == [True] * 6 + [False] * 2
    assert [docs.gold_index(row) for row in rows] == [(row["gold"],) for row in rows]


def test_a_metric_where_less_is_better_is_turned_round(tiny_lm: HFLM) -> None:
    docs = TaskDocs(tiny.rolling_task(), tiny_lm)
    row = tiny.questions(1)
    request = docs.instances(row)[0]
    good, bad = (docs.metrics(row[0], request, [value]) for value in (-10.0, -500.0))
    assert docs.aggregate([good]) > docs.aggregate([bad])
    assert not docs.objective.higher_is_better


def test_metric_and_filter_are_the_first_or_as_named(tiny_lm: HFLM) -> None:
    filters = [
        {"name": "last", "filter": [{"function": "regex", "regex_pattern": "(.)$"}, {"function": "take_first"}]},
        {"name": "whole", "filter": [{"function": "take_first"}]},
    ]
    task = tiny.text_task(filter_list=copy.deepcopy(filters), process_results=_is_single)
    rows = tiny.questions(1)
    values = []
    for name in (None, "whole"):
        docs = TaskDocs(task, tiny_lm, filter=name)
        values.append((docs.objective.filter, docs.metrics(rows[0], docs.instances(rows)[0], ["abc"])["vowel"]))
    assert values == [("last", 1.0), ("whole", 0.0)]
    assert TaskDocs(tiny.choice_task(), tiny_lm, metric="acc_norm").objective.metric == "acc_norm"
    with pytest.raises(ArgumentError, match=r"metric=acc_nrom is not a metric of .* did you mean 'acc_norm'"):
        TaskDocs(tiny.choice_task(), tiny_lm, metric="acc_nrom")
    with pytest.raises(ArgumentError, match="filter=lats is not a filter of task tiny_text; did you mean 'last'"):
        TaskDocs(task, tiny_lm, filter="lats")


def test_one_answer_stands_for_all_votes(tiny_lm: HFLM) -> None:
    votes = [
        {"name": "majority", "filter": [{"function": "take_first_k", "k": 3}, {"function": "majority_vote"}]},
    ]
    votes[0]["filter"].append({"function": "take_first"})  # type: ignore[attr-defined]
    docs = TaskDocs(tiny.text_task(filter_list=votes, repeats=3), tiny_lm)
    row = tiny.questions(1)
    assert docs.metrics(row[0], docs.instances(row)[0], ["abc"])["vowel"] == 1.0


def test_an_unknown_task_is_told() -> None:
    with pytest.raises(TaskError, match="task t2_arc_chalenge does not exist; did you mean 't2_arc_challenge"):
        load_task("t2_arc_chalenge")


def test_a_group_is_no_task() -> None:
    with pytest.raises(TaskError, match="t2_seen is a group of 3 tasks; name one of"):
        load_task("t2_seen")


def _is_single(doc: Any, results: list[str]) -> dict[str, float]:
    return {"vowel": float(len(results[0]) == 1)}


def _digests(rows: tiny.Rows) -> list[str]:
    from t2.core.digests import doc_hash

    return [doc_hash(row) for row in rows]
