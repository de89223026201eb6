"""Tiny random models of three architectures with biases that matter, over a small tokenizer, and experts for them."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from torch import nn

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Expert, Z
from t2.core.manifest import Manifest

WORDS = ["the", "stop", "ab"]
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
ARCHITECTURES = ["llama", "qwen2", "gpt2"]


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per printable character and per word of :data:`WORDS`; decoding joins them as they are."""
    vocabulary = [*SPECIAL.values(), *string.printable, *WORDS]
    model = tokenizers.models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex("|".join([*WORDS, r"[\s\S]"])), behavior="isolated"
    )
    inner.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **SPECIAL)


def make_model(
    architecture: str, seed: int = 0, layers: int = 2, dtype: torch.dtype = torch.float32
) -> transformers.PreTrainedModel:
    """A random model whose weights and biases are large enough to matter, and of values that bfloat16 has."""
    torch.manual_seed(seed)
    size = len(make_tokenizer())
    common: dict[str, Any] = {
        "vocab_size": size,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    rotary: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    config: transformers.PretrainedConfig
    match architecture:
        case "llama":
            config = transformers.LlamaConfig(**common, **rotary, attention_bias=True, mlp_bias=True)
        case "qwen2":
            config = transformers.Qwen2Config(**common, **rotary)
        case _:
            config = transformers.GPT2Config(**common, n_embd=32, n_layer=layers, n_head=4, n_positions=256)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
            parameter.copy_(parameter.bfloat16())
    cast: transformers.PreTrainedModel = nn.Module.to(model, dtype)
    return cast


def random_z(engine: TransformersEngine, seed: int, scale: float = 0.4) -> Z:
    """z = 1 + scale·N(0, 1) for every adaptable matrix."""
    rng = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(1 + scale * rng.standard_normal(rank)).float() for name, rank in engine.ranks().items()
    }


def expert_of(engine: TransformersEngine, name: str, z: Z, domain: str | None = None) -> Expert:
    """An expert in memory; its digest stands for its file's."""
    targets = {matrix: len(vector) for matrix, vector in z.items()}
    return Expert(Manifest(name=name, base=engine.base, targets=targets, domain=domain), z, f"digest of {name}")


@pytest.fixture(scope="session", params=ARCHITECTURES)
def engine(request: pytest.FixtureRequest) -> TransformersEngine:
    """An engine over a tiny model, one per architecture."""
    return TransformersEngine(make_model(request.param), make_tokenizer(), f"tiny-{request.param}", batch_size=8)


@pytest.fixture(scope="session")
def llama() -> TransformersEngine:
    """An engine over the tiny llama, where the architecture does not matter."""
    return TransformersEngine(make_model("llama"), make_tokenizer(), "tiny-llama")


@pytest.fixture
def bases_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of bases."""
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"
