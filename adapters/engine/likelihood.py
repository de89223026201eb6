"""Log-likelihoods with gradients: many continuations of one context, and many contexts, in one row.

The choices of a question, or the sampled answers to a prompt, share their context. A row holds a context once and all
its continuations after it, then the next context, and a mask lets each token see its own context and continuation
alone. So a context is computed once and little is padded. Logits over the vocabulary are computed at continuations'
positions only.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from t2.adapters.engine.batch_proofs import Lengths, ProbeTokens, Proofs, agree, short_length

Layout = Literal["packed", "padded", "alone"]
"""Layout of a pass: several texts per row, one text per row, or one text per pass."""

_PAD = 0
_ROW = 256
"""Tokens of a packed row: long enough to pad little, short enough that attention to masked tokens costs little."""
_COMPARED = 3
"""Positions that a probe compares at each end of a continuation."""
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

    Contexts are packed into rows as above; else rows of one text each are padded to the same length; else each text is
    computed in a separate pass, as lm-eval does at batch size 1. A probe as long as the texts selects the layout; see
    :mod:`t2.adapters.engine.batch_proofs`.

    Args:
        model: a ``transformers`` causal language model.
        share: whether contexts may be packed.
    """

    def __init__(self, model: Any, share: bool = True) -> None:
        self.model = model
        self._share = share
        self._lengths = Lengths(model)
        self._packs = Proofs("packing", self._probe_packed)
        self._reuses = Proofs("shared prefix", self._probe_prefix)
        self._pads = Proofs("padding", self._probe_padded)
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])

    def layout(self, items: Sequence[Branches], prefix: int = 0) -> Layout:
        """Return the layout of some work in one pass; may run a probe under the active mixture.

        Args:
            items: the work.
            prefix: length of the :class:`Prefix` that all contexts begin with; above 0 only if :meth:`reuses` is true.
        """
        if prefix:
            return "packed"
        return self._choose_layout(max(map(_longest, items)), max(item.inputs for item in items))

    def _choose_layout(self, text: int, row: int) -> Layout:
        """Return the layout of texts and packed rows of at most these lengths."""
        if self._share and self._packs.hold(self._lengths.probe(text), self._lengths.probe(max(_ROW, row))):
            return "packed"
        return "padded" if self._pads.hold(self._lengths.probe(text)) else "alone"

    def packs(self, item: Branches) -> bool:
        """Whether a context is computed once for all its continuations, packed with other contexts."""
        return self._choose_layout(_longest(item), item.inputs) == "packed"

    def reuses(self, items: Sequence[Branches], prefix: int) -> bool:
        """Whether contexts may use a :class:`Prefix` of their first ``prefix`` tokens.

        Args:
            items: the work, with the tokens of the prefix.
            prefix: number of tokens that all contexts begin with.
        """
        row = prefix + max(_ROW, *(item.inputs - prefix for item in items))
        lengths = self._lengths.probe(max(map(_longest, items))), self._lengths.probe(row)
        return self._share and self._packs.hold(*lengths) and self._reuses.hold(*lengths)

    def _probe_packed(self, text: int, row: int) -> bool:
        return self._packing_agrees(text, row, 0)

    def _probe_prefix(self, text: int, row: int) -> bool:
        return text > 1 and self._packing_agrees(text, row, text // 2)

    def _packing_agrees(self, text: int, row: int, prefix: int) -> bool:
        """Whether a full row gives the logits of the same texts alone.

        The long text is split between the row's first context and its last branch, so that its parts are as far apart
        as possible. Short texts before and after it show whether anything leaks into them.

        Args:
            text: input tokens of the long text.
            row: tokens of the row, including the prefix.
            prefix: number of common first tokens, which are computed beforehand.
        """
        tokens = ProbeTokens(self.model)
        long = tokens.draw(text + 1)
        size = min(text, max(prefix + 1, (text + 1) // 2))  # of its context
        begin = long[:prefix]
        short = [Branches((*begin, *tokens.draw(2)), (tokens.draw(1), tokens.draw(2))) for _ in range(2)]
        around = sum(item.inputs - prefix for item in short)
        items, rows = list(short), [[0, 1]]
        if row >= text + around:
            items.append(_fill_row(long, size, row - around, tokens))
            rows = [[0, 2, 1]]
        else:
            items.append(_fill_row(long, size, row, tokens))
            rows = [[2]]
            if row - around > size:
                items.append(Branches(long[:size], (long[size : row - around + 1],)))
                rows += [[0, 3, 1]]
            else:
                rows += [[0, 1]]
        if prefix:
            rest = [Branches(item.context[prefix:], item.continuations) for item in items]
            packed = self._packed(rest, rows, self.prefix(begin), [0] * len(rows))
        else:
            packed = self._packed(items, rows)
        # The short texts come last: some models scale positions by the longest text so far.
        expected = self._single(long, size)
        spans = iter(torch.split(packed.logits, packed.lengths))
        pairs = []
        for number, item in enumerate(items):
            for continuation in item.continuations:
                found, whole = next(spans), (*item.context, *continuation)
                if number < len(short):
                    pairs.append((found, self._single(whole, len(item.context))))
                elif whole == long[: len(whole)]:
                    pairs.append((found, expected[: len(continuation)]))
        return self._all_agree(pairs)

    def _probe_padded(self, text: int) -> bool:
        tokens = ProbeTokens(self.model)
        texts = [tokens.draw(text + 1), tokens.draw(short_length(text) + 1)]
        found = self._rows([Branches(own[:1], (own[1:],)) for own in texts])
        pairs = list(
            zip(torch.split(found.logits, found.lengths), [self._single(own, 1) for own in texts], strict=True)
        )
        return self._all_agree(pairs)

    def _all_agree(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> bool:
        dtype = self.model.get_input_embeddings().weight.dtype
        return all(
            agree(one, other, dtype)
            for found, wanted in pairs
            for one, other in zip(_first_and_last(found), _first_and_last(wanted), strict=True)
        )

    def _alone(self, batch: Sequence[Branches]) -> Spans:
        """Run each text in a separate pass."""
        texts = [(item.context, continuation) for item in batch for continuation in item.continuations]
        logits = [self._single((*context, *continuation), len(context)).float() for context, continuation in texts]
        return _spans(torch.cat(logits), [continuation for _, continuation in texts])

    def _single(self, tokens: Sequence[int], context: int) -> torch.Tensor:
        """Logits of a continuation computed as in lm-eval, shape (tokens − context, vocabulary)."""
        # Gradient checkpointing computes activations again and would append them to the cache twice.
        cached = torch.is_grad_enabled() and "use_cache" in inspect.signature(self.model.forward).parameters
        kwargs = {"use_cache": False} if cached else {}
        ids = torch.tensor([list(tokens[:-1])], device=self.model.get_input_embeddings().weight.device)
        logits: torch.Tensor = self.model(input_ids=ids, **kwargs).logits
        return logits[0, context - 1 :]

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
        self,
        units: Sequence[Sequence[Branches]],
        micro_tokens: int,
        most_units: int | None = None,
        prefix: int = 0,
    ) -> list[list[int]]:
        """Cut work into forward passes, grouped by layout and length, the longest first.

        Args:
            units: the work; what is in one unit stays in one pass.
            micro_tokens: at most so many tokens in one pass; a single unit may exceed it.
            most_units: at most so many units in one pass.
            prefix: see :meth:`layout`.
        """
        longest = sorted(range(len(units)), key=lambda i: (-max(map(_longest, units[i])), i))
        of_layout: dict[Layout, list[int]] = {"packed": [], "padded": [], "alone": []}
        for i in longest:
            unit = units[i]
            row = max(item.inputs for item in unit)
            of_layout["packed" if prefix else self._choose_layout(max(map(_longest, unit)), row)].append(i)
        cut: list[list[int]] = [[i] for i in of_layout["alone"]]
        for layout in ("padded", "packed"):
            cut = self._cut(units, of_layout[layout], layout, micro_tokens, most_units) + cut
        return cut

    def _cut(
        self,
        units: Sequence[Sequence[Branches]],
        indices: Sequence[int],
        layout: Layout,
        micro_tokens: int,
        most_units: int | None,
    ) -> list[list[int]]:
        longest = {i: max(_width(item, layout) for item in units[i]) for i in indices}
        order = sorted(indices, key=lambda i: (-longest[i], i))
        cut: list[list[int]] = []
        tokens = positions = width = 0
        for i in order:
            opening = not cut
            width = longest[i] if opening else width
            more_tokens = _tokens(units[i], layout, width)
            more_positions = sum(item.positions for item in units[i])
            full = tokens + more_tokens > micro_tokens or (positions + more_positions) * self.vocabulary > _LOGITS
            if opening or full or len(cut[-1]) == most_units:
                cut.append([])
                width = longest[i]
                tokens, positions = _tokens(units[i], layout, width), more_positions
            else:
                tokens, positions = tokens + more_tokens, positions + more_positions
            cut[-1].append(i)
        return cut

    def tokens(self, units: Sequence[Sequence[Branches]]) -> int:
        """Input tokens of a pass, as :meth:`batches` counts them."""
        layout = self.layout([item for unit in units for item in unit])
        width = max(_width(item, layout) for unit in units for item in unit)
        return sum(_tokens(unit, layout, width) for unit in units)

    def rows(self, batch: Sequence[Branches], groups: Sequence[int], prefix: int = 0) -> list[list[int]]:
        """Return the items of each row: packed by group, or one item per row without packing.

        Args:
            batch: the work of one pass; without packing each item has one continuation.
            groups: for each item its group, for example its mixture.
            prefix: see :meth:`layout`.
        """
        if self.layout(batch, prefix) != "packed":
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
        """Run one pass; differentiable in z if gradients are enabled.

        Args:
            batch: the work.
            rows: the items of each row, from :meth:`rows`; None packs them all alike.
            prefix: tokens removed from the start of all contexts; only if :meth:`reuses` is true.
            copies: for each row the prefix's copy; None means the first.
        """
        layout = self.layout(batch, prefix.length if prefix is not None else 0)
        if layout == "alone":
            return self._alone(batch)
        if layout == "padded":
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


def _longest(item: Branches) -> int:
    """Input tokens of the context with its longest continuation."""
    return len(item.context) + max(map(len, item.continuations)) - 1


def _width(item: Branches, layout: Layout) -> int:
    return item.inputs if layout == "packed" else _longest(item)


def _tokens(unit: Sequence[Branches], layout: Layout, width: int) -> int:
    if layout == "packed":
        return sum(item.inputs for item in unit)
    return width * sum(len(item.continuations) for item in unit)


def _fill_row(long: tuple[int, ...], size: int, row: int, tokens: ProbeTokens) -> Branches:
    """Build a context of ``size`` tokens with branches that fill a row.

    The last branch is the rest of the long text.
    """
    last = long[size:]
    branch = len(last) - 1
    left = row - size - branch
    others = []
    while branch and left > 0:
        others.append(tokens.draw(min(branch, left) + 1))
        left -= min(branch, left)
    return Branches(long[:size], (*others, last))


def _first_and_last(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits at the first and at the last positions: leaks and windows show there."""
    return logits[:_COMPARED], logits[-_COMPARED:]
