"""Answers are those of ``transformers``' own generation, whatever else is in the batch, and rows that end leave it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from t2.adapters.engine.base import GenerateRequest
from t2.adapters.engine.transformers import TransformersEngine
from tests.adapters.conftest import make_model, make_tokenizer, random_z
from tests.adapters.families import FAMILIES

PROMPTS = ["the cat", "a", "1 + 2 =", "stop the ab", "Zebra? no", "0123456789", "q"]
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.2, "top_p": 0.95}


def requests(count: int = 7, most: int = 12, stop: tuple[str, ...] = (), **kwargs: Any) -> list[GenerateRequest]:
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    tokens = [tuple(make_tokenizer().encode(prompt, add_special_tokens=False)) for prompt in prompts]
    return [GenerateRequest(context, most, stop, kwargs) for context in tokens]


def by_transformers(asked: list[GenerateRequest]) -> list[GenerateRequest]:
    """The same requests with an argument that changes nothing but who decodes."""
    return [replace(request, kwargs={**request.kwargs, "disable_compile": True}) for request in asked]


def text(tokens: tuple[int, ...]) -> str:
    return str(make_tokenizer().decode(list(tokens)))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_transformers(family: str) -> None:
    engine = TransformersEngine(make_model(family), make_tokenizer(), family, moe="skip")
    mixtures, rows = [random_z(engine, 1), None, random_z(engine, 2)], [i % 3 for i in range(7)]
    whole = engine.generate(by_transformers(requests()), mixtures, rows)
    assert engine.generate(requests(), mixtures, rows) == whole
    # Stop texts that some of the answers contain, at different places.
    stop = tuple(text(answer.tokens)[at : at + 2] for answer, at in zip(whole, (1, 4, 7), strict=False))
    stopped = engine.generate(requests(stop=stop), mixtures, rows)
    assert stopped == engine.generate(by_transformers(requests(stop=stop)), mixtures, rows)
    assert len({len(answer.tokens) for answer in stopped}) > 2
    penalised = engine.generate(requests(repetition_penalty=1.8, stop=stop), mixtures, rows)
    assert penalised == engine.generate(by_transformers(requests(repetition_penalty=1.8, stop=stop)), mixtures, rows)
    assert penalised != stopped


@pytest.mark.parametrize("kwargs", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_answers_do_not_depend_on_the_size_of_a_batch(llama: TransformersEngine, kwargs: dict[str, Any]) -> None:
    asked = requests(20, 12, ("a", "9"), **kwargs)
    mixtures, rows = [None, random_z(llama, 1), random_z(llama, 2)], [i % 3 for i in range(20)]
    model, found = llama.model, []
    for size in (1, 3, 8, 64):
        other = TransformersEngine(model, make_tokenizer(), llama.base.id, batch_size=size)
        found.append(other.generate(asked, mixtures, rows, seed=5))
    assert all(answers == found[0] for answers in found)
    assert len({len(answer.tokens) for answer in found[0]}) > 3


def test_a_row_that_ends_leaves_the_batch(llama: TransformersEngine) -> None:
    asked = requests(7, 20, ("a", "9", "t"), **SAMPLED)
    assert llama.pads(asked)
    seen: list[int] = []
    layer = llama.targets["model.layers.1.mlp.down_proj.weight"].module
    handle = layer.register_forward_hook(lambda _, args, out: seen.append(int(args[0].shape[0])))
    try:
        answers = llama.generate(asked, [random_z(llama, 1), None], [i % 2 for i in range(7)])
    finally:
        handle.remove()
    lengths = [len(answer.tokens) for answer in answers]
    assert seen == [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert len(set(seen)) > 2


def test_samples_follow_the_models_probabilities(llama: TransformersEngine) -> None:
    first = requests(1)[0].context
    with torch.no_grad():
        out = llama.model(torch.tensor([first])).logits[0, -1]
    wanted, likeliest = out.div(0.7).topk(3)
    wanted = wanted.softmax(dim=-1)
    asked = [GenerateRequest(first, 1, (), {"do_sample": True, "temperature": 0.7, "top_k": 3})] * 600
    counts = Counter(answer.tokens[0] for answer in llama.generate(asked, seed=3))
    assert set(counts) <= set(likeliest.tolist())
    for token, share in zip(likeliest.tolist(), wanted.tolist(), strict=True):
        # Four standard errors.
        assert abs(counts[token] / 600 - share) < 4 * (share * (1 - share) / 600) ** 0.5 + 1e-3


def test_a_request_may_bring_its_own_seed(llama: TransformersEngine) -> None:
    asked = [replace(request, seed=i) for i, request in enumerate(requests(7, 10, **SAMPLED))]
    answers = llama.generate(asked, seed=1)
    assert llama.generate(asked[::-1], seed=2) == answers[::-1]
    assert llama.generate([asked[4]]) == [answers[4]]
    assert llama.generate([replace(asked[4], seed=99)]) != [answers[4]]


def test_rows_stay_where_a_cache_knows_no_rows() -> None:
    config = transformers.Lfm2Config(
        vocab_size=len(make_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    engine = TransformersEngine(model, make_tokenizer(), "hybrid")
    whole = engine.generate(requests())
    stop = (text(whole[0].tokens)[2:4], text(whole[3].tokens)[5:7])
    stopped = engine.generate(requests(stop=stop), [random_z(engine, 1), None], [1, 0] * 3 + [1])
    assert stopped == engine.generate(
        by_transformers(requests(stop=stop)), [random_z(engine, 1), None], [1, 0] * 3 + [1]
    )
    assert len(stopped[0].tokens) < len(whole[0].tokens)
