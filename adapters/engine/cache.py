"""A key-value cache whose rows may leave, and that does not copy itself at every token."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_STEP = 64
"""Tokens by which the buffers grow: one copy of a cache in so many steps, and less than so many tokens unused."""


class RowLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # its __init_subclass__ has no types
    """A layer's keys and values in buffers with room: a token is written in place, a row that leaves moves one other.

    ``keys`` and ``values`` are views of shape (rows, heads, tokens, width) of the buffers.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._buffers: list[torch.Tensor] = []
        self._views: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values of shape (rows, heads, new tokens, width); returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, new = key_states.shape[0], (key_states, value_states)
        before = self._views[0].shape[-2] if self._views else 0
        after = before + key_states.shape[-2]
        if not self._buffers or self._buffers[0].shape[-2] < after:
            grown = [states.new_empty(*states.shape[:2], after + _STEP, states.shape[3]) for states in new]
            for buffer, view in zip(grown, self._views, strict=False):
                buffer[:, :, :before] = view
            self._buffers = grown
        self._views = [buffer[:rows, :, :after] for buffer in self._buffers]
        for view, states in zip(self._views, new, strict=True):
            view[:, :, before:] = states
        self.keys, self.values = self._views
        return self.keys, self.values

    def keep(self, index: torch.Tensor) -> None:
        """Row i becomes what row ``index[i]`` was, where either that is row i or no later row is it; others go."""
        if not self._views:  # a layer that shares another one's keys and values
            return
        moved = (index != torch.arange(len(index), device=index.device)).nonzero().squeeze(1)
        if len(moved):
            for view in self._views:
                view[moved] = view[index[moved]]
        self._views = [view[: len(index)] for view in self._views]
        self.keys, self.values = self._views


def let_rows_leave(cache: object) -> bool:
    """Make an empty cache one that rows may leave; False where its kind knows no rows, and then nothing is changed."""
    if type(cache) is not DynamicCache or cache.offloading or cache.get_seq_length():
        return False
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return False
    cache.layers = [RowLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = RowLayer
    return True


def keep_rows(cache: DynamicCache, index: torch.Tensor) -> None:
    """Keep some rows of a cache; see :meth:`RowLayer.keep`."""
    for layer in cache.layers:
        if isinstance(layer, RowLayer):
            layer.keep(index)
        elif isinstance(layer, DynamicSlidingWindowLayer):
            layer.batch_select_indices(index)
