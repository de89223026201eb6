"""Every task builds in lm-eval, scores gold answers 1 and wrong ones 0, and keeps scored documents out of its pool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval.tasks import TaskManager

import t2.tasks_yaml
from t2.core.digests import doc_hash
from t2.core.errors import DataError, TaskError
from t2.harness.data import load_rows

FOLDER = Path(next(iter(t2.tasks_yaml.__path__)))
TASKS = {
    "t2_arc_challenge": 1172,
    "t2_arc_challenge_letter": 1172,
    "t2_arc_easy": 2376,
    "t2_arc_easy_letter": 2376,
    "t2_gsm8k": 1319,
    "t2_gsm8k_steps": 1292,
    "t2_humaneval": 144,
    "t2_math": 5000,
    "t2_math500": 500,
    "t2_mbpp": 500,
    "t2_mbpp_programs": 299,
}
# Scored by the likelihood of choices, and not by an answer.
BY_LIKELIHOOD = ("t2_arc_challenge", "t2_arc_easy", "t2_gsm8k_steps", "t2_mbpp_programs")
GROUPS = {
    "t2_unseen": ["t2_math", "t2_humaneval", "t2_arc_challenge"],
    "t2_seen": ["t2_gsm8k", "t2_mbpp", "t2_arc_easy"],
}
# Another choice would be another benchmark under the same name and version.
HUMANEVAL_POOL = [3, 12, 25, 31, 46, 54, 59, 68, 75, 97, 98, 108, 117, 118, 120, 132, 146, 151, 159, 160]


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    # As T2LM's users have it: model arguments reach custom_dataset through the metadata.
    return TaskManager(include_path=str(FOLDER), include_defaults=False, metadata={"pretrained": "x", "adapt": "cem"})


@pytest.fixture(scope="module")
def tasks(manager: TaskManager) -> dict[str, Any]:
    return dict(manager.load(list(TASKS))["tasks"])


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.delenv("T2_DATA_DIR", raising=False)


def score(task: Any, doc: dict[str, Any], answers: list[Any]) -> dict[str, float]:
    """A document's metrics under the task's first filter, as lm-eval computes them."""
    context = task.fewshot_context(doc, num_fewshot=0)
    built = task.construct_requests(doc=doc, ctx=context, metadata=(task.config.task, 0, 1))
    requests = built if isinstance(built, list) else [built]
    for request, answer in zip(requests, answers, strict=True):
        request.resps = [answer]
    task._filters[0].apply(requests)
    name = task._filters[0].name
    return dict(task.process_results(doc, [request.filtered_resps[name] for request in requests]))


def test_every_yaml_is_a_known_task_or_group(manager: TaskManager) -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*TASKS, *GROUPS, "t2_domains"}
    assert {name for name in manager.all_tasks if name.startswith("t2_")} == {*TASKS, *GROUPS, "t2_domains"}


@pytest.mark.parametrize("name", TASKS)
def test_the_scored_documents(name: str, tasks: dict[str, Any]) -> None:
    task = tasks[name]
    assert len(task.eval_docs) == TASKS[name]
    assert task.config.metadata["t2"]["domain"] in ("math", "code", "reasoning")
    assert getattr(task, "UNSAFE_CODE", False) == (name in ("t2_humaneval", "t2_mbpp"))
    assert all(task.higher_is_better().values())


def test_groups_hold_their_tasks(manager: TaskManager) -> None:
    for group, members in GROUPS.items():
        assert sorted(manager.load([group])["tasks"]) == sorted(members)


@pytest.mark.parametrize(
    "name",
    ["t2_arc_challenge", "t2_arc_challenge_letter", "t2_arc_easy", "t2_arc_easy_letter", "t2_humaneval", "t2_math500"],
)
def test_no_pool_document_is_scored(name: str, tasks: dict[str, Any]) -> None:
    task = tasks[name]
    scored = {doc_hash(doc) for doc in task.eval_docs}
    pool = {doc_hash(doc) for doc in task.validation_docs()}
    assert len(pool) >= 20
    assert not scored & pool


def test_humaneval_gives_twenty_documents_to_the_pool(tasks: dict[str, Any]) -> None:
    task = tasks["t2_humaneval"]
    pool, scored = ({doc["task_id"] for doc in docs} for docs in (task.validation_docs(), task.test_docs()))
    assert len(pool) == 20
    assert pool | scored == {f"HumanEval/{number}" for number in range(164)}
    assert sorted(int(name.rpartition("/")[2]) for name in pool) == HUMANEVAL_POOL


def test_training_sets_are_split_without_overlap(
    tasks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = load_rows("gsm8k", "test")
    rows = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(200)]
    leaked = {"question": test[5]["question"], "answer": test[5]["answer"]}
    (tmp_path / "gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, leaked]))
    monkeypatch.setenv("T2_DATA_DIR", str(tmp_path))
    task = TaskManager(include_path=str(FOLDER), include_defaults=False).load(["t2_gsm8k"])["tasks"]["t2_gsm8k"]
    assert len(task.training_docs()) == 200 - 32
    assert leaked["question"] not in task.training_docs()["question"]
    task.set_fewshot_seed(1)
    context = task.fewshot_context(task.eval_docs[0], num_fewshot=32)
    assert context.count("Question:") == 33
    assert not any(f"Question: {question}\n" in context for question in task.training_docs()["question"])
    with pytest.raises(TaskError, match="33 few-shot examples asked for, but Gsm8kFewshot has 32"):
        task.fewshot_context(task.eval_docs[0], num_fewshot=33)


@pytest.mark.parametrize("name", ["t2_gsm8k", "t2_gsm8k_steps", "t2_math", "t2_mbpp", "t2_mbpp_programs"])
def test_absent_training_data_matters_only_when_used(
    name: str, tasks: dict[str, Any], no_hub: None, manager: TaskManager
) -> None:
    task = manager.load([name])["tasks"][name]
    assert task.has_training_docs()
    with pytest.raises(DataError, match="T2_DATA_DIR"):
        task.training_docs()
    task.set_fewshot_seed(1)
    with pytest.raises(DataError, match="T2_DATA_DIR"):
        task.fewshot_context(task.eval_docs[0], num_fewshot=1)


def test_few_shot_examples_of_humaneval_and_math500_need_no_training_data(tasks: dict[str, Any], no_hub: None) -> None:
    for name, mark in (("t2_humaneval", '"""'), ("t2_math500", "Problem:")):
        task = tasks[name]
        task.set_fewshot_seed(1)
        plain = task.fewshot_context(task.eval_docs[0], num_fewshot=0)
        context = task.fewshot_context(task.eval_docs[0], num_fewshot=2)
        assert context.endswith(task.doc_to_text(task.eval_docs[0]))
        assert context.count(mark) > plain.count(mark)


