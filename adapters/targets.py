"""Which weight matrices of a model are adapted."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from t2.adapters.basis import fingerprint
from t2.adapters.quantised import dequantised, is_plain, quantised_form
from t2.core.errors import ArgumentError, ModelError, nearest

_log = logging.getLogger(__name__)

TargetSet = Literal["mlp", "attn", "all"]
TARGET_SETS: tuple[str, ...] = get_args(TargetSet)
Moe = Literal["refuse", "skip"]
MOE: tuple[str, ...] = get_args(Moe)

_KINDS: dict[str, tuple[str, ...]] = {
    "mlp": ("mlp", "feed_forward", "ffn", "shared_mlp"),
    "attn": ("attn", "self_attn", "attention", "self_attention", "linear_attn"),
}
_ROLES: dict[str, tuple[str, ...]] = {
    "mlp": (
        *("fc1", "fc2", "fc_in", "fc_out", "c_fc", "lin1", "lin2", "w1", "w2", "w3", "wi", "wi_0", "wi_1", "wo"),
        *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "dense_h_to_4h", "dense_4h_to_h"),
        *("mlps", "mlp_block", "ffns", "ff", "feedforward", "DenseReluDense", "intermediate", "output"),
    ),
    "attn": (
        *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "q_lin", "k_lin", "v_lin", "query", "key", "value"),
        *("attentions", "multi_head_attention", "SelfAttention"),
    ),
}
"""Path components that put a linear layer into a set if no module above it does."""
_OTHER = "other"
"""Kind of the other linear layers of a decoder layer, such as those of a state-space model."""
_CROSS = ("encoder_attn", "cross_attn", "crossattention", "cross_attention", "EncDecAttention")
"""Names of cross-attention modules."""
_READ_DIRECTLY = ("dt_proj",)
"""Linear layers whose weight the model uses without a call of the layer, so hooks never run."""
_ROUTED = ("experts", "router", "gate", "shared_expert_gate")
"""Modules of a mixture-of-experts layer that choose experts or are chosen."""


@dataclass(frozen=True)
class Use:
    """A linear layer that uses an adapted matrix.

    Attributes:
        module: the layer.
        flipped: whether it multiplies by the transpose of the target's matrix.
    """

    module: nn.Module
    flipped: bool = False

    @property
    def parameter(self) -> nn.Parameter:
        """The layer's weight as it stores it."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return a matrix of the target in the layout of this layer's weight."""
        return matrix.T if isinstance(self.module, Conv1D) != self.flipped else matrix


@dataclass(frozen=True)
class Target:
    """One adapted matrix.

    A weight that several modules share is one target, under the first of its names.

    Attributes:
        name: its parameter name in the state dict of the (text) model.
        module: the linear layer that holds it.
        layer: index of the decoder layer.
        transposed: the layer stores in × out (GPT-2's ``Conv1D``) instead of out × in.
        form: how its weight is quantised, ``int8``, ``nf4`` or ``fp4``; None where it holds the matrix itself.
        aliases: further names of the same weight.
        shared: further layers that use it.
    """

    name: str
    module: nn.Module
    layer: int
    transposed: bool
    form: str | None = None
    aliases: tuple[str, ...] = ()
    shared: tuple[Use, ...] = ()

    @property
    def kind(self) -> str:
        """``mlp`` or ``attn``, the set that it is in, or ``other``."""
        return _kind(self.name.split(".")) or _OTHER

    @property
    def uses(self) -> tuple[Use, ...]:
        """Every layer that uses the matrix."""
        return (Use(self.module), *self.shared)

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


class Ranks(dict[str, int]):
    """The rank of each adaptable matrix, by name.

    Args:
        targets: the adaptable matrices.
        digests: :func:`t2.adapters.basis.matrix_digest` of each.

    Attributes:
        aliases: further names of shared matrices, mapped to the first name.
        fingerprint: fingerprint of the model.
        untied: fingerprint of an untied copy of the model.
    """

    def __init__(self, targets: Mapping[str, Target], digests: Mapping[str, str]) -> None:
        super().__init__({name: target.rank for name, target in targets.items()})
        self.aliases: Mapping[str, str] = aliases_of(targets)
        self.fingerprint = fingerprint(digests, self.aliases)
        self.untied = fingerprint({**digests, **{alias: digests[name] for alias, name in self.aliases.items()}})


def aliases_of(targets: Mapping[str, Target]) -> dict[str, str]:
    """Map the further names of shared matrices to the first name."""
    return {alias: name for name, target in targets.items() for alias in target.aliases}


def find_targets(
    model: nn.Module,
    targets: str = "all",
    layers: Sequence[int] | None = None,
    moe: str = "refuse",
    weights: bool = True,
) -> dict[str, Target]:
    """The adaptable matrices of a model, by parameter name, in the order of the model's modules.

    These are the linear layers of its attention and feed-forward modules, and the other linear layers of the same
    decoder layers. Of a model that also takes images or audio, these are the matrices of its language half, under the
    names that they have in the text model of that architecture. A weight that several of these layers share is one
    matrix. A weight that any other module uses too, such as the output embedding, is left out.

    Args:
        model: a decoder-only language model, or one with such a half.
        targets: ``mlp``, ``attn`` or ``all``.
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
    modules = list(language_modules(model))
    stacks, counts = _stacks(model, modules), _expert_counts(model)
    found: dict[str, Target] = {}
    routed = None
    for module_name, module in modules:
        parts = module_name.split(".")
        name = f"{module_name}.weight"
        layer = layer_of(name)
        if layer is None:
            continue
        routed = routed or (module_name if _holds_experts(parts, module, counts) else None)
        above = _set_above(parts) is not None
        if not _is_linear(module) or not (above or (_stack(parts) in stacks and _may_be_adapted(parts, module))):
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
    found = _merge_shared(model, found)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no linear layers under an 'mlp' or 'attn' module or elsewhere in its decoder "
            "layers, so there is nothing to adapt"
        )
    return _select(found, targets, layers)


