"""Requests that lm-eval's model refuses are refused in one line before a search, and no others."""

from __future__ import annotations

import copy
import importlib
import os
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from lm_eval.models.huggingface import HFLM

from t2.adapters.engine.transformers import TransformersEngine
from t2.core.errors import T2Error, TaskError
from t2.harness.adaptation import TaskAdaptation
from t2.harness.base import open_base
from t2.harness.model import T2LM
from t2.harness.preflight import check_requests
from t2.harness.tasks import TaskDocs, TaskSource, load_task
from tests.harness import tiny
from tests.tasks_yaml.test_tasks import TASKS as T2_TASKS

SEARCH = {"adapt": "cem", "population": 2, "generations": 1, "shots": 2}
DATA = tiny.splits(test=tiny.questions(3))


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that an adaptation was planned for."""
    planned: list[str] = []
    plan = TaskAdaptation.plan

    def counted(self: TaskAdaptation) -> None:
        planned.append(self.name)
        plan(self)

    monkeypatch.setattr(TaskAdaptation, "plan", counted)
    return planned


def make(folder: Path, **args: Any) -> T2LM:
    return T2LM.create_from_arg_obj({"pretrained": str(folder), **SEARCH, **args}, {"device": "cpu", "batch_size": 3})


def refuse(lm: T2LM, tasks: list[Any], says: str, plans: list[str], **flags: Any) -> None:
    """Check that an evaluation ends in one line before anything was planned, answered or written."""
    with pytest.raises(T2Error, match=says) as caught:
        tiny.evaluate(lm, tasks, **flags)
    assert "\n" not in str(caught.value)
    assert plans == []
    assert not list(Path(os.environ["T2_CACHE_DIR"]).glob("adaptations/*"))


def save_tokenizer(folder: Path, change: Callable[[Any], None]) -> str:
    tokenizer = tiny.tokenizer()
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return str(folder)


def without(*names: str) -> Callable[[Any], None]:
    def change(tokenizer: Any) -> None:
        for name in names:
            setattr(tokenizer, name, None)

    return change


def merging() -> transformers.PreTrainedTokenizerFast:
    """The tiny tokenizer, where "ab" is one token and letters that it has no token for are dropped."""
    vocabulary = ["<pad>", "<s>", "</s>", "ab", *string.printable.replace("~", "")]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(vocabulary)}, [("a", "b")]))
    inner.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def by_lm_eval(lm: Any, task: Any) -> str | None:
    """The error of lm-eval's own model on a task's requests; None if it answers them."""
    kinds: dict[str, list[Any]] = {}
    for request in copy.deepcopy(task.instances):
        kinds.setdefault(request.request_type, []).append(request)
    try:
        for kind, requests in kinds.items():
            getattr(lm, kind)(requests)
    except Exception as error:  # noqa: BLE001 - whatever it fails with
        return f"{type(error).__name__}: {error}"
    return None


def agree(lm: Any, task: Any, limit: int = 3) -> bool:
    """Whether both lm-eval's model and the checks before a search accept a task; they must not differ."""
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    failure, refusal = by_lm_eval(lm, task), None
    try:
        check_requests(lm, {str(task.task_name): task})
    except TaskError as error:
        refusal = str(error)
    assert (failure is None) == (refusal is None), f"lm-eval: {failure}; here: {refusal}"
    assert "\n" not in (refusal or "")
    return failure is None


def test_thinking_with_likelihoods(tiny_folder: Path, experts: str, plans: list[str]) -> None:
    lm = make(tiny_folder, enable_thinking=True, think_end_token="e")
    refuse(
        lm,
        [tiny.choice_task(data=DATA)],
        "task tiny_choice: lm-eval computes no likelihoods with enable_thinking=True",
        plans,
    )
    refuse(
        lm,
        [tiny.text_task(data=DATA), tiny.choice_task(data=DATA)],
        "task tiny_choice: lm-eval computes no likelihoods",
        plans,
    )
    assert agree(lm.inner, tiny.text_task(data=DATA))
    assert agree(lm.inner, tiny.rolling_task(data=DATA))
    assert not agree(lm.inner, tiny.choice_task(data=DATA))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"doc_to_choice": ["<s>", "bb", "cc", "dd"], "doc_to_text": "", "target_delimiter": ""},
            "doc 0: the answer '<s>' has 0 tokens",
        ),
        ({"doc_to_choice": ["a", "b", "c", "d" * 600]}, "has 601 tokens, the model takes 1 to 512"),
        ({"doc_to_text": "{{' '}} "}, "doc 0: the prompt ' +' has no tokens"),
    ],
    ids=str,
)
def test_texts_that_leave_no_tokens_or_too_many(
    config: Mapping[str, Any], says: str, tiny_folder: Path, experts: str, plans: list[str]
) -> None:
    lm = make(tiny_folder)
    refuse(lm, [tiny.choice_task(data=DATA, **config)], says, plans)
    assert not agree(lm.inner, tiny.choice_task(data=DATA, **config))


