"""Which matrices of which architecture are adapted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from t2.adapters.targets import find_targets, layer_of, parse_layers
from t2.core.errors import ArgumentError, ModelError
from tests.adapters.conftest import make_model
from tests.adapters.families import FAMILIES


@pytest.mark.parametrize(
    ("device", "dtype", "line"),
    [
        ("cpu", torch.float8_e4m3fn, r"mlp\.up_proj\.weight is quantised in a way that t2 cannot read"),
        ("cpu", torch.int8, r"mlp\.up_proj\.weight is quantised in a way that t2 cannot read \(torch\.int8\)"),
        ("meta", torch.float32, "not in memory"),
    ],
)
def test_weights_that_cannot_be_scaled_are_refused(device: str, dtype: torch.dtype, line: str) -> None:
    model = make_model("llama")
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(layer, nn.Linear)
    layer.weight = nn.Parameter(torch.ones(48, 32, dtype=dtype, device=device), requires_grad=False)
    with pytest.raises(ModelError, match=line):
        find_targets(model)


def test_neither_head_nor_embedding_is_adapted() -> None:
    for architecture in FAMILIES:
        names = find_targets(make_model(architecture), moe="skip")
        assert not [name for name in names if "head" in name or "emb" in name]


def test_bad_choices_are_told() -> None:
    model = make_model("llama", layers=3)
    with pytest.raises(ArgumentError, match=r"targets=atn is not a set of matrices; did you mean 'attn'\?"):
        find_targets(model, "atn")
    with pytest.raises(ArgumentError, match="the model has no layer 3, its layers are 0-2"):
        find_targets(model, layers=[0, 3])
    with pytest.raises(ArgumentError, match="moe=skp is not a way to treat mixtures of experts; did you mean 'skip'"):
        find_targets(model, moe="skp")
    with pytest.raises(ModelError, match="Sequential has no linear layers under an 'mlp' or 'attn' module"):
        find_targets(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.experts.3.w1.weight", 12),
        ("transformer.h.0.attn.c_proj.weight", 0),
        ("lm_head.weight", None),
    ],
)
def test_the_layer_is_the_first_number(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


@pytest.mark.parametrize(
    ("text", "layers"),
    [("3", [3]), ("0-3", [0, 1, 2, 3]), ("0-1+20", [0, 1, 20]), ("5+1-2+2", [1, 2, 5]), ("7-7", [7])],
)
def test_layers_are_read(text: str, layers: list[int]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1+", "1,2", "1-2-3", "1.5"])
def test_layers_of_another_form_are_told(text: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse_layers(text)
    assert str(caught.value) == f"layers={text} is not of the form 0-15+20 (ranges include both ends)"


def test_a_backward_range_is_told() -> None:
    with pytest.raises(ArgumentError, match=r"layers=0\+5-3: the range 5-3 runs backwards"):
        parse_layers("0+5-3")