def _merge_shared(model: nn.Module, found: Mapping[str, Target]) -> dict[str, Target]:
    """Merge targets that share a weight; drop weights that other modules use too."""
    groups: dict[object, list[Target]] = {}
    for target in found.values():
        groups.setdefault(weight_identity(target.parameter), []).append(target)
    modules = {id(target.module) for target in found.values()}
    elsewhere = {
        weight_identity(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if not (name == "weight" and id(module) in modules)
    }
    united = {}
    for identity, group in groups.items():
        if identity in elsewhere:
            continue
        first, *rest = group
        shared = {id(other.module): Use(other.module, _is_flipped(first, other)) for other in rest}
        shared.pop(id(first.module), None)
        aliases = tuple(other.name for other in rest)
        united[first.name] = replace(first, aliases=aliases, shared=tuple(shared.values()))
    return united


def _is_flipped(first: Target, other: Target) -> bool:
    """Whether two layers share a weight and one of them multiplies by its transpose."""
    if first.form is not None:
        return False
    one, two = first.matrix, other.matrix
    return (one.shape, one.stride()) != (two.shape, two.stride())


def weight_identity(parameter: torch.Tensor) -> object:
    """Return a key that is equal for parameters that are one weight or view the same memory."""
    plain = type(parameter.data) is torch.Tensor and not parameter.is_meta and parameter.numel() > 0
    if not plain:
        return id(parameter)
    return parameter.device, parameter.data_ptr(), tuple(sorted(zip(parameter.shape, parameter.stride(), strict=True)))


def parameter_names(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, tuple[str, ...]]:
    """Return every state-dict name of each target's weight in the whole model."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(f"{name}.weight")
    return {
        name: tuple(place for use in target.uses for place in places[id(use.module)])
        for name, target in targets.items()
    }


def left_out(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, int]:
    """Count the weights of decoder layers that are not adapted, by their path in a layer.

    Vectors, such as the weights of norms, are not counted.

    Args:
        model: a language model.
        targets: its adaptable matrices.
    """
    modules = list(language_modules(model))
    stacks = _stacks(model, modules)
    adapted = {id(use.module) for target in targets.values() for use in target.uses}
    found: dict[str, int] = {}
    seen: set[int] = set()
    for name, module in modules:
        parts = name.split(".")
        if _stack(parts) not in stacks or id(module) in seen:
            continue
        seen.add(id(module))
        place = ["*" if part.isdigit() else part for part in parts[_depth(parts) + 1 :]]
        for own, parameter in module.named_parameters(recurse=False):
            if sum(size > 1 for size in parameter.shape) > 1 and not (own == "weight" and id(module) in adapted):
                role = ".".join([*place, *([] if own == "weight" else [own])])
                found[role] = found.get(role, 0) + 1
    return found


def warn_left_out(base_id: str, places: Mapping[str, int]) -> None:
    """Log the result of :func:`left_out`, if it is not empty."""
    if places:
        _log.warning("%s: these weights of its decoder layers are not adapted: %s", base_id, format_left_out(places))


def format_left_out(places: Mapping[str, int]) -> str:
    """Format the result of :func:`left_out` in one line."""
    return ", ".join(f"{count} × {place}" for place, count in places.items())


def choose(found: Mapping[str, Target], targets: str = "all", layers: Sequence[int] | None = None) -> dict[str, Target]:
    """Select the adaptable matrices of a set and of some layers; at least one.

    A shared matrix belongs to the layer of its first name.

    Raises:
        ArgumentError: an unknown target set, layers that the model does not have, or no matrix matches both.
    """
    chosen = _select(found, targets, layers)
    if not chosen:
        there = sorted({target.kind for target in _select(found, "all", layers).values()})
        where = "" if layers is None else f" in layers {'+'.join(map(str, layers))}"
        only = f", only {' and '.join(there)}" if there else ""
        more = "" if layers is None else " or other layers"
        raise ArgumentError(f"targets={targets}: the model has no such matrices{where}{only}; use targets=all{more}")
    return chosen


def _select(found: Mapping[str, Target], targets: str, layers: Sequence[int] | None) -> dict[str, Target]:
    if targets not in TARGET_SETS:
        raise ArgumentError(f"targets={targets} is not a set of matrices{nearest(targets, TARGET_SETS)}")
    if layers is not None:
        depth = 1 + max(layer_of(name) or 0 for target in found.values() for name in (target.name, *target.aliases))
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

    Of a text model these are all modules, under their own names, except models inside it that take no text. A module
    with several names appears under each.
    """
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if isinstance(model, PreTrainedModel) and config is not None else None
    if text is None or text is config:
        towers = tuple(f"{name}." for name, module in model.named_modules() if _takes_no_text(module))
        yield from ((n, m) for n, m in model.named_modules(remove_duplicate=False) if not f"{n}.".startswith(towers))
        return
    for module in model.modules():
        if module is not model and isinstance(module, PreTrainedModel) and type(module.config) is type(text):
            # The backbone of a text model lies under this name in it, unless this is the whole text model.
            inner = module.base_model_prefix
            start = "" if hasattr(module, inner) else f"{inner}."
            yield from ((f"{start}{name}", part) for name, part in module.named_modules(remove_duplicate=False))
            return
    raise ModelError(f"{type(model).__name__} has a text configuration but no language model that t2 can find in it")


def _takes_no_text(module: nn.Module) -> bool:
    """Whether a module is a model of images or audio only."""
    return isinstance(module, PreTrainedModel) and "text" not in getattr(module, "input_modalities", "text")


def _holds_experts(parts: Sequence[str], module: nn.Module, counts: Collection[int]) -> bool:
    """Whether a module holds the routed experts of a layer, as one tensor or as a list.

    Args:
        parts: its path.
        module: the module.
        counts: numbers of experts in the model's configuration. Not every tensor of three dimensions holds experts.
    """
    if parts[-1] == "experts":
        return True
    first = [parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    named = "expert" in type(module).__name__.lower() or any("expert" in part.lower() for part in parts)
    return bool(first) and not isinstance(module, nn.Conv1d) and (named or any(size in counts for size in first))


def _expert_counts(model: nn.Module) -> set[int]:
    """Numbers of experts in a model's configuration, those above one."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return set()
    values = config.get_text_config(decoder=True).to_dict()
    named = [value for key, value in values.items() if "expert" in key and "per_tok" not in key]
    return {value for value in named if type(value) is int and value > 1}


def _depth(parts: Sequence[str]) -> int:
    """Index of the first number in a path, that of the layer; the path's length without one."""
    return next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))


