"""Log-likelihoods with gradients: many continuations of one context, and many contexts, in one row.

The choices of a question, or the sampled answers to a prompt, share their context. A row holds a context once and all
its continuations after it, then the next context, and a mask lets each token see its own context and continuation
alone. So a context is computed once and little is padded. Logits over the vocabulary are computed at continuations'
positions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_PAD = 0
_ROW = 256
"""Tokens of a packed row: long enough to pad little, short enough that attention to masked tokens costs little."""
_LOGITS = 1 << 26
"""Most logits held in float32 at once: 256 MB."""


@dataclass(frozen=True)
class Branches:
    """A context and the continuations that branch from it, as tokens; none of them is empty."""

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
        return torch.stack([span.sum() for span in torch.split(self.token_logprobs(temperature), self.lengths)])

    def greedy(self) -> list[bool]:
        """For each continuation, whether every one of its tokens is the likeliest."""
        right = self.logits.detach().argmax(dim=-1) == self.tokens
        return [bool(span.all()) for span in torch.split(right, self.lengths)]


@dataclass(frozen=True)
class Prefix:
    """What a model has computed of tokens that many contexts begin with.

    Attributes:
        length: number of tokens.
        layers: keys and values of each layer, shape (copies, heads, length, width); a copy for each mixture.
    """

    length: int
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def cache(self, copies: torch.Tensor) -> DynamicCache:
        """The cache of a batch that begins with it; ``copies``, shape (rows,), holds the copy of each row."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.layers):
            index = copies.to(keys.device)
            cache.update(keys[index], values[index], layer)
        return cache


