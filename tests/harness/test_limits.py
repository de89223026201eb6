"""Whatever a model's generation configuration and a request ask for, searches and mixed batches answer as lm-eval."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from lm_eval.api.instance import Instance

from t2.adapters.engine.decoding import decodes_by_row
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.strategies import Choice, Job, Plan
from t2.adapters.strategies.prompt import PromptStrategy
from t2.core.errors import TaskError
from t2.harness.base import open_base
from t2.harness.generation import Generations
from t2.harness.model import T2LM
from t2.harness.preflight import check_requests
from t2.harness.tasks import TaskDocs
from tests.adapters.conftest import random_z
from tests.harness import tiny

PROMPTS = ["Q: abc\nA:", "Q: a longer question\nA:", "17 + 4", "\tx"]
GREEDY: dict[str, Any] = {"until": ["z", "\n"], "max_gen_toks": 10, "do_sample": False}

VALUES: dict[str, Any] = {
    "assistant_confidence_threshold": 0.9,
    "assistant_early_exit": 1,
    "assistant_ensemble_weight": 0.5,
    "assistant_lookbehind": 3,
    "bad_words_ids": [[40], [41]],
    "begin_suppress_tokens": [40, 41, 42],
    "bos_token_id": 7,
    "cache_config": {"residual_length": 4},
    "cache_implementation": "static",
    "compile_config": {"mode": "default"},
    "constraints": ["a"],
    "continuous_batching_config": {"num_blocks": 2},
    "decoder_start_token_id": 5,
    "disable_compile": True,
    "diversity_penalty": 0.5,
    "do_sample": False,
    "dola_layers": "low",
    "early_stopping": True,
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.5,
    "eos_token_id": [2, 40, 41, 42],
    "epsilon_cutoff": 0.2,
    "eta_cutoff": 0.2,
    "exponential_decay_length_penalty": (2, 1.5),
    "force_words_ids": [[40]],
    "forced_bos_token_id": 40,
    "forced_eos_token_id": 2,
    "guidance_scale": 1.5,
    "is_assistant": True,
    "length_penalty": 0.5,
    "low_memory": True,
    "max_cache_len": 300,
    "max_length": 30,
    "max_matching_ngram_size": 3,
    "max_new_tokens": 4,
    "max_time": 100.0,
    "min_length": 25,
    "min_new_tokens": 6,
    "min_p": 0.2,
    "no_repeat_ngram_size": 2,
    "num_assistant_tokens": 5,
    "num_assistant_tokens_schedule": "heuristic",
    "num_beam_groups": 2,
    "num_beams": 3,
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_logits": True,
    "output_scores": True,
    "pad_token_id": 9,
    "penalty_alpha": 0.6,
    "prefill_chunk_size": 4,
    "prompt_lookup_num_tokens": 3,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "repetition_penalty": 1.7,
    "return_dict_in_generate": True,
    "sequence_bias": [[[40], 5.0]],
    "speculation_type": "dflash",
    "stop_strings": ["a"],
    "suppress_tokens": [40, 41, 42, 43, 44, 45],
    "target_lookbehind": 3,
    "temperature": 0.7,
    "token_healing": True,
    "top_h": 0.4,
    "top_k": 5,
    "top_p": 0.8,
    "typical_p": 0.6,
    "use_cache": False,
    "use_mtp": True,
    "watermarking_config": {"bias": 6.0, "greenlist_ratio": 0.3},
}


@pytest.fixture(scope="module")
def lm(tiny_folder: Path) -> Any:
    return open_base(str(tiny_folder), device="cpu")


@pytest.fixture(scope="module")
def engine(lm: Any) -> TransformersEngine:
    return TransformersEngine(lm.model, lm.tokenizer, "tiny")


@pytest.fixture(autouse=True)
def restored(lm: Any) -> Iterator[None]:
    kept = copy.deepcopy(lm.model.generation_config), lm.batch_size_per_gpu, lm.think_end_token
    yield
    lm.model.generation_config, lm.batch_size_per_gpu, lm.think_end_token = kept


def configure(lm: Any, **fields: Any) -> None:
    """As if the model's ``generation_config.json`` had these fields."""
    for name, value in fields.items():
        setattr(lm.model.generation_config, name, value)


