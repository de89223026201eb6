"""Batches give the results of single texts around a model's windows, or are not used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers

from t2.adapters.engine.base import GenerateRequest, ScoreRequest
from t2.adapters.engine.batch_proofs import GenerationProofs, Lengths, Proofs, integers
from t2.adapters.engine.decoding import Decoder
from t2.adapters.engine.likelihood import Branches, LikelihoodModel
from t2.adapters.engine.transformers import TransformersEngine
from tests.adapters.conftest import make_tokenizer, random_z

WINDOW = 12
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}
DECODER: dict[str, Any] = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 16,
}
HEADS = {"num_attention_heads": 4, "head_dim": 8, "mamba_d_state": 4}
# Layouts of texts below and above the window, and whether prompts of different lengths share a batch.
MODELS: dict[str, tuple[Any, dict[str, Any], str, str, bool]] = {
    "llama": (transformers.LlamaConfig, {**SIZES, "max_position_embeddings": 512}, "packed", "packed", True),
    "window in a buffer": (
        transformers.GPTNeoConfig,
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
            "max_position_embeddings": 64,
        },
        "padded",
        "padded",
        True,
    ),
    "sliding window": (transformers.MistralConfig, {**SIZES, "sliding_window": WINDOW}, "packed", "padded", True),
    "full and sliding layers": (
        transformers.Gemma3TextConfig,
        {**SIZES, "sliding_window": WINDOW, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "packed",
        "padded",
        True,
    ),
    "learned positions with an offset": (
        transformers.OPTConfig,
        {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "word_embed_proj_dim": 32},
        "packed",
        "packed",
        True,
    ),
    "positions that follow the place in the row": (transformers.BartConfig, DECODER, "padded", "padded", False),
    "ALiBi": (
        transformers.BloomConfig,
        {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        "padded",
        "padded",
        True,
    ),
    "one key for all heads": (
        transformers.GPTBigCodeConfig,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "multi_query": True},
        "packed",
        "packed",
        True,
    ),
    "recurrent": (
        transformers.RwkvConfig,
        {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48},
        "padded",
        "padded",
        False,
    ),
    "convolutions": (
        transformers.Lfm2Config,
        {**SIZES, "layer_types": ["conv", "full_attention"]},
        "padded",
        "padded",
        True,
    ),
    "linear attention": (
        transformers.MiniMaxConfig,
        {**SIZES, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 16},
        "padded",
        "padded",
        True,
    ),
}


def build(name: str) -> transformers.PreTrainedModel:
    kind, sizes, *_ = MODELS[name]
    torch.manual_seed(0)
    config = kind(vocab_size=len(make_tokenizer()), pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


def draw(*lengths: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [tuple(torch.randint(5, 100, (length,), generator=generator).tolist()) for length in lengths]


def work(longest: int) -> list[Branches]:
    """Requests whose longest has this many tokens in total, and short ones."""
    one, two, three, four, five, six = draw(longest - 5, 5, 3, 2, 1, longest // 2)
    return [Branches(one, (two, three, five)), Branches(three, (four, five)), Branches(six, (two,))]


def alone(model: Any, items: Sequence[Branches]) -> torch.Tensor:
    """Logits of every continuation, computed from single texts as in lm-eval."""
    found = []
    for item in items:
        for continuation in item.continuations:
            logits = model(torch.tensor([[*item.context, *continuation[:-1]]])).logits[0]
            found.append(logits[len(item.context) - 1 :])
    return torch.cat(found)


@pytest.mark.parametrize("name", MODELS)
def test_likelihoods_are_those_of_single_texts_below_and_above_a_window(name: str) -> None:
    model = build(name)
    layouts = []
    for longest in (10, 40):
        runner, items = LikelihoodModel(model), work(longest)
        with torch.no_grad():
            layouts.append(runner.layout(items))
            torch.testing.assert_close(runner.run(items).logits, alone(model, items), atol=2e-4, rtol=1e-3)
    assert tuple(layouts) == MODELS[name][2:4]


@pytest.mark.parametrize("name", MODELS)
def test_generated_tokens_are_those_of_single_prompts_or_no_batch_is_made(name: str) -> None:
    model = build(name)
    decoder = Decoder(model, make_tokenizer())
    proofs = GenerationProofs(decoder)
    for lengths in ((4, 2, 3), (9, 3, 5), (30, 2, 14)):
        requests = [GenerateRequest(prompt, 8, (), {"do_sample": False}) for prompt in draw(*lengths)]
        singly = [decoder.run([request], [0])[0] for request in requests]
        assert proofs.hold(lengths, 8) == MODELS[name][4]
        assert (decoder.run(requests, [0] * 3) == singly) == MODELS[name][4]
        equal = [GenerateRequest(prompt, 8, (), {"do_sample": False}) for prompt in draw(*[max(lengths)] * 3)]
        singly = [decoder.run([request], [0])[0] for request in equal]
        assert proofs.hold([max(lengths)] * 3, 8) == (decoder.run(equal, [0] * 3) == singly)


@pytest.mark.parametrize("name", ["window in a buffer", "positions that follow the place in the row", "ALiBi"])
@pytest.mark.parametrize("form", ["activation", "weight"])
def test_an_engine_answers_as_one_request_at_a_time(name: str, form: Any) -> None:
    engine = TransformersEngine(build(name), make_tokenizer(), name)
    engine.form = form
    mixtures = [random_z(engine, 1), None]
    contexts, rows = draw(40, 3, 17, 40, 9, 25), [0, 1, 0, 1, 1, 0]
    begun = [(*draw(20)[0], *context[:20]) for context in contexts]
    scores = [ScoreRequest(context, choice) for context in begun for choice in draw(1, 3, 4)]
    generates = [GenerateRequest(context, 8, (), {"do_sample": False}) for context in contexts]
    generated = engine.generate(generates, mixtures, rows)
    scored = engine.score(scores, mixtures, [row for row in rows for _ in range(3)])
    for z, row in ((z, row) for row, z in enumerate(mixtures)):
        with engine.applied(z), torch.no_grad():
            for i in (i for i, own in enumerate(rows) if own == row):
                model: Any = engine.model
                out = model.generate(torch.tensor([contexts[i]]), max_new_tokens=8, do_sample=False, pad_token_id=0)
                assert generated[i].tokens == tuple(out[0, len(contexts[i]) :].tolist())
                for request, found in zip(scores[3 * i : 3 * i + 3], scored[3 * i : 3 * i + 3], strict=True):
                    logits = alone(engine.model, [Branches(request.context, (request.continuation,))])
                    values = logits.log_softmax(-1)[range(len(logits)), list(request.continuation)]
                    assert found.loglikelihood == pytest.approx(float(values.sum()), abs=1e-3)


@pytest.mark.parametrize("name", ["llama", "window in a buffer", "sliding window", "full and sliding layers"])
@pytest.mark.parametrize("longest", [10, 40])
def test_gradients_are_those_of_single_texts(name: str, longest: int) -> None:
    engine, items = TransformersEngine(build(name), make_tokenizer(), name), work(longest)
    z = {matrix: vector.requires_grad_() for matrix, vector in random_z(engine, 1).items()}
    targets = torch.tensor([token for item in items for choice in item.continuations for token in choice])

    def gradient(together: bool) -> tuple[torch.Tensor, ...]:
        with engine.trained(z):
            logits = engine.likelihood.run(items).logits if together else alone(engine.model, items)
            return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets), list(z.values()))

    for ours, theirs in zip(gradient(True), gradient(False), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_texts_are_not_packed_with_others_whose_length_changes_their_rope(kind: str) -> None:
    sizes = {**SIZES, "vocab_size": len(make_tokenizer()), "pad_token_id": 0, "initializer_range": 0.3}
    config: Any = transformers.LlamaConfig(**{**sizes, "max_position_embeddings": 16}, rope_parameters=DYNAMIC)
    if kind == "longrope":
        config = transformers.Phi3Config(**sizes, original_max_position_embeddings=16, rope_parameters=LONG)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    runner, items = LikelihoodModel(model), work(40)
    with torch.no_grad():
        expected = alone(model, items)
        torch.testing.assert_close(runner.run(items).logits, expected, atol=2e-4, rtol=1e-3)
        assert runner.layout(items) == "alone"


def test_every_integer_of_a_configuration_counts() -> None:
    config = {"a": 3, "parts": [{"window": 7.0, "names": ["x"]}, (5, True)], "rate": 0.5, "far": float("inf")}
    assert sorted(integers(config)) == [("a", 3), ("parts", 5), ("window", 7)]


def test_a_probe_is_as_long_as_the_texts_and_crosses_no_length_that_they_do_not() -> None:
    lengths = Lengths(build("window in a buffer"))
    assert WINDOW in lengths.windows
    assert [lengths.probe(n) for n in (10, 12, 13, 17, 64)] == [12, 12, 16, 32, 64]


def test_what_is_proven_holds_for_shorter_texts_and_is_not_proven_again() -> None:
    asked: list[tuple[int, ...]] = []

    def probe(text: int, row: int) -> bool:
        asked.append((text, row))
        if row > 100:
            raise IndexError("too many tokens")
        return True

    proofs = Proofs("anything", probe)
    assert [proofs.hold(*pair) for pair in ((8, 64), (8, 32), (16, 32), (8, 128), (8, 256))] == [True] * 3 + [False] * 2
    assert asked == [(8, 64), (16, 32), (8, 128)]
