"""Batch sizes: as many rows as the device's memory holds, and fewer when it runs out."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from t2.adapters.engine.memory import free_bytes, total_bytes
from t2.core.errors import ModelError

_SHARE = (0.25, 0.7)
"""Share of the memory besides the weights that a batch may take: on a CPU and on a GPU.

Other programs use a machine's memory too, so its share is smaller.
"""
_DEFAULT_ROWS = (32, 512)
"""Most rows where the user names no bound: on a CPU more of them are no faster, on a GPU they are up to about here."""


class Budget:
    """Rows of a batch that memory holds.

    The memory of a token is estimated from the configuration: its keys, values and activations. The limit is a share of
    the device's total memory, not of the free memory: the number of rows changes the rounding in low precision, and the
    same work must give the same answers. A warning says when less memory is free than a batch needs.

    Args:
        model: the model.
        most: rows of a batch at most; None for as many as are worth it.
    """

    def __init__(self, model: Any, most: int | None = None) -> None:
        self._device = torch.device(model.device)
        self.most = most if most is not None else _DEFAULT_ROWS[self._device.type == "cuda"]
        self._token_bytes = _token_bytes(model)
        self._row_bytes = 12 * model.get_input_embeddings().weight.shape[0]  # logits, twice, and their sort
        weights = sum(parameter.nbytes for parameter in model.parameters())
        self._room = _SHARE[self._device.type == "cuda"] * max(0, total_bytes(self._device) - weights)

    def rows(self, tokens: int) -> int:
        """Rows of so many tokens each, prompt and answer, that fit into a batch; at least 1."""
        row = self._token_bytes * tokens + self._row_bytes
        return max(1, min(self.most, int(self._room / row)))

    def fitting(self, batch: Sequence[int], tokens: int, what: str) -> int:
        """Return how many rows of a batch fit into the free memory, at least 1; warn if not all do."""
        row = self._token_bytes * tokens + self._row_bytes
        count = max(1, int(free_bytes(self._device) / row))
        if count >= len(batch):
            return len(batch)
        warnings.warn(
            f"{what}: {len(batch)} rows need more memory than is free on {self._device}, going on with {count}; "
            "in low precision answers may differ by rounding",
            stacklevel=2,
        )
        return count

    def shrinking(
        self, batch: Sequence[int], run: Callable[[list[int]], None], what: str, release: Callable[[], None]
    ) -> None:
        """Run a batch, in halves where memory does not hold it, which later batches then remember.

        Args:
            batch: the items.
            run: runs some of them.
            what: the model and its work, for messages.
            release: lets go what memory can do without.

        Raises:
            ModelError: memory does not hold one item.
        """
        waiting = [list(batch)]
        while waiting:
            part = waiting.pop()
            if len(part) > self.most:
                waiting += [part[self.most :], part[: self.most]]
                continue
            try:
                run(part)
                continue
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            # Here, where the error no longer holds on to the tensors of the pass that failed.
            if len(part) == 1:
                raise ModelError(
                    f"{what} does not fit into the memory of {self._device} even alone; "
                    "use a smaller dtype, shorter prompts or answers, or a machine with more memory"
                )
            release()
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self.most = max(1, len(part) // 2)
            warnings.warn(f"{what}: out of memory with {len(part)} rows, going on with {self.most}", stacklevel=2)
            waiting.append(part)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in torch's allocator for CPUs."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "CUDA out of memory" in text)


def _token_bytes(model: Any) -> float:
    """Keys and values of a token in every layer, and what one layer computes for it."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return float(model.dtype.itemsize * (kept + 4 * config.hidden_size + 3 * inner))