@pytest.mark.parametrize(
    ("prompt", "choices", "accepted"),
    [
        ("Q: a", ["b", "cd"], False),
        ("Q: a", ["b", "c"], True),
        ("Q: a", ["cd", "e", "b"], True),
        ("Q: a", [" b", "c"], True),
        ("Q: x", ["é", "cd"], False),
        ("Q: x", ["é", "c"], True),
        ("é", ["b", "c"], False),
        ("é1", ["b", "é1"], True),
        ("Q:\n\n", ["b", "c"], True),
        ("", ["b", "cd"], True),
        ("", ["b", "<s>"], True),
        ("", ["<s>", "bc"], False),
        ("", ["b", "<s>c"], True),
        ("Q\t \n", ["\n", "c"], True),
        ("Q", ["d" * 511, "c"], True),
        ("Q", ["d" * 512, "c"], True),
        ("Q", ["d" * 513, "c"], False),
        ("Q" + " " * 510, ["dd", "c"], True),
        ("Q" + " " * 511, ["dd", "c"], False),
        ("Q" * 2000, ["dd", "c"], True),
    ],
    ids=lambda value: str(value)[:20],
)
def test_likelihoods_are_refused_where_lm_eval_fails_and_only_there(
    prompt: str, choices: list[str], accepted: bool, tiny_folder: Path
) -> None:
    lm = open_base(str(tiny_folder), device="cpu", batch_size=3, tokenizer=merging())
    data = {split: [{"q": prompt, "choices": choices, "gold": 0}] * 2 for split in ("validation", "test")}
    config = {"doc_to_text": "{{q}}", "target_delimiter": "", "doc_to_choice": "choices"}
    task = tiny.choice_task(data=data, **config)
    task.config.doc_to_text = lambda doc: doc["q"]  # a template would lose a line's end
    assert agree(lm, task, 1) == accepted
    if accepted:
        engine = TransformersEngine(lm.model, lm.tokenizer, "tiny")
        (found,) = TaskDocs(task, lm).answer(engine, [task.instances])
        for ours, theirs in zip(found, lm.loglikelihood(task.instances, disable_tqdm=True), strict=True):
            assert isinstance(ours, tuple)
            assert ours[0] == pytest.approx(theirs[0], abs=1e-3)
            assert ours[1] == theirs[1]


@pytest.mark.parametrize("missing", [("bos_token", "eos_token"), ("bos_token",), ("eos_token",)], ids=str)
def test_tokenizers_without_first_or_last_token(
    missing: tuple[str, ...], tiny_folder: Path, experts: str, tmp_path: Path, plans: list[str]
) -> None:
    folder = save_tokenizer(tmp_path / "words", without(*missing))
    lm = make(tiny_folder, tokenizer=folder)
    kinds = (tiny.choice_task, tiny.rolling_task, tiny.text_task)
    accepted = [agree(lm.inner, kind(data=DATA)) for kind in kinds]
    assert accepted == ([False] * 3 if len(missing) == 2 else [True, True, "eos_token" not in missing])
    for kind, fine in zip(kinds, accepted, strict=True):
        if not fine:
            refuse(lm, [kind(data=DATA)], "the tokenizer has no token to (begin|end) a text with", plans)


def test_rolling_texts_of_any_length(tiny_lm: HFLM) -> None:
    for text in ("", " ", "a", "é", "{{q}}" * 600):
        assert agree(tiny_lm, tiny.rolling_task(data=DATA, doc_to_target=f"x{text}"))


def test_chat_flags_without_a_template(tiny_folder: Path, experts: str, tmp_path: Path, plans: list[str]) -> None:
    folder = save_tokenizer(tmp_path / "words", without("chat_template"))
    for adapt in ("none", "mix", "prompt"):
        lm = T2LM.create_from_arg_obj({"pretrained": str(tiny_folder), "adapt": adapt, "tokenizer": folder})
        for flags in ({}, {"fewshot_as_multiturn": True, "num_fewshot": 1}, {"system_instruction": "Be brief."}):
            says = "the tokenizer has no chat template; leave --apply_chat_template out"
            refuse(lm, [tiny.choice_task(data=DATA)], says, plans, apply_chat_template=True, **flags)