def requests(prompts: Sequence[str] = PROMPTS, **kwargs: Any) -> list[Instance]:
    return [
        Instance("generate_until", {}, (prompt, {**GREEDY, **kwargs}), i, task_name="tiny_text", doc_id=i, repeats=1)
        for i, prompt in enumerate(prompts)
    ]


def by_lm_eval(lm: Any, engine: TransformersEngine, asked: list[Instance], zs: Sequence[Any]) -> list[list[str]] | None:
    """lm-eval's own answers under each mixture; None where it fails."""
    found = []
    for z in zs:
        with engine.applied(z):
            try:
                found.append(lm.generate_until(copy.deepcopy(asked), disable_tqdm=True))
            except Exception:  # noqa: BLE001 - whatever it fails with
                return None
    return found


def agree(lm: Any, engine: TransformersEngine, asked: list[Instance]) -> list[list[str]] | None:
    """Compare a search's answers with lm-eval's, or its refusal with lm-eval's failure."""
    zs = [None, random_z(engine, 1)]
    expected = by_lm_eval(lm, engine, asked, zs)
    task = tiny.text_task()
    task._instances = copy.deepcopy(asked)
    if expected is None:
        with pytest.raises(TaskError) as told:
            check_requests(lm, {"tiny_text": task})
        assert "\n" not in str(told.value)
        return None
    check_requests(lm, {"tiny_text": task})
    docs, count = TaskDocs(task, lm), len(asked)
    found = docs.answer(engine, [[request] for request in asked] * 2, zs, [0] * count + [1] * count)
    assert [[text for (text,) in part] for part in (found[:count], found[count:])] == expected
    return expected


def test_every_field_of_a_generation_configuration_has_a_value_here() -> None:
    fields = {name for name in transformers.GenerationConfig().to_dict() if not name.startswith("_")}
    assert fields - {"transformers_version"} == set(VALUES)


@pytest.mark.parametrize("name", VALUES)
def test_a_field_of_the_models_generation_configuration(name: str, lm: Any, engine: TransformersEngine) -> None:
    configure(lm, **{name: VALUES[name]})
    lm.batch_size_per_gpu = 3
    agree(lm, engine, requests())


@pytest.mark.parametrize("name", VALUES)
def test_a_field_among_a_requests_arguments(name: str, lm: Any, engine: TransformersEngine) -> None:
    lm.batch_size_per_gpu = 3
    agree(lm, engine, requests(**{name: VALUES[name]}))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "until",
    [[""], ["", "q"], "e", ["<"], ["<unk>"], ["bc", "abcd"], ["a", "ca"], ["\n\n"], [], [7], None],
    ids=repr,
)
def test_stop_texts(until: Any, batch: int, lm: Any, engine: TransformersEngine) -> None:
    lm.batch_size_per_gpu = batch
    agree(lm, engine, requests(until=until, max_gen_toks=16))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("think", ["b", 40])
@pytest.mark.parametrize("until", [[], ["a", "e"], ["seven"]], ids=repr)
def test_thinking(until: Any, think: Any, batch: int, lm: Any, engine: TransformersEngine) -> None:
    lm.batch_size_per_gpu, lm.think_end_token = batch, think
    agree(lm, engine, requests(until=until, max_gen_toks=16))


@pytest.mark.parametrize("ends", [None, 40, [40, 41, 42, 43, 44], [2, 40, 41]])
def test_tokens_that_end_an_answer(ends: Any, lm: Any, engine: TransformersEngine) -> None:
    configure(lm, eos_token_id=ends)
    for batch in (1, 3):
        lm.batch_size_per_gpu = batch
        agree(lm, engine, requests(max_gen_toks=16))


