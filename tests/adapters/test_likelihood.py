"""Packed rows give what one row per continuation gives, for values and for gradients."""

from typing import Any

import pytest
import torch
import transformers

from t2.adapters.engine.likelihood import Branches, LikelihoodModel

BATCH = [
    Branches((1, 2, 3, 4, 5), ((6, 7), (8,), (9, 10, 11))),
    Branches((12,), ((13,), (14, 15))),
    Branches(tuple(range(16, 40)), ((3, 3, 3, 3),)),
]


def model_of(kind):
    torch.manual_seed(0)
    config: Any
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    if kind == "llama":
        config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes)
    elif kind == "qwen2":
        config = transformers.Qwen2Config(vocab_size=50, num_key_value_heads=2, **sizes)
    else:
        config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_give_the_likelihoods_of_single_rows(kind, attention):
    model = model_of(kind)
    model.set_attn_implementation(attention)
    shared, single = LikelihoodModel(model), LikelihoodModel(model, share=False)
    assert shared.layout(BATCH) == "packed"
    assert single.layout(BATCH) == "padded"
    packed, rows = shared.run(BATCH), single.run(BATCH)
    assert packed.lengths == [2, 1, 3, 1, 2, 4]
    torch.testing.assert_close(packed.logits, rows.logits, atol=2e-5, rtol=1e-4)
    expected = []
    for item in BATCH:
        for continuation in item.continuations:
            ids = torch.tensor([[*item.context, *continuation]])
            logprobs = model(ids).logits[0].log_softmax(-1)
            expected.append(sum(logprobs[len(item.context) + i - 1, t] for i, t in enumerate(continuation)))
    torch.testing.assert_close(packed.loglikelihoods(), torch.stack(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prefix_that_was_computed_before_gives_the_same_likelihoods(kind, attention):
    model = model_of(kind)
    model.set_attn_implementation(attention)
    runner, begin = LikelihoodModel(model), (9, 8, 7, 6)
    whole = [Branches((*begin, *item.context), item.continuations) for item in BATCH]
    assert runner.reuses(whole, len(begin))
    rows = runner.rows(BATCH, [0, 1, 1], len(begin))
    with torch.no_grad():
        reused = runner.run(BATCH, rows, runner.prefix(begin, 2), [0, 1])
        plain = runner.run(whole)
    torch.testing.assert_close(reused.loglikelihoods(), plain.loglikelihoods(), atol=1e-4, rtol=1e-4)


def test_a_model_that_keeps_only_a_window_shares_no_prefix():
    config: Any = transformers.MistralConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        sliding_window=4,
    )
    torch.manual_seed(0)
    runner = LikelihoodModel(transformers.AutoModelForCausalLM.from_config(config).eval())
    assert not runner.reuses(BATCH, 1)


def test_temperature_divides_the_logits():
    spans = LikelihoodModel(model_of("llama")).run(BATCH)
    token = spans.tokens[3]
    torch.testing.assert_close(
        spans.token_logprobs(0.5)[3], torch.log_softmax(spans.logits[3] / 0.5, -1)[token], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("share", [True, False])
def test_passes_hold_all_work_once_within_their_size(share):
    runner = LikelihoodModel(model_of("llama"), share=share)
    units = [[item] for item in BATCH * 5]
    cut = runner.batches(units, 60)
    assert sorted(i for batch in cut for i in batch) == list(range(15))
    assert len(cut) > 1
    if share:
        assert all(sum(units[i][0].inputs for i in batch) <= 60 for batch in cut)
