"""Models of random weights for benchmarks in which only shapes matter, and experts for them."""

from __future__ import annotations

import tokenizers
import torch
import transformers

from t2.adapters.basis import Basis
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z
from t2.core.seeds import generator


def random_model(
    device: str, dtype: torch.dtype, layers: int | None = None, seed: int = 0
) -> transformers.PreTrainedModel:
    """A Llama: on a CPU with the layers of SmolLM2-135M, on a GPU with those of an 8B model, fewer of them."""
    small = not device.startswith("cuda")
    config = transformers.LlamaConfig(
        hidden_size=576 if small else 4096,
        intermediate_size=1536 if small else 14336,
        num_attention_heads=9 if small else 32,
        num_key_value_heads=3 if small else 8,
        num_hidden_layers=layers or (10 if small else 4),
        vocab_size=16384,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def engine_of(model: transformers.PreTrainedModel) -> TransformersEngine:
    """An engine whose bases are random orthogonal matrices: as good as the true ones where only time is asked for."""
    engine = TransformersEngine(model, _tokenizer(), "random")
    made: dict[int, torch.Tensor] = {}
    for name, target in engine.targets.items():
        m, n = target.shape
        if target.rank not in made:
            made[target.rank] = torch.linalg.qr(torch.randn(target.rank, target.rank, device=model.device))[0]
        q = made[target.rank]
        engine.forms.preload({name: Basis("out" if m <= n else "in", q, torch.ones(target.rank))})
    return engine


def random_experts(engine: TransformersEngine, count: int, seed: int) -> list[Z]:
    """Experts with z = 1 + 0.1·N(0, 1) for all matrices."""
    experts: list[Z] = []
    for k in range(count):
        rng = generator(seed, "speed", k)
        experts.append(
            {name: torch.from_numpy(1 + 0.1 * rng.standard_normal(r)).float() for name, r in engine.ranks().items()}
        )
    return experts


def _tokenizer() -> transformers.PreTrainedTokenizerBase:
    """One that an engine can be made with; nothing is read by it."""
    model = tokenizers.models.WordLevel({"x": 0, "</s>": 1}, unk_token="x")
    inner = tokenizers.Tokenizer(model)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="x")