class LikelihoodModel:
    """Runs :class:`Branches` through a causal language model under whatever mixture is active.

    Args:
        model: a ``transformers`` causal language model.
        share: pack rows as above, else give each continuation a row of its own. None decides by the model: one without
            sliding windows that gives a probe the same likelihoods either way obeys the mask and positions it is given.
    """

    def __init__(self, model: Any, share: bool | None = None) -> None:
        self.model = model
        self._share = share
        self._prefixes: bool | None = None
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])

    @property
    def share(self) -> bool:
        """Whether contexts are shared; the first use may run a probe, under the mixture that is then active."""
        if self._share is None:
            self._share = not _has_windows(self.model) and self._probe()
        return self._share

    @torch.no_grad()
    def _probe(self) -> bool:
        branches = Branches((1, 2, 3), ((4, 5), (6, 7, 8)))
        alone = self._rows([branches])
        try:
            shared = self._packed([branches], [[0]])
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False
        tolerance = 1e-3 if next(self.model.parameters()).dtype == torch.float32 else 0.1
        return torch.allclose(shared.loglikelihoods(), alone.loglikelihoods(), atol=tolerance)

    @property
    def prefixes(self) -> bool:
        """Whether :meth:`prefix` can be used; the first use may run a probe, as :attr:`share`."""
        if self._prefixes is None:
            self._prefixes = self.share and self._probe_prefix()
        return self._prefixes

    @torch.no_grad()
    def _probe_prefix(self) -> bool:
        whole, rest = Branches((1, 2, 3, 4), ((5,), (6, 7, 8))), Branches((3, 4), ((5,), (6, 7, 8)))
        plain = self._packed([whole], [[0]])
        try:
            reused = self._packed([rest], [[0]], self.prefix((1, 2)), [0])
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
            return False
        tolerance = 1e-3 if next(self.model.parameters()).dtype == torch.float32 else 0.1
        return torch.allclose(reused.loglikelihoods(), plain.loglikelihoods(), atol=tolerance)

    @torch.no_grad()
    def prefix(self, tokens: Sequence[int], copies: int = 1) -> Prefix:
        """Compute tokens that contexts begin with, once for each of the mixtures that are active.

        Args:
            tokens: at least one.
            copies: rows of the forward pass; row i is of the i-th mixture.

        Raises:
            TypeError: the model keeps something else than keys and values of all tokens.
        """
        ids = torch.tensor([list(tokens)] * copies)
        cache = self._forward(ids, torch.tensor([0]), use_cache=True).past_key_values
        if type(cache) is not DynamicCache:
            raise TypeError(f"a {type(cache).__name__} cannot be shared")
        layers = []
        for layer in cache.layers:
            if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
                raise TypeError(f"a {type(layer).__name__} cannot be shared")
            layers.append((layer.keys, layer.values))
        return Prefix(len(tokens), tuple(layers))

    def batches(
        self, units: Sequence[Sequence[Branches]], micro_tokens: int, most_units: int | None = None
    ) -> list[list[int]]:
        """Cut work into forward passes, with units of like length together, the longest first.

        Args:
            units: the work; what is in one unit stays in one pass.
            micro_tokens: at most so many tokens in one pass; a single unit may exceed it.
            most_units: at most so many units in one pass.
        """
        longest = [max(map(self._width, unit)) for unit in units]
        order = sorted(range(len(units)), key=lambda i: (-longest[i], i))
        cut: list[list[int]] = []
        tokens = positions = width = 0
        for i in order:
            opening = not cut
            width = longest[i] if opening else width
            more_tokens = self._tokens(units[i], width)
            more_positions = sum(item.positions for item in units[i])
            full = tokens + more_tokens > micro_tokens or (positions + more_positions) * self.vocabulary > _LOGITS
            if opening or full or len(cut[-1]) == most_units:
                cut.append([])
                width = longest[i]
                tokens, positions = self._tokens(units[i], width), more_positions
            else:
                tokens, positions = tokens + more_tokens, positions + more_positions
            cut[-1].append(i)
        return cut

    def tokens(self, units: Sequence[Sequence[Branches]]) -> int:
        """Input tokens of a pass, as :meth:`batches` counts them."""
        width = max(self._width(item) for unit in units for item in unit)
        return sum(self._tokens(unit, width) for unit in units)

    def _width(self, item: Branches) -> int:
        return item.inputs if self.share else len(item.context) + max(map(len, item.continuations)) - 1

    def _tokens(self, unit: Sequence[Branches], width: int) -> int:
        if self.share:
            return sum(item.inputs for item in unit)
        return width * sum(len(item.continuations) for item in unit)

    def rows(self, batch: Sequence[Branches], groups: Sequence[int]) -> list[list[int]]:
        """What :meth:`run` may put into one row each: items of one group; without sharing, every item alone.

        Args:
            batch: the work of one pass; without sharing each item has one continuation.
            groups: for each item its group, for example its mixture.
        """
        if not self.share:
            return [[i] for i in range(len(batch))]
        packed = []
        for group in dict.fromkeys(groups):
            members = [i for i, own in enumerate(groups) if own == group]
            packed += [[members[k] for k in row] for row in _pack([batch[i].inputs for i in members])]
        return packed

    def run(
        self,
        batch: Sequence[Branches],
        rows: Sequence[Sequence[int]] | None = None,
        prefix: Prefix | None = None,
        copies: Sequence[int] | None = None,
    ) -> Spans:
        """One forward pass; differentiable in z where gradients are enabled.

        Args:
            batch: the work.
            rows: the items of each row, from :meth:`rows`; None packs them all alike.
            prefix: what all contexts begin with, and do not hold; only where :attr:`prefixes` is true.
            copies: for each row the prefix's copy; None means the first.
        """
        if not self.share:
            return self._rows(batch)
        rows = rows if rows is not None else self.rows(batch, [0] * len(batch))
        return self._packed(batch, rows, prefix, copies or [0] * len(rows))

    def _packed(
        self,
        batch: Sequence[Branches],
        rows: Sequence[Sequence[int]],
        prefix: Prefix | None = None,
        copies: Sequence[int] = (),
    ) -> Spans:
        width = max(sum(batch[i].inputs for i in row) for row in rows)
        ids = torch.full((len(rows), width), _PAD, dtype=torch.long)
        positions = torch.zeros_like(ids)
        # Of each token: its context's number in the row, and its branch there (0 is the context itself).
        owner = torch.full_like(ids, -1)
        branch = torch.zeros_like(ids)
        places: list[list[int]] = [[] for _ in batch]
        for r, row in enumerate(rows):
            at = 0
            for i in row:
                context, continuations = batch[i].context, batch[i].continuations
                size = len(context)
                owner[r, at : at + batch[i].inputs] = i
                ids[r, at : at + size] = torch.tensor(context)
                positions[r, at : at + size] = torch.arange(size)
                at += size
                last = r * width + at - 1
                for number, continuation in enumerate(continuations, start=1):
                    more = len(continuation) - 1
                    ids[r, at : at + more] = torch.tensor(continuation[:-1], dtype=torch.long)
                    positions[r, at : at + more] = torch.arange(size, size + more)
                    branch[r, at : at + more] = number
                    places[i] += [last, *range(r * width + at, r * width + at + more)]
                    at += more
        same = owner.unsqueeze(2) == owner.unsqueeze(1)
        query, key = branch.unsqueeze(2), branch.unsqueeze(1)
        seen = same & ((key == 0) | (key == query)) & torch.ones(width, width, dtype=torch.bool).tril()
        kwargs: dict[str, Any] = {"use_cache": False}
        if prefix is not None:
            seen = torch.cat([torch.ones(len(rows), width, prefix.length, dtype=torch.bool), seen], dim=2)
            positions += prefix.length
            kwargs = {"use_cache": True, "past_key_values": prefix.cache(torch.tensor(copies))}
        dtype = self.model.get_input_embeddings().weight.dtype
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)
        # Continuations of one context begin at one place.
        once = {place: i for i, place in enumerate(dict.fromkeys(place for found in places for place in found))}
        logits = self._logits(ids, torch.tensor(list(once)), attention_mask=mask, position_ids=positions, **kwargs)
        again = [once[place] for found in places for place in found]
        if len(once) < len(again):
            logits = logits[torch.tensor(again, device=logits.device)]
        return _spans(logits, [continuation for item in batch for continuation in item.continuations])

    def _rows(self, batch: Sequence[Branches]) -> Spans:
        pairs = [(item.context, continuation) for item in batch for continuation in item.continuations]
        inputs = [torch.tensor((*context, *continuation)[:-1]) for context, continuation in pairs]
        ids = nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=_PAD)
        kept = [
            row * ids.shape[1] + len(context) - 1 + i
            for row, (context, continuation) in enumerate(pairs)
            for i in range(len(continuation))
        ]
        return _spans(self._logits(ids, torch.tensor(kept)), [continuation for _, continuation in pairs])

    def _logits(self, ids: torch.Tensor, kept: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Logits at some places of the flattened (rows, columns), shape (places, vocabulary), float32."""
        logits: torch.Tensor = self._forward(ids, kept, **{"use_cache": False, **kwargs}).logits
        return logits[0].float()

    def _forward(self, ids: torch.Tensor, kept: torch.Tensor, **kwargs: Any) -> Any:
        """What the model gives for some places.

        The hidden states are picked where they enter the output embedding, so whatever the model does to its logits
        after it is done to these.
        """
        device = self.model.get_input_embeddings().weight.device

        def pick(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].flatten(0, 1)[kept.to(args[0].device)].unsqueeze(0), *args[1:])

        handle = self.model.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            moved = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in kwargs.items()}
            return self.model(input_ids=ids.to(device), **moved)
        finally:
            handle.remove()


def _pack(sizes: Sequence[int]) -> list[list[int]]:
    """Rows of items, first fit: the largest first, each into the first row with room."""
    room = max(_ROW, max(sizes))
    rows: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        row = next((r for r, space in enumerate(left) if space >= sizes[i]), None)
        if row is None:
            rows.append([])
            left.append(room)
            row = len(rows) - 1
        rows[row].append(i)
        left[row] -= sizes[i]
    return rows


def _spans(logits: torch.Tensor, continuations: Sequence[tuple[int, ...]]) -> Spans:
    tokens = torch.tensor([token for continuation in continuations for token in continuation], device=logits.device)
    return Spans(logits, tokens, [len(continuation) for continuation in continuations])


def _has_windows(model: Any) -> bool:
    config = model.config.get_text_config(decoder=True)
    windows = [kind for kind in getattr(config, "layer_types", None) or [] if kind != "full_attention"]
    sliding = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return bool(windows) or sliding
