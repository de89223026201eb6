"""Log-likelihoods with gradients: many continuations of one context in one row.

The choices of a question, or the sampled answers to a prompt, share their context. A row holds the context once and all
continuations after it, and a mask lets each see the context and itself alone, so the context is computed once. Logits are
computed from the last position of the contexts on, never over whole prompts.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

_PAD = 0
_LOGITS = 1 << 26
"""Most logits held in float32 at once: 256 MB."""
_SHARING = frozenset({"gpt2", "llama", "mistral", "qwen2", "qwen3", "smollm3"})
"""Model types known to attend by the mask and the positions they are given."""


@dataclass(frozen=True)
class Branches:
    """A context and the continuations that branch from it, as tokens; no continuation is empty."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    @property
    def positions(self) -> int:
        """Number of continuation tokens."""
        return sum(map(len, self.continuations))

    @property
    def inputs(self) -> int:
        """Number of input tokens when the context is shared; a continuation's last token is only predicted."""
        return len(self.context) + self.positions - len(self.continuations)


@dataclass(frozen=True)
class Spans:
    """Logits at the continuations' positions.

    Attributes:
        logits: shape (positions, vocabulary), float32; all continuations' positions one after another, in their order.
        tokens: the continuations' tokens, shape (positions,).
        lengths: number of tokens of each continuation.
    """

    logits: torch.Tensor
    tokens: torch.Tensor
    lengths: list[int]

    def token_logprobs(self, temperature: float = 1.0) -> torch.Tensor:
        """log p of each token, shape (positions,)."""
        logits = self.logits if temperature == 1.0 else self.logits / temperature
        return -F.cross_entropy(logits, self.tokens, reduction="none")

    def loglikelihoods(self, temperature: float = 1.0) -> torch.Tensor:
        """Sum of log p over each continuation's tokens, shape (continuations,)."""
        return torch.stack([span.sum() for span in self.token_logprobs(temperature).split(self.lengths)])

    def greedy(self) -> list[bool]:
        """For each continuation, whether every one of its tokens is the likeliest."""
        right = self.logits.detach().argmax(dim=-1) == self.tokens
        return [bool(span.all()) for span in right.split(self.lengths)]


class LikelihoodModel:
    """Runs :class:`Branches` through a causal language model under whatever mixture is active.

    Args:
        model: a ``transformers`` causal language model.
        share: compute a context once for all its continuations. None decides by the model: attention that obeys a given
            mask, without sliding windows.
    """

    def __init__(self, model: nn.Module, share: bool | None = None) -> None:
        self.model = model
        self.share = _can_share(model) if share is None else share
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]

    def batches(self, units: Sequence[Sequence[Branches]], micro_tokens: int) -> list[list[int]]:
        """Cut work into forward passes: rows of like length together, the longest first.

        Args:
            units: the work; what is in one unit stays in one pass.
            micro_tokens: at most so many tokens, padding included, in one pass; a single unit may exceed it.
        """
        widths = [max(map(self._width, unit)) for unit in units]
        order = sorted(range(len(units)), key=lambda i: (-widths[i], i))
        cut: list[list[int]] = []
        rows = positions = width = 0
        for i in order:
            more_rows = len(units[i]) if self.share else sum(len(item.continuations) for item in units[i])
            more_positions = sum(item.positions for item in units[i])
            rows, positions = rows + more_rows, positions + more_positions
            if not cut or rows * width > micro_tokens or positions * self.vocabulary > _LOGITS:
                cut.append([])
                rows, positions, width = more_rows, more_positions, widths[i]
            cut[-1].append(i)
        return cut

    def _width(self, item: Branches) -> int:
        return item.inputs if self.share else len(item.context) + max(map(len, item.continuations)) - 1

    def run(self, batch: Sequence[Branches]) -> Spans:
        """One forward pass; differentiable in z where gradients are enabled."""
        if self.share:
            return self._tree(batch)
        return self._rows([(item.context, continuation) for item in batch for continuation in item.continuations])

    def _tree(self, batch: Sequence[Branches]) -> Spans:
        left = max(len(item.context) for item in batch)
        width = left + max(item.inputs - len(item.context) for item in batch)
        ids = torch.full((len(batch), width), _PAD, dtype=torch.long)
        positions = torch.zeros_like(ids)
        branch = torch.full_like(ids, -1)
        rows: list[int] = []
        columns: list[int] = []
        for row, item in enumerate(batch):
            size = len(item.context)
            ids[row, left - size : left] = torch.tensor(item.context)
            positions[row, left - size : left] = torch.arange(size)
            branch[row, left - size : left] = 0
            at = left
            for number, continuation in enumerate(item.continuations, start=1):
                more = len(continuation) - 1
                rows.extend([row] * len(continuation))
                columns.extend([0, *range(at - left + 1, at - left + 1 + more)])
                ids[row, at : at + more] = torch.tensor(continuation[:-1], dtype=torch.long)
                positions[row, at : at + more] = torch.arange(size, size + more)
                branch[row, at : at + more] = number
                at += more
        query, key = branch.unsqueeze(2), branch.unsqueeze(1)
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        seen = causal & ((key == 0) | (key == query)) & (key >= 0)
        # A row of the mask without any key would give NaN; padding may see itself.
        seen |= torch.eye(width, dtype=torch.bool)
        device, dtype = self._device, next(self.model.parameters()).dtype
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)
        logits = self._logits(ids, left - 1, attention_mask=mask.to(device), position_ids=positions.to(device))
        return self._spans(logits, rows, columns, [c for item in batch for c in item.continuations])

    def _rows(self, batch: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> Spans:
        inputs = [torch.tensor((*context, *continuation)[:-1]) for context, continuation in batch]
        ids = nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=_PAD)
        low = min(len(context) for context, _ in batch) - 1
        rows = [row for row, (_, continuation) in enumerate(batch) for _ in continuation]
        columns = [len(context) - 1 - low + i for context, continuation in batch for i in range(len(continuation))]
        return self._spans(self._logits(ids, low), rows, columns, [continuation for _, continuation in batch])

    def _logits(self, ids: torch.Tensor, low: int, **kwargs: torch.Tensor) -> torch.Tensor:
        kept = {"logits_to_keep": ids.shape[1] - low} if self._keeps_logits else {}
        logits: torch.Tensor = self.model(input_ids=ids.to(self._device), use_cache=False, **kwargs, **kept).logits
        return logits if self._keeps_logits else logits[:, low:]

    def _spans(
        self, logits: torch.Tensor, rows: list[int], columns: list[int], continuations: Sequence[tuple[int, ...]]
    ) -> Spans:
        picked = logits[torch.tensor(rows, device=logits.device), torch.tensor(columns, device=logits.device)]
        tokens = torch.tensor([token for continuation in continuations for token in continuation], device=logits.device)
        return Spans(picked.float(), tokens, [len(continuation) for continuation in continuations])

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def _can_share(model: nn.Module) -> bool:
    config = model.config
    windows = [kind for kind in getattr(config, "layer_types", None) or [] if kind != "full_attention"]
    sliding = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    obeys = getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
    return getattr(config, "model_type", None) in _SHARING and obeys and not windows and not sliding