@pytest.mark.parametrize(
    "given",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 2},
        {"do_sample": True, "temperature": -1.0},
        {"temperature": None},
        {"temperature": "warm"},
        {"repetition_penalty": 0},
        {"num_beams": None},
        {"max_length": 5},
        {"max_length": 40},
        {"max_gen_toks": 512},
        {"max_gen_toks": 0},
        {"input_ids": 3},
        {"no_such_argument": 1},
        {"num_beams": 2, "until": ["e"]},
        {"num_beams": 3, "guidance_scale": 1.2},
        {"temperature": 0.0, "top_k": 0, "num_beams": 1},
    ],
    ids=repr,
)
def test_what_lm_evals_model_refuses_is_refused_before_a_search(
    given: dict[str, Any], lm: Any, engine: TransformersEngine
) -> None:
    kwargs = {name: value for name, value in GREEDY.items() if name != "do_sample"} | given
    lm.batch_size_per_gpu = 3
    asked = requests()
    for request in asked:
        request.arguments = (request.args[0], kwargs)
    agree(lm, engine, asked)


def test_prompts_without_tokens(lm: Any, engine: TransformersEngine) -> None:
    lm.batch_size_per_gpu = 1
    agree(lm, engine, requests(["abc", ""]))
    lm.batch_size_per_gpu = 3
    agree(lm, engine, requests(["abc", ""]))


def test_prompts_of_which_some_begin_with_the_first_token(lm: Any, engine: TransformersEngine) -> None:
    lm.batch_size_per_gpu = 3
    agree(lm, engine, requests(["<s>abc", "abc", "<s>x"]))


def test_common_configurations_stay_in_batches(lm: Any) -> None:
    """Settings of published models run in batches: the list must not be too short."""
    plain: list[Mapping[str, Any]] = [
        {},
        {"max_length": 4096, "temperature": 0.6, "top_p": 0.9, "do_sample": True},
        {"repetition_penalty": 1.05, "top_k": 20, "top_p": 0.8, "temperature": 0.7},
        {"max_new_tokens": 2048, "eos_token_id": [2, 3], "pad_token_id": 3},
        {"cache_implementation": "hybrid", "top_k": 64, "use_cache": False},
        {"chat_format": "chatml", "max_window_size": 6144},
    ]
    for batch in (1, 8):
        lm.batch_size_per_gpu = batch
        for fields in plain:
            kept = copy.deepcopy(lm.model.generation_config)
            configure(lm, **fields)
            assert Generations(lm).same_in_batches(requests()), fields
            lm.model.generation_config = kept
    assert decodes_by_row(lm.model, {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1})
    assert not decodes_by_row(lm.model, {"do_sample": True, "temperature": 0.7, "typical_p": 0.9})


@pytest.mark.parametrize(
    ("fields", "given"),
    [
        ({"max_new_tokens": 4}, {}),
        ({"max_new_tokens": 16}, {}),
        ({"num_beams": 3}, {"until": ["e"]}),
        ({"guidance_scale": 1.5}, {}),
        ({"min_length": 25}, {}),
        ({}, {"until": [""]}),
        ({}, {"max_length": 30}),
    ],
    ids=repr,
)
def test_mixed_batches_answer_as_lm_eval_does(
    fields: dict[str, Any],
    given: dict[str, Any],
    tiny_folder: Path,
    experts: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def plan(self: PromptStrategy, job: Job) -> Plan:
        choices = (Choice(), *(Choice({expert.name: 1.0}, expert.z) for expert in job.experts))
        return Plan(choices, tuple(i % len(choices) for i in range(len(job.prompts))), "in turn")

    monkeypatch.setattr(PromptStrategy, "plan", plan)
    found = []
    for mixed in ("always", "never"):
        args = {"pretrained": str(tiny_folder), "adapt": "prompt", "experts": experts, "mixed": mixed}
        model = T2LM.create_from_arg_obj(args, {"device": "cpu", "batch_size": 3})
        configure(model.inner, **fields)
        task = tiny.text_task(generation_kwargs={**GREEDY, **given})
        found.append(tiny.answers(tiny.evaluate(model, [task]), "tiny_text"))
    assert found[0] == found[1]
