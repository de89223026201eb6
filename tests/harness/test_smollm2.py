"""The model ``t2`` on a real model and real tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import load_expert
from t2.adapters.strategies import DomainPrompts, Job, Options
from t2.adapters.strategies.dispatch import route
from t2.harness.base import DEMO_ID, base_id
from t2.harness.catalogue import find_expert
from t2.harness.defaults import default_classifier
from t2.harness.held_out import held_out_prompts
from t2.harness.model import T2LM
from t2.harness.tasks import PromptForm, TaskDocs, encode_pair, load_task
from tests.harness import tiny

SHORT = {"gen_kwargs": "max_gen_toks=12"}


@pytest.fixture(scope="module")
def engine(smollm2: HFLM) -> TransformersEngine:
    return TransformersEngine(smollm2.model, smollm2.tokenizer, base_id(None))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture(autouse=True)
def homes(cache: Path, monkeypatch: pytest.MonkeyPatch, engine: TransformersEngine) -> None:
    """The tests of this file share their spectral bases and three small random experts of the last four layers."""
    monkeypatch.setenv("T2_CACHE_DIR", str(cache / "cache"))
    monkeypatch.setenv("T2_EXPERTS_DIR", str(cache / "experts"))
    if not (cache / "experts").exists():
        for seed, domain in enumerate(("math", "code", "reasoning")):
            path = cache / "experts" / f"{domain}.safetensors"
            tiny.save_expert(path, engine, seed, domain=domain, scale=0.3, layers=range(26, 30))


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {name: load_task(name) for name in ("t2_arc_easy", "t2_arc_easy_letter", "t2_math500")}


def _t2(lm: HFLM, **args: Any) -> T2LM:
    return T2LM(pretrained=lm.model, tokenizer=lm.tokenizer, device="cpu", batch_size=4, **args)


def _hf(lm: HFLM) -> HFLM:
    return HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=4)


def test_the_demo_model_is_whole(smollm2: HFLM, engine: TransformersEngine) -> None:
    assert (engine.base.id, engine.base.revision) == (DEMO_ID, None)
    assert len(engine.ranks()) == 210
    chat = smollm2.apply_chat_template([{"role": "user", "content": "What is 2+2?"}])
    assert chat.endswith("<|im_start|>assistant\n")
    text = "Paris, 12.5 km — ok"
    assert smollm2.tok_decode(smollm2.tok_encode(text), skip_special_tokens=False) == text


def test_none_equals_hf_on_a_generation_a_likelihood_and_a_rolling_task(smollm2: HFLM, tasks: dict[str, Task]) -> None:
    rolling = tiny.rolling_task()
    for task, flags in (
        (tasks["t2_arc_easy"], {"num_fewshot": 1}),
        (tasks["t2_math500"], {"apply_chat_template": True, **SHORT}),
        (rolling, {}),
    ):
        ours = tiny.evaluate(_t2(smollm2), [task], limit=3, **flags)
        theirs = tiny.evaluate(_hf(smollm2), [task], limit=3, **flags)
        assert tiny.answers(ours, task.task_name) == tiny.answers(theirs, task.task_name)
        assert ours["results"] == theirs["results"]


def test_the_batched_engine_gives_hfs_tokens_in_float32(
    smollm2: HFLM, engine: TransformersEngine, tasks: dict[str, Task]
) -> None:
    rows = [tasks["t2_math500"].eval_docs[i] for i in range(5)]
    docs = TaskDocs(tasks["t2_math500"], smollm2, PromptForm(gen_kwargs={"max_gen_toks": 12}))
    requests = docs.instances(rows)
    ours = [answers[0] for answers in docs.answer(engine, requests)]
    assert ours == smollm2.generate_until([request[0] for request in requests])
    choices = TaskDocs(tasks["t2_arc_easy"], smollm2)
    asked = choices.instances([tasks["t2_arc_easy"].eval_docs[i] for i in range(4)])
    flat: list[Any] = [answer for answers in choices.answer(engine, asked) for answer in answers]
    theirs = smollm2.loglikelihood([request for some in asked for request in some])
    assert [ll for ll, _ in flat] == pytest.approx([ll for ll, _ in theirs], abs=1e-3)
    assert [greedy for _, greedy in flat] == [greedy for _, greedy in theirs]


def test_a_search_on_arc_finds_a_mixture_and_says_so(
    smollm2: HFLM, tasks: dict[str, Task], capsys: pytest.CaptureFixture[str]
) -> None:
    args = {"adapt": "cem", "population": 4, "generations": 2, "shots": 4, "space": "delta"}
    first = _t2(smollm2, **args)
    results = tiny.evaluate(first, [tasks["t2_arc_easy"]], limit=4)
    record = first.records[0]
    assert record.pool == "validation docs"
    assert record.held_out is not None
    assert record.held_out.before is not None
    assert record.held_out.after is not None
    assert record.held_out.after >= record.held_out.before
    assert "searching mixtures of 3 experts on 4 adaptation docs" in capsys.readouterr().err
    again = _t2(smollm2, **args)
    repeated = tiny.evaluate(again, [tasks["t2_arc_easy"]], limit=4)
    assert tiny.answers(repeated, "t2_arc_easy") == tiny.answers(results, "t2_arc_easy")
    assert again.records[0].digest() == record.digest()


def test_a_task_that_is_too_hard_gives_no_signal(smollm2: HFLM, tasks: dict[str, Task]) -> None:
    lm = _t2(smollm2, adapt="cem", population=2, generations=2, shots=2, space="delta")
    results = tiny.evaluate(lm, [tasks["t2_math500"]], limit=1, **SHORT)
    assert lm.records[0].no_signal
    assert lm.records[0].mixtures[0].alpha == {}
    assert "NO SIGNAL" in results["config"]["t2"]["records"][0]["note"]


def test_the_demo_classifier_names_what_it_is_shown(smollm2: HFLM, engine: TransformersEngine) -> None:
    labels = ("code", "math", "reasoning", "others")
    classifier = default_classifier(engine.base)
    assert classifier is not None
    shipped = held_out_prompts(labels, ())
    few = [pair for label in labels for pair in [pair for pair in shipped.prompts if pair[1] == label][:4]]
    experts = [load_expert(find_expert(f"demo/{name}")) for name in ("math", "code", "reasoning")]
    job = Job(
        "few",
        (),
        experts,
        engine,
        Options(),
        lambda context, text: encode_pair(smollm2, context, text),
        str,
        progress=False,
        classifier=classifier,
        held_out=lambda wanted, by: DomainPrompts(tuple(few), shipped.sources),
    )
    found = route(job, [text for text, _ in few])
    right = sum(name == domain for name, (_, domain) in zip(found.named, few, strict=True))
    assert right >= 14, found.calibration.confusion
    assert found.calibration.accuracy == right / 16
    for name, row in zip(found.named, found.rows, strict=True):
        if not found.below[found.rows.index(row)]:
            assert {k for k, a in found.choices[row].alpha.items() if a} == ({name} - {"others"})


def test_dispatch_answers_with_the_experts_of_the_domains(
    smollm2: HFLM, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t2.harness.held_out.PER_DOMAIN", 2)
    lm = _t2(smollm2, adapt="prompt")
    results = tiny.evaluate(lm, [tasks["t2_arc_easy_letter"]], limit=4, apply_chat_template=True)
    record = lm.records[0]
    assert sum(record.dispatch.values()) == sum(used.requests for used in record.mixtures) == 4
    assert set(record.dispatch) == {"math", "code", "reasoning", "others"}
    assert len(results["samples"]["t2_arc_easy_letter"]) == 4
