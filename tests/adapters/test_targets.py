"""Which matrices of which architecture are adapted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from t2.adapters.targets import find_targets, layer_of, parse_layers
from t2.core.errors import ArgumentError, ModelError
from tests.adapters.conftest import make_model

# Output × input of every matrix in a layer: with 32 hidden units, 48 inner ones and half as many heads for keys.
ROTARY = {
    "attn": {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)},
    "mlp": {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)},
}
LAYERS: dict[str, tuple[str, dict[str, str], dict[str, dict[str, tuple[int, int]]]]] = {
    "llama": ("model.layers", {"attn": "self_attn", "mlp": "mlp"}, ROTARY),
    "qwen2": ("model.layers", {"attn": "self_attn", "mlp": "mlp"}, ROTARY),
    "gpt2": (
        "transformer.h",
        {"attn": "attn", "mlp": "mlp"},
        {"attn": {"c_attn": (96, 32), "c_proj": (32, 32)}, "mlp": {"c_fc": (128, 32), "c_proj": (32, 128)}},
    ),
}


def expected(architecture: str, kinds: tuple[str, ...], layers: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    prefix, modules, shapes = LAYERS[architecture]
    return {
        f"{prefix}.{layer}.{modules[kind]}.{name}.weight": shape
        for layer in layers
        for kind in kinds
        for name, shape in shapes[kind].items()
    }


@pytest.mark.parametrize("architecture", LAYERS)
@pytest.mark.parametrize(
    ("arguments", "kinds", "layers"),
    [
        ({}, ("attn", "mlp"), (0, 1, 2)),
        ({"targets": "mlp"}, ("mlp",), (0, 1, 2)),
        ({"targets": "attn"}, ("attn",), (0, 1, 2)),
        ({"layers": [1]}, ("attn", "mlp"), (1,)),
        ({"targets": "mlp", "layers": [0, 2]}, ("mlp",), (0, 2)),
    ],
)
def test_the_matrices_of_an_architecture(
    architecture: str, arguments: dict[str, Any], kinds: tuple[str, ...], layers: tuple[int, ...]
) -> None:
    found = find_targets(make_model(architecture, layers=3), **arguments)
    assert {name: tuple(target.matrix.shape) for name, target in found.items()} == expected(architecture, kinds, layers)
    for name, target in found.items():
        assert target.rank == min(target.matrix.shape)
        assert target.layer in layers
        assert target.name == name
        # A view: what is read is what the model computes with.
        assert target.matrix.data_ptr() == target.parameter.data_ptr()
        assert target.transposed == (architecture == "gpt2")


def test_a_matrix_computes_what_its_layer_does() -> None:
    for architecture in LAYERS:
        for target in find_targets(make_model(architecture)).values():
            x = torch.randn(5, target.matrix.shape[1], generator=torch.Generator().manual_seed(0))
            bias = target.module.bias
            y = x @ target.matrix.T + (bias if isinstance(bias, torch.Tensor) else 0)
            assert torch.allclose(target.module(x), y, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "dtype", "line"),
    [
        ("cpu", torch.int8, r"mlp\.up_proj\.weight is quantised \(torch\.int8\)"),
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
    for architecture in LAYERS:
        assert not [name for name in find_targets(make_model(architecture)) if "head" in name or "emb" in name]


def test_bad_choices_are_told() -> None:
    model = make_model("llama", layers=3)
    with pytest.raises(ArgumentError, match=r"targets=atn is not a set of matrices; did you mean 'attn'\?"):
        find_targets(model, "atn")
    with pytest.raises(ArgumentError, match="the model has no layer 3, its layers are 0-2"):
        find_targets(model, layers=[0, 3])
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