def test_arc_by_likelihood(tasks: dict[str, Any]) -> None:
    for name in ("t2_arc_challenge", "t2_arc_easy"):
        task = tasks[name]
        assert list(task.aggregation()) == ["acc", "acc_norm"]
        for doc in list(task.eval_docs)[:40]:
            gold = doc["choices"]["label"].index(doc["answerKey"])
            text = task.fewshot_context(doc, num_fewshot=0)
            assert text == f"Question: {doc['question']}\nAnswer:"
            requests = task.construct_requests(doc=doc, ctx=text, metadata=(name, 0, 1))
            assert [request.args[1] for request in requests] == [f" {choice}" for choice in doc["choices"]["text"]]
            right = [(-1.0 if position == gold else -900.0, False) for position in range(len(requests))]
            wrong = [(-900.0 if position == gold else -1.0, False) for position in range(len(requests))]
            assert score(task, doc, right) == {"acc": 1.0, "acc_norm": 1.0}
            assert score(task, doc, wrong) == {"acc": 0.0, "acc_norm": 0.0}


@pytest.mark.parametrize(
    ("name", "prompt", "delimiter"),
    [
        ("t2_gsm8k_steps", "Question: {question}\nAnswer: {prefix}", " "),
        ("t2_mbpp_programs", "# {text}\n# {test}", "\n"),
    ],
)
def test_choices_by_likelihood(name: str, prompt: str, delimiter: str, tasks: dict[str, Any]) -> None:
    task = tasks[name]
    assert list(task.aggregation()) == ["acc", "acc_norm"]
    for doc in list(task.eval_docs)[:40]:
        text = task.fewshot_context(doc, num_fewshot=0)
        assert text == prompt.format(**doc)
        requests = task.construct_requests(doc=doc, ctx=text, metadata=(name, 0, 1))
        assert [request.args for request in requests] == [(text, f"{delimiter}{choice}") for choice in doc["choices"]]
        right = [(-1.0 if position == doc["label"] else -900.0, False) for position in range(4)]
        wrong = [(-900.0 if position == doc["label"] else -1.0, False) for position in range(4)]
        assert score(task, doc, right) == {"acc": 1.0, "acc_norm": 1.0}
        assert score(task, doc, wrong) == {"acc": 0.0, "acc_norm": 0.0}


