"""A model put back as it was, after something else was built into it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def restored(model: torch.nn.Module) -> Iterator[None]:
    """After the context a model has the modules, hooks, attributes and tensors that it had before.

    What replaced, wrapped, cut or froze them is undone, that of its configuration too; numbers that were written over
    in place are not.

    Args:
        model: the model; its tensors are not copied.
    """
    owners = [*model.modules(), *_configs(model)]
    before = [(owner, _copied(vars(owner))) for owner in owners]
    tensors = [(each, each.data, each.requires_grad) for each in (*model.parameters(), *model.buffers())]
    try:
        yield
    finally:
        for owner, attributes in before:
            _put_back(vars(owner), attributes)
        for tensor, data, requires_grad in tensors:
            tensor.data = data
            tensor.requires_grad_(requires_grad)


def _configs(model: torch.nn.Module) -> list[Any]:
    config: Any = getattr(model, "config", None)
    if config is None:
        return []
    inner = config.get_text_config()
    return [config] if inner is config else [config, inner]


def _copied(attributes: dict[str, Any]) -> dict[str, tuple[Any, dict[Any, Any] | None]]:
    """Each attribute, and of one that is a dict, as modules keep theirs, what is in it."""
    return {name: (value, dict(value) if isinstance(value, dict) else None) for name, value in attributes.items()}


def _put_back(attributes: dict[str, Any], before: dict[str, tuple[Any, dict[Any, Any] | None]]) -> None:
    attributes.clear()
    for name, (value, content) in before.items():
        if content is not None:
            value.clear()
            value.update(content)
        attributes[name] = value
