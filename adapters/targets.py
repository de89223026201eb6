"""Which weight matrices of a model are adapted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from t2.core.errors import ArgumentError, ModelError, nearest

TargetSet = Literal["mlp", "attn", "all"]
TARGET_SETS: tuple[str, ...] = get_args(TargetSet)

_KINDS: dict[str, tuple[str, ...]] = {"mlp": ("mlp", "feed_forward", "ffn"), "attn": ("attn", "self_attn", "attention")}


@dataclass(frozen=True)
class Target:
    """One adapted matrix.

    Attributes:
        name: its parameter name in the model's state dict.
        module: the linear layer that holds it.
        layer: index of the decoder layer.
        transposed: the layer stores in × out (GPT-2's ``Conv1D``) instead of out × in.
    """

    name: str
    module: nn.Module
    layer: int
    transposed: bool

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as the layer stores it."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def matrix(self) -> torch.Tensor:
        """W as a view of shape (m, n) = (out, in)."""
        weight = self.parameter.detach()
        return weight.T if self.transposed else weight

    @property
    def rank(self) -> int:
        """r = min(m, n)."""
        return min(self.parameter.shape)


def find_targets(model: nn.Module, targets: str = "all", layers: Sequence[int] | None = None) -> dict[str, Target]:
    """The adaptable matrices of a model, by parameter name, in the order of the model's modules.

    Args:
        model: a decoder-only language model.
        targets: ``mlp``, ``attn`` or ``all`` (both).
        layers: keep these decoder layers only; None keeps all.

    Raises:
        ArgumentError: an unknown target set, or layers that the model does not have.
        ModelError: the model has no such matrices, or they are quantised or offloaded.
    """
    if targets not in TARGET_SETS:
        raise ArgumentError(f"targets={targets} is not a set of matrices{nearest(targets, TARGET_SETS)}")
    found: dict[str, Target] = {}
    kinds: dict[str, str] = {}
    for module_name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        parts = module_name.split(".")
        kind = next((kind for kind, words in _KINDS.items() if any(part in words for part in parts)), None)
        name = f"{module_name}.weight"
        layer = layer_of(name)
        if kind is None or layer is None:
            continue
        weight = module.weight
        if weight.is_meta or not weight.is_floating_point():
            state = "is not in memory (offloaded)" if weight.is_meta else f"is quantised ({weight.dtype})"
            raise ModelError(
                f"{name} {state}, and t2 adapts weights that are floating-point numbers in memory; load the model "
                "without quantisation and offloading"
            )
        found[name] = Target(name, module, layer, isinstance(module, Conv1D))
        kinds[name] = kind
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no linear layers under an 'mlp' or 'attn' module, so there is nothing to adapt"
        )
    if layers is not None:
        depth = 1 + max(target.layer for target in found.values())
        outside = sorted(layer for layer in layers if not 0 <= layer < depth)
        if outside:
            raise ArgumentError(f"layers: the model has no layer {outside[0]}, its layers are 0-{depth - 1}")
    return {
        name: target
        for name, target in found.items()
        if (targets == "all" or kinds[name] == targets) and (layers is None or target.layer in layers)
    }


def layer_of(name: str) -> int | None:
    """The decoder layer in a parameter's name: its first number, None when it has none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def parse_layers(text: str) -> list[int]:
    """Layers from text such as ``0-15+20``: ranges include both ends, ``+`` joins.

    Raises:
        ArgumentError: the text is not of that form.
    """
    layers: set[int] = set()
    for part in text.split("+"):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        if not match:
            raise ArgumentError(f"layers={text} is not of the form 0-15+20 (ranges include both ends)")
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if last < first:
            raise ArgumentError(f"layers={text}: the range {part} runs backwards")
        layers.update(range(first, last + 1))
    return sorted(layers)