def _stack(parts: Sequence[str]) -> str | None:
    """Path of the list of layers around a module; None outside such a list and for its items."""
    depth = _depth(parts)
    return ".".join(parts[:depth]) if depth + 1 < len(parts) else None


def _stacks(model: nn.Module, modules: Sequence[tuple[str, nn.Module]]) -> set[str]:
    """Paths of the lists of decoder layers.

    These are the lists with attention or feed-forward parts, else the lists of ``num_hidden_layers`` items.
    """
    linear = [name.split(".") for name, module in modules if _is_linear(module)]
    known = {stack for parts in linear if _kind(parts) is not None and (stack := _stack(parts)) is not None}
    config = getattr(model, "config", None)
    if known or not isinstance(config, PreTrainedConfig):
        return known
    depth = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    return {name for name, module in modules if isinstance(module, nn.ModuleList) and len(module) == depth}


def _may_be_adapted(parts: Sequence[str], module: nn.Module) -> bool:
    """Whether a linear layer outside attention and feed-forward modules can be adapted."""
    known = isinstance(module, (nn.Linear, Conv1D)) and (is_plain(module) or quantised_form(module) is not None)
    return known and not set(parts).intersection(_CROSS) and parts[-1] not in _READ_DIRECTLY


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, whatever it keeps its weight in."""
    leaf = hasattr(module, "in_features") and hasattr(module, "out_features") and not list(module.children())
    return leaf or isinstance(module, (nn.Linear, Conv1D))


def _set_above(parts: Sequence[str]) -> str | None:
    """Set of the attention or feed-forward module in a path, if any."""
    return next((kind for kind, words in _KINDS.items() if any(part in words for part in parts)), None)


def _kind(parts: Sequence[str]) -> str | None:
    """The set of matrices that a module's path puts it in."""
    roles = {word: kind for kind, words in _ROLES.items() for word in words}
    return _set_above(parts) or next((roles[part] for part in parts if part in roles), None)


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
