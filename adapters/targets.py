"""Which weight matrices of a model are adapted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from t2.adapters.quantised import dequantised, is_plain, quantised_form
from t2.core.errors import ArgumentError, ModelError, nearest

TargetSet = Literal["mlp", "attn", "all"]
TARGET_SETS: tuple[str, ...] = get_args(TargetSet)
Moe = Literal["refuse", "skip"]
MOE: tuple[str, ...] = get_args(Moe)

_KINDS: dict[str, tuple[str, ...]] = {
    "mlp": ("mlp", "feed_forward", "ffn", "shared_mlp"),
    "attn": ("attn", "self_attn", "attention", "self_attention", "linear_attn"),
}
_ROUTED = ("experts", "router", "gate", "shared_expert_gate")
"""Modules of a mixture-of-experts layer that choose experts or are chosen."""


@dataclass(frozen=True)
class Target:
    """One adapted matrix.

    Attributes:
        name: its parameter name in the state dict of the (text) model.
        module: the linear layer that holds it.
        layer: index of the decoder layer.
        transposed: the layer stores in × out (GPT-2's ``Conv1D``) instead of out × in.
        form: how its weight is quantised, ``int8``, ``nf4`` or ``fp4``; None where it holds the matrix itself.
    """

    name: str
    module: nn.Module
    layer: int
    transposed: bool
    form: str | None = None

    @property
    def kind(self) -> str:
        """``mlp`` or ``attn``, the set that it is in."""
        kind = _kind(self.name.split("."))
        assert kind is not None
        return kind

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as the layer stores it."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) = (out, in)."""
        if self.form is not None:
            assert isinstance(self.module, nn.Linear)
            return self.module.out_features, self.module.in_features
        m, n = self.parameter.shape
        return (n, m) if self.transposed else (m, n)

    @property
    def matrix(self) -> torch.Tensor:
        """W, of shape (m, n): a view of the parameter; of a quantised one a new tensor each time, to be let go soon."""
        if self.form is not None:
            return dequantised(self.module)
        weight = self.parameter.detach()
        return weight.T if self.transposed else weight

    @property
    def rank(self) -> int:
        """r = min(m, n)."""
        return min(self.shape)


def find_targets(
    model: nn.Module,
    targets: str = "all",
    layers: Sequence[int] | None = None,
    moe: str = "refuse",
    weights: bool = True,
) -> dict[str, Target]:
    """The adaptable matrices of a model, by parameter name, in the order of the model's modules.

    Of a model that also sees images or hears, these are the matrices of its language half, under the names that they
    have in the text model of that architecture.

    Args:
        model: a decoder-only language model, or one with such a half.
        targets: ``mlp``, ``attn`` or ``all`` (both).
        layers: keep these decoder layers only; None keeps all.
        moe: ``refuse`` a model with mixture-of-experts layers, or ``skip`` their routers and routed experts and adapt
            the rest: attention, shared experts, and the layers that have no experts.
        weights: whether their weights are to be there; without, of a model on the ``meta`` device too, names and
            shapes can be asked for.

    Raises:
        ArgumentError: an unknown target set, or layers that the model does not have.
        ModelError: the model has no such matrices, they are offloaded, quantised in a way that is not known, or it has
            mixture-of-experts layers and ``moe`` is not ``skip``.
    """
    if targets not in TARGET_SETS:
        raise ArgumentError(f"targets={targets} is not a set of matrices{nearest(targets, TARGET_SETS)}")
    if moe not in MOE:
        raise ArgumentError(f"moe={moe} is not a way to treat mixtures of experts{nearest(moe, MOE)}")
    found: dict[str, Target] = {}
    routed = None
    for module_name, module in language_modules(model):
        parts = module_name.split(".")
        name = f"{module_name}.weight"
        layer = layer_of(name)
        if layer is None:
            continue
        routed = routed or (module_name if _holds_experts(parts, module) else None)
        if _kind(parts) is None or not _is_linear(module):
            continue
        _check(name, module, weights)
        found[name] = Target(name, module, layer, isinstance(module, Conv1D), quantised_form(module))
    if routed is not None:
        if moe == "refuse":
            raise ModelError(
                f"{type(model).__name__} has mixture-of-experts layers ({routed}), which t2 does not adapt; "
                "moe=skip adapts the rest of it: attention, shared experts and dense layers"
            )
        found = {name: target for name, target in found.items() if not set(name.split(".")).intersection(_ROUTED)}
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no linear layers under an 'mlp' or 'attn' module, so there is nothing to adapt"
        )
    return choose(found, targets, layers)


def choose(found: Mapping[str, Target], targets: str = "all", layers: Sequence[int] | None = None) -> dict[str, Target]:
    """Those of a model's adaptable matrices that are in a set and in some layers.

    Raises:
        ArgumentError: an unknown target set, or layers that the model does not have.
    """
    if targets not in TARGET_SETS:
        raise ArgumentError(f"targets={targets} is not a set of matrices{nearest(targets, TARGET_SETS)}")
    if layers is not None:
        depth = 1 + max(target.layer for target in found.values())
        outside = sorted(layer for layer in layers if not 0 <= layer < depth)
        if outside:
            raise ArgumentError(f"layers: the model has no layer {outside[0]}, its layers are 0-{depth - 1}")
    return {
        name: target
        for name, target in found.items()
        if (targets == "all" or target.kind == targets) and (layers is None or target.layer in layers)
    }


def language_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model's language half, under the names that they have in the text model of its architecture.

    Of a text model these are all its modules, under their own names.
    """
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if isinstance(model, PreTrainedModel) and config is not None else None
    if text is None or text is config:
        yield from model.named_modules()
        return
    for module in model.modules():
        if module is not model and isinstance(module, PreTrainedModel) and type(module.config) is type(text):
            # The backbone of a text model lies under this name in it, unless this is the whole text model.
            inner = module.base_model_prefix
            start = "" if hasattr(module, inner) else f"{inner}."
            yield from ((f"{start}{name}", part) for name, part in module.named_modules())
            return
    raise ModelError(f"{type(model).__name__} has a text configuration but no language model that t2 can find in it")


def _holds_experts(parts: Sequence[str], module: nn.Module) -> bool:
    """Whether a module holds the routed experts of a layer: in one tensor with a dimension for them, or as a list."""
    stacked = any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    return parts[-1] == "experts" or (stacked and not isinstance(module, nn.Conv1d))


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, whatever it keeps its weight in."""
    leaf = hasattr(module, "in_features") and hasattr(module, "out_features") and not list(module.children())
    return leaf or isinstance(module, (nn.Linear, Conv1D))


def _kind(parts: Sequence[str]) -> str | None:
    """The set of matrices that a module's path puts it in."""
    return next((kind for kind, words in _KINDS.items() if any(part in words for part in parts)), None)


def _check(name: str, module: nn.Module, weights: bool) -> None:
    """Refuse a layer whose matrix cannot be read.

    Raises:
        ModelError: it is not in memory, or quantised in a way that is not known.
    """
    weight = module.weight if isinstance(module, (nn.Linear, Conv1D)) else None
    if weights and isinstance(weight, torch.Tensor) and weight.is_meta:
        raise ModelError(f"{name} is not in memory (offloaded); load the model without offloading")
    if weight is None or not (is_plain(module) or quantised_form(module)):
        how = type(module).__name__ if weight is None else weight.dtype
        raise ModelError(
            f"{name} is quantised in a way that t2 cannot read ({how}); load the model with load_in_8bit or "
            "load_in_4bit (bitsandbytes), or without quantisation"
        )


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
