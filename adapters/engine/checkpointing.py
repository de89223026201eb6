"""Gradient checkpointing: a decoder layer keeps its input alone and is computed again in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from t2.adapters.targets import Target, language_modules, layer_of


@contextlib.contextmanager
def checkpointed(model: nn.Module, targets: Mapping[str, Target], random: bool = False) -> Iterator[None]:
    """Context in which the decoder layers that hold some matrices are checkpointed; run the backward pass inside too.

    Activations then take the memory of one layer and of every layer's input, for about a third more time. The second
    computation runs the same kernels on the same inputs, in the same form of the weights, so gradients are the same.
    ``transformers`` has a switch of its own, which needs the model in training mode, with its dropout.

    Args:
        model: a language model.
        targets: its adapted matrices; the layers below the first of them need no gradient.
        random: layers draw from torch's random state, which the second computation then begins with again.
    """
    names = {_layer(name) for target in targets.values() for name in (target.name, *target.aliases)}
    layers = {id(module): module for name, module in language_modules(model) if name in names}
    with contextlib.ExitStack() as stack:
        for layer in layers.values():
            own = layer.__dict__.get("forward")
            stack.callback(_restore, layer, own)
            layer.__dict__["forward"] = _twice(layer.forward, random)
        yield


def _layer(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[: parts.index(str(layer_of(name))) + 1])


def _twice(forward: Callable[..., Any], random: bool) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=random, **kwargs)

    return run


def _restore(layer: nn.Module, own: Callable[..., Any] | None) -> None:
    if own is None:
        del layer.__dict__["forward"]
    else:
        layer.__dict__["forward"] = own
