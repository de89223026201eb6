"""A model with an adapter of PEFT in it: the adapter acts where it is asked for, and PEFT reads what is written."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from t2.adapters.engine.peft import PeftEngine, PeftForm, PeftMethod
from t2.adapters.expert import Z
from t2.adapters.peft_folder import put_in, read_folder
from t2.adapters.targets import find_targets
from t2.core.errors import ExpertMismatchError
from tests.adapters.conftest import ARCHITECTURES, make_model, make_tokenizer

METHODS: tuple[PeftMethod, ...] = get_args(PeftMethod)
CHOICES = {
    "all": lambda name: True,
    "layer 1": lambda name: ".1." in name,
    "narrowing": lambda name: "down_proj" in name or "mlp.c_proj" in name,
    "attention": lambda name: "attn" in name,
}
TOKENS = torch.tensor([list(range(5, 40))])


def engine_of(architecture: str, method: PeftMethod, chosen: str = "all", dropout: float = 0.0) -> PeftEngine:
    model = make_model(architecture)
    return PeftEngine(
        model,
        make_tokenizer(),
        "tiny",
        adapter=PeftForm(method, rank=4, alpha=8, dropout=dropout),
        matrices=[name for name in find_targets(model) if CHOICES[chosen](name)],
        seed=5,
    )


def moved(engine: PeftEngine, seed: int = 0) -> Z:
    torch.manual_seed(seed)
    return {name: tensor + 0.2 * torch.randn_like(tensor) for name, tensor in engine.parameters().items()}


@torch.no_grad()
def logits(engine: PeftEngine) -> torch.Tensor:
    out: torch.Tensor = engine.model(TOKENS).logits
    return out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("chosen", list(CHOICES))
def test_peft_reads_what_is_written_and_the_base_stays(
    architecture: str, method: PeftMethod, chosen: str, tmp_path: Path
) -> None:
    with torch.no_grad():
        plain = make_model(architecture).eval()(TOKENS).logits
    engine = engine_of(architecture, method, chosen)
    z = moved(engine)
    assert torch.equal(logits(engine), plain)
    with engine.applied(z):
        used = logits(engine)
        with engine.applied(None):
            assert torch.equal(logits(engine), used)
    with torch.no_grad(), engine.trained(z):
        assert torch.equal(logits(engine), used)
    with engine.untrained(z):
        assert torch.equal(logits(engine), plain)
    assert not torch.allclose(used, plain, atol=1e-2)
    engine.write(tmp_path, z)
    engine.close()
    assert torch.equal(logits(engine), plain)
    assert not [module for module in engine.model.modules() if isinstance(module, BaseTunerLayer)]
    loaded = put_in(make_model(architecture).eval(), read_folder(tmp_path), engine.base)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, used)


@pytest.mark.parametrize("method", METHODS)
def test_its_first_values_change_nothing_and_follow_from_the_seed(method: PeftMethod) -> None:
    engine = engine_of("llama", method)
    base = logits(engine)
    with engine.applied(engine.parameters()):
        assert torch.allclose(logits(engine), base, atol=1e-4)
    again = engine_of("llama", method).parameters()
    assert all(torch.equal(tensor, again[name]) for name, tensor in engine.parameters().items())


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_tensors_that_are_given(method: PeftMethod) -> None:
    engine = engine_of("llama", method)
    z = {name: tensor.requires_grad_() for name, tensor in moved(engine).items()}
    with engine.trained(z):
        found = torch.autograd.grad(engine.model(TOKENS).logits.square().mean(), list(z.values()))
    assert all(float(gradient.abs().sum()) > 0 for gradient in found)
    assert all(parameter.grad is None for parameter in engine.model.parameters())


def test_dropout_acts_where_gradients_are_taken_alone() -> None:
    engine = engine_of("llama", "lora", dropout=0.5)
    z = moved(engine)
    with engine.applied(z):
        used = logits(engine)
    with engine.trained(z):
        torch.manual_seed(0)
        dropped = engine.model(TOKENS).logits.detach()
        with torch.no_grad():
            torch.manual_seed(0)
            assert torch.equal(engine.model(TOKENS).logits, dropped)
    assert not torch.allclose(dropped, used, atol=1e-3)
    with torch.no_grad(), engine.trained(z):
        assert torch.equal(engine.model(TOKENS).logits, used)
    assert engine.random
    assert not engine_of("llama", "ia3", dropout=0.5).random


def test_the_same_adapter_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        engine = engine_of("llama", "dora")
        engine.write(tmp_path / name, moved(engine))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    engine = engine_of("llama", "lora")
    engine.write(tmp_path, moved(engine))
    with pytest.raises(ExpertMismatchError, match="does not fit tiny"):
        put_in(make_model("gpt2"), read_folder(tmp_path), engine.base)
