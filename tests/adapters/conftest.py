"""Tiny random models over a small tokenizer, and experts for them."""

from __future__ import annotations

import string
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Expert, Z
from t2.core.manifest import Manifest
from tests.adapters import families

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
    """A random model of a family, over the tokenizer above; see :mod:`tests.adapters.families`."""
    return families.make_model(architecture, len(make_tokenizer()), seed, layers, dtype)


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
