"""Models that are more than a text model, and mixtures of experts of other makes: what of them is adapted."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from t2.adapters.targets import find_targets
from t2.core.errors import ModelError
from tests.adapters.families import SIZES

LAYERS: dict[str, Any] = {**SIZES, "num_hidden_layers": 2, "vocab_size": 60, "pad_token_id": 0}
EYES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
OPT: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
}
CONFIGS: Any = transformers


def seeing(name: str) -> tuple[Any, Any]:
    """The configuration of a model that sees, and that of its text model."""
    match name:
        case "gemma3":
            text = CONFIGS.Gemma3TextConfig(**LAYERS, head_dim=8)
            eyes = CONFIGS.SiglipVisionConfig(**EYES)
            return CONFIGS.Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4), text
        case "qwen2_5_vl":
            rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
            eyes = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
            config = CONFIGS.Qwen2_5_VLConfig(text_config={**LAYERS, "rope_parameters": rope}, vision_config=eyes)
            return config, CONFIGS.Qwen2Config(**LAYERS)
        case "idefics3":
            text = CONFIGS.LlamaConfig(**LAYERS)
            return CONFIGS.Idefics3Config(text_config=text, vision_config=EYES), text
        case _:
            text = CONFIGS.OPTConfig(**OPT)
            between = {**EYES, "encoder_hidden_size": 16}
            config = CONFIGS.Blip2Config(text_config=text.to_dict(), vision_config=EYES, qformer_config=between)
            return config, text


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "idefics3", "blip2"])
def test_a_language_half_has_the_matrices_of_its_text_model(name: str) -> None:
    whole, text = seeing(name)
    seen = find_targets(transformers.AutoModelForImageTextToText.from_config(whole))
    alone = find_targets(transformers.AutoModelForCausalLM.from_config(text))
    assert {n: target.shape for n, target in seen.items()} == {n: target.shape for n, target in alone.items()}


CHOOSING: dict[str, dict[str, Any]] = {
    "GptOssConfig": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "OlmoeConfig": {"num_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoeSharedConfig": {"num_local_experts": 4, "shared_intermediate_size": 40},
    "Llama4TextConfig": {"num_local_experts": 4, "intermediate_size_mlp": 48, "head_dim": 8},
    "JetMoeConfig": {"num_local_experts": 4, "kv_channels": 8},
    "Qwen3NextConfig": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "head_dim": 8,
    },
}


@pytest.mark.parametrize("name", CHOOSING)
def test_no_router_and_no_routed_expert_is_adapted(name: str) -> None:
    sizes = {key: value for key, value in LAYERS.items() if (name, key) != ("JetMoeConfig", "num_attention_heads")}
    config = getattr(CONFIGS, name)(**{**sizes, **CHOOSING[name], "eos_token_id": 2})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=r"has mixture-of-experts layers .* moe=skip adapts the rest of it"):
        find_targets(model)
    # Whatever holds one row or one matrix per expert.
    count = 4
    found = find_targets(model, moe="skip")
    assert found
    assert all(target.parameter.dim() == 2 and count not in target.shape for target in found.values())
    assert not [n for n in found if any(word in n for word in ("router", ".gate.", ".experts."))]
