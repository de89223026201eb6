"""Unusual decoder layers: all linear layers are adapted, other weights are reported."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.targets import choose, find_targets, left_out
from t2.core.errors import ArgumentError, ModelError
from tests.adapters.checks import dense_weights, logits, weights
from tests.adapters.conftest import make_model, make_tokenizer, random_z
from tests.adapters.families import FAMILIES

CONFIGS: Any = transformers
WORDS = len(make_tokenizer())
BASE: dict[str, Any] = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SPEECH: dict[str, Any] = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
STATE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}
GATES = {"conv_1d", "rg_lru.input_gate_weight", "rg_lru.input_gate_bias", "rg_lru.recurrent_gate_weight"}
CROSS = {f"encoder_attn.{name}_proj" for name in ("q", "k", "v", "out")}
RECURRENT = {f"temporal_block.{name}" for name in (*GATES, "rg_lru.recurrent_gate_bias")}

MODELS: dict[str, tuple[Any, dict[str, Any], dict[str, set[str]], set[str]]] = {
    # The configuration, its sizes, the linear layers of each set in a layer, and the weights that are left out.
    "opt": (
        CONFIGS.OPTConfig,
        {**WIDE, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        {"attn": {f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")}, "mlp": {"fc1", "fc2"}},
        set(),
    ),
    "xglm": (
        CONFIGS.XGLMConfig,
        {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 64},
        {"attn": {f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")}, "mlp": {"fc1", "fc2"}},
        set(),
    ),
    "biogpt": (
        CONFIGS.BioGptConfig,
        {**WIDE, "max_position_embeddings": 64},
        {"attn": {f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")}, "mlp": {"fc1", "fc2"}},
        set(),
    ),
    "bart": (
        CONFIGS.BartConfig,
        {**SPEECH, "max_position_embeddings": 64, "is_decoder": True},
        {"attn": {f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")}, "mlp": {"fc1", "fc2"}},
        CROSS,
    ),
    "bert": (
        CONFIGS.BertConfig,
        {**WIDE, "is_decoder": True},
        {
            "attn": {*(f"attention.self.{n}" for n in ("query", "key", "value")), "attention.output.dense"},
            "mlp": {"intermediate.dense", "output.dense"},
        },
        set(),
    ),
    "ctrl": (
        CONFIGS.CTRLConfig,
        {"n_positions": 64, "n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4},
        {
            "attn": {f"multi_head_attention.{n}" for n in ("Wq", "Wk", "Wv", "dense")},
            "mlp": {"ffn.0", "ffn.2"},
        },
        set(),
    ),
    "recurrent_gemma": (
        CONFIGS.RecurrentGemmaConfig,
        {**WIDE, "lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
        {
            "mlp": {f"mlp_block.{n}_proj" for n in ("gate", "up", "down")},
            "attn": {f"temporal_block.{n}_proj" for n in ("q", "k", "v", "o")},
            "other": {f"temporal_block.linear_{n}" for n in ("x", "y", "out")},
        },
        RECURRENT,
    ),
    "mamba": (
        CONFIGS.MambaConfig,
        STATE,
        {"other": {f"mixer.{n}_proj" for n in ("in", "x", "out")}},
        {"mixer.A_log", "mixer.conv1d", "mixer.dt_proj"},
    ),
    "rwkv": (
        CONFIGS.RwkvConfig,
        {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 48},
        {
            "attn": {f"attention.{n}" for n in ("key", "value", "receptance", "output")},
            "mlp": {f"feed_forward.{n}" for n in ("key", "value", "receptance")},
        },
        set(),
    ),
}


def make(name: str) -> Any:
    """A random model with large weights that bfloat16 represents exactly."""
    config, sizes, _, _ = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**{**BASE, **sizes})).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                module.weight.normal_(0, 0.2)
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def place(name: str) -> str:
    """Path of a matrix in its layer."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[next(i for i, part in enumerate(parts) if part.isdigit()) + 1 :])


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_of_a_decoder_layer_is_adapted_or_named_as_left_out(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, (_, _, sets, absent) = make(name), MODELS[name]
    found = find_targets(model)
    by_kind: dict[str, set[str]] = {}
    for target in found.values():
        by_kind.setdefault(target.kind, set()).add(place(target.name))
    assert by_kind == sets
    assert set(left_out(model, found)) == absent
    for kind in ("mlp", "attn"):
        if kind in sets:
            assert {place(n) for n in choose(found, kind)} == sets[kind]
        else:
            with pytest.raises(ArgumentError, match=f"targets={kind}: the model has no such matrices, only other;"):
                choose(found, kind)
    with caplog.at_level(logging.WARNING):
        TransformersEngine(model, make_tokenizer(), "tiny")
    lines = [record.getMessage() for record in caplog.records if "not adapted" in record.getMessage()]
    assert len(lines) == bool(absent)
    assert all(f"× {one}" in lines[0] for one in absent)


@pytest.mark.parametrize("name", MODELS)
def test_both_forms_of_a_family_are_the_scaled_decomposition(name: str) -> None:
    engine = TransformersEngine(make(name), make_tokenizer(), "tiny")
    z, tokens = random_z(engine, 1, 0.2), tuple(make_tokenizer().encode("the stop 12", add_special_tokens=False))
    dense = torch.func.functional_call(engine.model, dense_weights(engine, z), (torch.tensor([tokens]),)).logits[0]
    before, base = weights(engine), logits(engine, tokens)
    assert not torch.allclose(base, dense, atol=1e-3)
    scale = 1e-3 * max(1.0, float(dense.abs().max()))
    with engine.applied(z):
        assert torch.allclose(logits(engine, tokens), dense, atol=scale)
    for name_ in z:
        with engine.applied({name_: z[name_]}):
            alone = logits(engine, tokens)
        with engine.activation([{name_: z[name_]}]):
            assert torch.allclose(logits(engine, tokens), alone, atol=scale), name_
    with engine.trained(z):
        assert torch.allclose(logits(engine, tokens), dense, atol=scale)
    assert weights(engine) == before
    assert torch.equal(logits(engine, tokens), base)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_left_out_of_families_without_experts(name: str) -> None:
    model = make_model(name)
    rest = left_out(model, find_targets(model, moe="skip"))
    assert bool(rest) == FAMILIES[name].moe
    assert all(any(word in one for word in ("experts", "gate")) for one in rest)


def test_a_set_that_a_mixture_of_experts_lacks_is_an_error() -> None:
    found = find_targets(make_model("mixtral"), moe="skip")
    with pytest.raises(ArgumentError) as caught:
        choose(found, "mlp", [1])
    assert str(caught.value) == (
        "targets=mlp: the model has no such matrices in layers 1, only attn; use targets=all or other layers"
    )


def test_tensors_of_three_dimensions_are_experts_only_where_something_says_so() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gates = nn.Parameter(torch.ones(3, 4, 4))

    class StackedExperts(Stacked):
        pass

    for holder, config, refused in (
        (Stacked(), {}, False),
        (Stacked(), {"num_local_experts": 3}, True),
        (Stacked(), {"n_routed_experts": 5}, False),
        (StackedExperts(), {}, True),
    ):
        model: Any = make_model("llama")
        for key, value in config.items():
            setattr(model.config, key, value)
        model.model.layers[1].mlp.side = holder
        if refused:
            with pytest.raises(ModelError, match=r"has mixture-of-experts layers \(model.layers.1.mlp.side\)"):
                find_targets(model)
        else:
            assert left_out(model, find_targets(model)) == {"mlp.side.gates": 1}