def test_arc_by_letter(tasks: dict[str, Any]) -> None:
    for name in ("t2_arc_challenge_letter", "t2_arc_easy_letter"):
        task = tasks[name]
        for doc in list(task.eval_docs)[:40]:
            gold = doc["answerKey"]
            other = next(label for label in doc["choices"]["label"] if label != gold)
            text = task.fewshot_context(doc, num_fewshot=0)
            options = zip(doc["choices"]["label"], doc["choices"]["text"], strict=True)
            assert all(f"\n{label}. {option}\n" in text for label, option in options)
            assert score(task, doc, [f" {gold}"]) == {"exact_match": 1.0}
            assert score(task, doc, [f"The answer is {gold}."]) == {"exact_match": 1.0}
            assert score(task, doc, [f" {other}"]) == {"exact_match": 0.0}
            assert score(task, doc, ["I cannot tell"]) == {"exact_match": 0.0}


@pytest.mark.parametrize(
    ("name", "metric", "docs"),
    [
        ("t2_gsm8k", "exact_match", 100),
        ("t2_math", "math_verify", 40),
        ("t2_math500", "math_verify", 40),
        ("t2_humaneval", "pass_at_1", 6),
        ("t2_mbpp", "pass_at_1", 6),
    ],
)
def test_generated_gold_answers_score_one_and_others_zero(
    name: str, metric: str, docs: int, tasks: dict[str, Any]
) -> None:
    task = tasks[name]
    assert list(task.aggregation()) == [metric]
    for doc in list(task.eval_docs)[:docs]:
        assert score(task, doc, [task.doc_to_target(doc)]) == {metric: 1.0}
        assert score(task, doc, ["The answer is 123456.7"]) == {metric: 0.0}
        assert score(task, doc, [""]) == {metric: 0.0}


def test_gsm8k_optimises_the_lenient_reading_and_reports_the_strict_one(tasks: dict[str, Any]) -> None:
    task = tasks["t2_gsm8k"]
    assert [ensemble.name for ensemble in task._filters] == ["flexible-extract", "strict-match"]


@pytest.mark.parametrize("name", [name for name in TASKS if name not in BY_LIKELIHOOD])
def test_generation_is_greedy_and_bounded(name: str, tasks: dict[str, Any]) -> None:
    settings = tasks[name].config.generation_kwargs
    assert settings["do_sample"] is False
    assert 8 <= settings["max_gen_toks"] <= 512
    assert settings["until"]


def test_a_chat_template_gets_the_instruction_and_the_question(tasks: dict[str, Any]) -> None:
    def template(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return json.dumps(messages)

    task = tasks["t2_math500"]
    doc = task.eval_docs[0]
    context = task.fewshot_context(doc, num_fewshot=0, apply_chat_template=True, chat_template=template)
    system, user = json.loads(context)
    assert system["role"] == "system"
    assert "\\boxed{}" in system["content"]
    assert doc["problem"] in user["content"]
