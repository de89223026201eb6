"""The families of models that t2 knows, as tiny random ones: every linear layer with a bias, weights that matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

HIDDEN, INNER, KEYS = 32, 48, 16
Shapes = Mapping[str, tuple[int, int]]
ROTARY: Shapes = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
}
GATED: Shapes = {
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
SHARED: Shapes = {
    "mlp.shared_expert.gate_proj": (40, HIDDEN),
    "mlp.shared_expert.up_proj": (40, HIDDEN),
    "mlp.shared_expert.down_proj": (HIDDEN, 40),
}
FUSED: dict[str, Shapes] = {
    "attn": {"self_attn.o_proj": (HIDDEN, HIDDEN), "self_attn.qkv_proj": (HIDDEN + 2 * KEYS, HIDDEN)},
    "mlp": {"mlp.gate_up_proj": (2 * INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)},
}
GPT2: dict[str, Shapes] = {
    "attn": {"attn.c_attn": (3 * HIDDEN, HIDDEN), "attn.c_proj": (HIDDEN, HIDDEN)},
    "mlp": {"mlp.c_fc": (4 * HIDDEN, HIDDEN), "mlp.c_proj": (HIDDEN, 4 * HIDDEN)},
}
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
WINDOW: dict[str, Any] = {**SIZES, "sliding_window": 6}
CHOOSING: dict[str, Any] = {
    **SIZES,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}


@dataclass(frozen=True)
class Family:
    """What a test must know of a family.

    Attributes:
        config: of its configuration, called with the sizes below and what all share.
        sizes: arguments of it.
        prefix: of its layers.
        attn: its attention matrices in a layer, with their shapes (out, in).
        mlp: those of its feed-forward part.
        moe: layers hold routed experts.
        packs: contexts longer than a window may be packed into one row, since the model obeys the mask it is given.
        depth: the argument that holds the number of layers.
    """

    config: Callable[..., transformers.PretrainedConfig]
    sizes: dict[str, Any]
    prefix: str = "model.layers"
    attn: Shapes = field(default_factory=lambda: ROTARY)
    mlp: Shapes = field(default_factory=lambda: GATED)
    moe: bool = False
    packs: bool = True
    depth: str = "num_hidden_layers"


FAMILIES: dict[str, Family] = {
    "llama": Family(transformers.LlamaConfig, {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "mistral": Family(transformers.MistralConfig, WINDOW, packs=False),
    "qwen2": Family(transformers.Qwen2Config, SIZES),
    "qwen3": Family(transformers.Qwen3Config, {**SIZES, "head_dim": 8}),
    # Its embeddings are scaled up: were they its output matrix too, it would answer with the last token of the prompt.
    "gemma3": Family(
        transformers.Gemma3TextConfig, {**WINDOW, "head_dim": 8, "tie_word_embeddings": False}, packs=False
    ),
    "phi3": Family(transformers.Phi3Config, WINDOW, attn=FUSED["attn"], mlp=FUSED["mlp"], packs=False),
    "gpt2": Family(
        transformers.GPT2Config,
        {"n_embd": HIDDEN, "n_head": 4, "n_positions": 256},
        prefix="transformer.h",
        attn=GPT2["attn"],
        mlp=GPT2["mlp"],
        depth="n_layer",
    ),
    "mixtral": Family(transformers.MixtralConfig, {**SIZES, "num_local_experts": 4}, mlp={}, moe=True),
    "qwen2_moe": Family(transformers.Qwen2MoeConfig, CHOOSING, mlp=SHARED, moe=True),
    "qwen3_moe": Family(transformers.Qwen3MoeConfig, {**CHOOSING, "head_dim": 8}, mlp={}, moe=True),
}


def matrices(family: Family, kinds: tuple[str, ...], layers: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """The names and shapes of a family's matrices of some kinds in some layers."""
    shapes = {"attn": family.attn, "mlp": family.mlp}
    return {
        f"{family.prefix}.{layer}.{name}.weight": shape
        for layer in layers
        for kind in kinds
        for name, shape in shapes[kind].items()
    }


def make_model(
    family: str, vocabulary: int, seed: int = 0, layers: int = 2, dtype: torch.dtype = torch.float32, **sizes: Any
) -> transformers.PreTrainedModel:
    """A random model whose weights and biases are large enough to matter, and of values that bfloat16 has.

    Linear layers that have no bias in their family get one, since hooks must keep it out of what they scale.
    """
    torch.manual_seed(seed)
    known = FAMILIES[family]
    config = known.config(
        **{**known.sizes, known.depth: layers, **sizes},
        vocab_size=vocabulary,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for module in model.modules():
        if (
            isinstance(module, nn.Linear)
            and getattr(module, "bias", None) is None
            and module is not model.get_output_embeddings()
        ):
            module.bias = nn.Parameter(torch.zeros(module.out_features))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
            parameter.copy_(parameter.bfloat16())
    cast: transformers.PreTrainedModel = nn.Module.to(model, dtype)
    return cast
