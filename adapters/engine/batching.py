"""How many rows fit into a batch: by the memory that batches were seen to take, and fewer when it runs out."""

from __future__ import annotations

import gc
import resource
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import psutil
import torch

from t2.adapters.engine.memory import free_bytes
from t2.core.errors import ModelError

T = TypeVar("T")

_SHARE = (0.5, 0.8)
"""Share of the free memory that a batch may take: of a machine, which others use too, and of a GPU."""
_DEFAULT_ROWS = (32, 512)
"""Most rows where the user names no bound: on a CPU more of them are no faster, on a GPU they are up to about here."""
_PROBE = 32
"""Rows of a batch before anything was measured."""


class Budget:
    """Rows of a batch that memory holds.

    At first a token of a row is taken to need its keys, values and activations as the configuration gives them, and a
    batch is small. What each batch really took at its peak then bounds the next.

    Args:
        model: the model.
        most: rows of a batch at most; None for as many as are worth it.
    """

    def __init__(self, model: Any, most: int | None = None) -> None:
        self._device = torch.device(model.device)
        self.most = most if most is not None else _DEFAULT_ROWS[self._device.type == "cuda"]
        self._token_bytes = _token_bytes(model)
        self._row_bytes = 12 * model.get_input_embeddings().weight.shape[0]  # logits, twice, and their sort
        self.measured = False

    @property
    def bytes_per_token(self) -> float:
        """Bytes that a token of a row takes at the peak of a batch."""
        return self._token_bytes

    def rows(self, tokens: int) -> int:
        """Rows of so many tokens each, prompt and answer, that fit into a batch; at least 1."""
        share = _SHARE[self._device.type == "cuda"]
        room = share * free_bytes(self._device) / (self._token_bytes * tokens + self._row_bytes)
        probed = self.most if self.measured else min(self.most, _PROBE)
        return max(1, min(probed, int(room)))

    def watch(self, run: Callable[[], T], tokens: int) -> T:
        """Run a batch of so many tokens in all, and note what memory it took."""
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
        else:
            before, peak = psutil.Process().memory_info().rss, _peak_rss()
        result = run()
        if cuda:
            taken = torch.cuda.max_memory_allocated(self._device) - before
        else:
            # Unless the process was larger before, its highest mark is this batch's.
            taken = _peak_rss() - before if _peak_rss() > peak else 0
        self._token_bytes = max(self._token_bytes, taken / max(1, tokens))
        self.measured = True
        return result

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


def _peak_rss() -> int:
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else 1024 * kilobytes


def _token_bytes(model: Any) -> float:
    """Keys and values of a token in every layer, and what one layer computes for it."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return float(model.dtype.itemsize * (kept + 4 * config.hidden_size + 3 * inner))