@pytest.mark.parametrize("adapt", ["classifier", "auto"])
def test_a_classifier_that_asks_in_a_template_which_is_not_there(
    adapt: str, tiny_folder: Path, tiny_engine: TransformersEngine, experts: str, tmp_path: Path
) -> None:
    trained = {"apply_chat_template": True}
    labels = ("code", "math", "reasoning", "others")
    path = tmp_path / "experts" / "names.safetensors"
    tiny.save_expert(path, tiny_engine, 9, kind="classifier", labels=labels, training=trained)
    folder = save_tokenizer(tmp_path / "words", without("chat_template"))
    args = {"pretrained": str(tiny_folder), "adapt": adapt, "experts": "alpha+beta+names"}
    T2LM.create_from_arg_obj(args, {"device": "cpu"})
    with pytest.raises(
        T2Error, match=r"classifier names: it was trained .*; the tokenizer has no .*; name a tok"
    ) as told:
        T2LM.create_from_arg_obj({**args, "tokenizer": folder}, {"device": "cpu"})
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("adapt", ["none", "mix", "cem"])
def test_pictures_on_a_model_of_texts(adapt: str, tiny_folder: Path, experts: str, plans: list[str]) -> None:
    args = SEARCH if adapt == "cem" else {}
    lm = T2LM.create_from_arg_obj({"pretrained": str(tiny_folder), "adapt": adapt, **args}, {"device": "cpu"})
    task = load_task("tiny_vqa", include_path=Path(__file__).parent / "vqa")
    refuse(lm, [tiny.choice_task(data=DATA), task], "task tiny_vqa needs images or audio", plans)


def _metric_without_library(*_: Any) -> Any:
    importlib.import_module("library_that_is_not_there")


def _metric_without_data(*_: Any) -> Any:
    raise LookupError("Resource punkt not found.\n  Please use the NLTK Downloader\n")


def _metric_of_words(doc: Any, results: Any) -> dict[str, float]:
    return {"vowel": float(results[0].split()[0] == "a")}


@pytest.mark.parametrize(
    "config",
    [
        {"process_results": _metric_without_library},
        {"process_results": _metric_without_data},
        {"metric_list": [tiny.metric("vowel", aggregation=_metric_without_library)]},
        {"metric_list": [tiny.metric("vowel"), tiny.metric("other", aggregation=_metric_without_library)]},
    ],
    ids=["metric", "data", "aggregation", "second aggregation"],
)
def test_a_metric_whose_library_is_missing(
    config: dict[str, Any], tiny_folder: Path, experts: str, plans: list[str]
) -> None:
    if len(config.get("metric_list", ())) > 1:
        config = {**config, "process_results": lambda doc, results: {"vowel": 1.0, "other": 1.0}}
    says = "task tiny_text cannot be scored here: .*; install what its metrics need"
    refuse(make(tiny_folder), [tiny.text_task(data=DATA, **config)], says, plans)


def test_a_metric_that_fails_on_made_up_answers_is_not_refused(tiny_lm: HFLM) -> None:
    assert agree(tiny_lm, tiny.text_task(data=DATA, process_results=_metric_of_words))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_gen_toks": 64}, "asks for 64 new tokens, the model holds 64 in all"),
        ({"max_gen_toks": 65}, "asks for 65 new tokens"),
        ({}, "asks for 256 new tokens"),
        ({"max_new_tokens": "100"}, "asks for 100 new tokens"),
        ({"max_gen_toks": "many"}, "invalid literal"),
        ({"max_gen_toks": 0}, "max_gen_toks must be at least 1"),
        ({"until": [7], "max_gen_toks": 5}, "until must be texts, got 7"),
        ({"until": [["a"]], "max_gen_toks": 5}, "until must be texts"),
        ({"until": {"a": 1}, "max_gen_toks": 5}, "until must be texts"),
        ({"until": 3, "max_gen_toks": 5}, "until must be texts, got 3"),
        ({"until": ["a", None], "max_gen_toks": 5}, "until must be texts, got None"),
        ({"do_sample": True, "temperature": 0.0, "max_gen_toks": 5}, "temperature"),
    ],
    ids=str,
)
def test_generation_arguments(
    given: dict[str, Any], says: str, tiny_folder: Path, experts: str, plans: list[str]
) -> None:
    lm = make(tiny_folder, max_length=64)
    refuse(lm, [tiny.text_task(data=DATA, generation_kwargs=given)], says, plans)
    assert not agree(lm.inner, tiny.text_task(data=DATA, generation_kwargs=given))
    assert agree(lm.inner, tiny.text_task(data=DATA, generation_kwargs={"max_gen_toks": 63, "until": "a"}))


def test_arguments_that_are_no_dict(tiny_lm: HFLM) -> None:
    task = tiny.text_task(data=DATA)
    task.build_all_requests(limit=2, rank=0, world_size=1)
    for request in task.instances:
        request.arguments = (request.args[0], ["\n"])
    assert by_lm_eval(tiny_lm, task) is not None
    with pytest.raises(TaskError, match="takes generation arguments as a dict, got"):
        check_requests(tiny_lm, {"tiny_text": task})


def test_an_answer_of_no_tokens_where_the_model_sets_its_own_length(tiny_folder: Path) -> None:
    lm = open_base(str(tiny_folder), device="cpu", batch_size=3)
    lm.model.generation_config.max_new_tokens = 4
    assert agree(lm, tiny.text_task(data=DATA, generation_kwargs={"max_gen_toks": 0, "until": []}))


PROMPTS = ["", " ", "\n", "a ", "\ta\n\n", "é", "日本 ", "<s>a", "a</s>", "x" * 900]


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda text: repr(text)[:20])
def test_odd_prompts_are_refused_where_lm_eval_fails_and_only_there(prompt: str, tiny_lm: HFLM) -> None:
    data = {split: [{**row, "q": prompt} for row in tiny.questions(2)] for split in ("validation", "test")}
    for kind in (tiny.choice_task, tiny.text_task):
        task = kind(data=data)
        task.config.doc_to_text = lambda doc: doc["q"]
        agree(tiny_lm, task, 2)


@pytest.mark.parametrize(
    "task",
    [
        lambda: tiny.text_task(data=DATA, repeats=3, generation_kwargs={"do_sample": True, "temperature": 0.7}),
        lambda: tiny.text_task(data=DATA, num_fewshot=2),
        lambda: tiny.choice_task(data=DATA, num_fewshot=2, metric_list=[tiny.metric("acc_mutual_info")]),
        lambda: tiny.choice_task(data=DATA, doc_to_target=lambda doc: [doc["gold"], 0]),
        lambda: tiny.text_task(
            data=DATA,
            process_results=None,
            doc_to_target=lambda doc: doc["choices"],
            metric_list=[tiny.metric("exact_match")],
        ),
        lambda: tiny.text_task(
            data=DATA, filter_list=[{"name": "first", "filter": [{"function": "regex"}, {"function": "take_first"}]}]
        ),
        lambda: tiny.choice_task(
            data=DATA, doc_to_text=lambda doc: doc["gold"], doc_to_choice=lambda doc: doc["choices"], doc_to_target="q"
        ),
    ],
    ids=["repeats", "few shots", "mutual information", "labels", "targets", "filters", "inputs"],
)
def test_common_forms_of_tasks_are_accepted(task: Callable[[], Any], tiny_lm: HFLM) -> None:
    assert agree(tiny_lm, task())


def test_the_tasks_that_come_with_t2_are_accepted(tiny_folder: Path) -> None:
    lm = open_base(str(tiny_folder), device="cpu", max_length=8192)
    source = TaskSource()
    tasks = {name: source.load(name) for name in T2_TASKS}
    for task in tasks.values():
        task.build_all_requests(limit=2, rank=0, world_size=1)
    check_requests(lm, tasks)


def test_answers_of_a_cache_are_not_refused(tiny_folder: Path, experts: str, tmp_path: Path, plans: list[str]) -> None:
    cache = str(tmp_path / "answers")
    tasks = (tiny.choice_task, tiny.text_task)
    found = []
    for limit in (2, 3, 3):
        lm = T2LM.create_from_arg_obj({"pretrained": str(tiny_folder)}, {"device": "cpu", "batch_size": 3})
        results = tiny.evaluate(lm, [task(data=DATA) for task in tasks], use_cache=cache, limit=limit)
        found.append([tiny.answers(results, name)[:2] for name in ("tiny_choice", "tiny_text")])
    assert found[0] == found[1] == found[2]
    assert plans == []
