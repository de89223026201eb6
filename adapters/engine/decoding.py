"""Decoding of one batch of prompts, which a row leaves when its answer ends.

No row joins a batch that runs: it would save steps only where more rows wait than a batch holds, and widens each step,
for the cache of a row that joins is as wide as that of the row which has run longest.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import transformers
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from t2.adapters.engine.base import GenerateRequest
from t2.adapters.engine.cache import keep_rows, let_rows_leave
from t2.core.errors import ArgumentError

_PAD = 0
_SET_HERE = frozenset(("max_length", "max_new_tokens", "pad_token_id", "use_cache"))
"""Fields of a generation configuration that every call sets itself."""
_WITHOUT_EFFECT = frozenset(("bos_token_id", "transformers_version", "_from_model_config"))
_OF_SAMPLING = frozenset(
    ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
)
"""Fields without effect on greedy decoding."""


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 1


_IMPLEMENTED: dict[str, Callable[[Any], bool]] = {
    "do_sample": lambda value: isinstance(value, bool),
    "temperature": lambda value: value == 1 or (isinstance(value, float) and value > 0),
    "top_k": lambda value: isinstance(value, int) and value >= 0,
    "top_p": _is_share,
    "min_p": _is_share,
    "repetition_penalty": lambda value: isinstance(value, float) and value > 0,
    "eos_token_id": lambda value: all(isinstance(end, int) for end in (value if isinstance(value, list) else [value])),
    # Models with a sliding window were once saved with it; ``generate`` takes it as unset.
    "cache_implementation": lambda value: value == "hybrid",
}
"""Fields that :class:`_Loop` obeys for each row by itself, with the values that it does so for."""

Leave = Callable[[torch.Tensor], None]
"""Told which rows of a batch remain, in their new order."""


def decodes_by_row(model: transformers.PreTrainedModel, kwargs: Mapping[str, Any]) -> bool:
    """Whether the loop here generates what ``transformers``' ``generate`` does, whichever rows share a batch.

    The model's generation configuration and the arguments are compared with a list of what the loop implements. A field
    that is not on it, or has a value that is not, must be at its default.

    Args:
        model: the model, with its generation configuration.
        kwargs: arguments of ``generate``.
    """
    mixin: Any = transformers.GenerationMixin
    kind: Any = type(model)
    if kind.generate is not mixin.generate or kind._sample is not mixin._sample or not _SET_HERE.isdisjoint(kwargs):
        return False
    configure: Any = transformers.GenerationConfig
    defaults = {**configure().to_dict(), **configure._get_default_generation_params()}
    config: Any = copy.deepcopy(model.generation_config)
    try:
        left_over = config.update(**kwargs)
    except (AttributeError, ImportError, TypeError, ValueError):
        return False
    if left_over:
        return False
    skipped = _SET_HERE | _WITHOUT_EFFECT | (frozenset() if config.do_sample else _OF_SAMPLING)
    for name, value in config.to_dict().items():
        # Fields of the file that ``transformers`` does not have are of other programs.
        if name in skipped or name not in defaults:
            continue
        if value is None and (name in _IMPLEMENTED or name not in kwargs):
            continue
        if value is False and defaults[name] is None:
            continue
        if value != defaults[name] and not (name in _IMPLEMENTED and _IMPLEMENTED[name](value)):
            return False
    return True


class Decoder:
    """Continues batches of prompts under whatever mixtures are active.

    Greedy decoding and plain sampling run token by token here: a row whose answer ends leaves the batch and its cache,
    and a row that samples draws from its own seed, so that its answer does not depend on the rows beside it. Prompts,
    arguments and processors of logits are prepared by ``transformers``' ``generate``, which also does whatever else is
    asked for (beams, constraints, …).

    Args:
        model: a decoder-only model.
        tokenizer: its tokenizer, used to see stop texts.
    """

    def __init__(self, model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._generator = cast(Callable[..., torch.Tensor], model.generate)

    def run(
        self, batch: Sequence[GenerateRequest], seeds: Sequence[int], leave: Leave | None = None
    ) -> list[tuple[int, ...]]:
        """Continue prompts that differ in their context and seed alone.

        Args:
            batch: the prompts; a single one where :meth:`rows_of` says that it is several rows.
            seeds: of sampling, one per prompt.
            leave: called whenever rows leave.

        Returns:
            For each the tokens of :class:`~t2.adapters.engine.base.Generated`.

        Raises:
            ArgumentError: ``transformers`` refuses the arguments.
        """
        first, device = batch[0], torch.device(self.model.device)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else _PAD
        width = max(len(request.context) for request in batch)
        ids = torch.full((len(batch), width), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, width - len(request.context) :] = torch.tensor(request.context, dtype=torch.long)
            mask[row, width - len(request.context) :] = 1
        loop = _Loop(_Stop(self.tokenizer, first.stop), self._ends(first.kwargs), seeds, first.max_new_tokens, leave)
        by_row = decodes_by_row(self.model, first.kwargs)
        more: dict[str, Any] = {"custom_generate": loop}
        if not by_row:
            more = {"stopping_criteria": transformers.StoppingCriteriaList([_RowStop(loop.stop, width)])}
        with seeded(seeds[0], device):
            try:
                out: Any = self._generator(
                    **{
                        # Both lengths are given, for the model's generation configuration may have either.
                        "max_length": width + first.max_new_tokens,
                        "max_new_tokens": None,
                        **first.kwargs,
                        **more,
                        "input_ids": ids.to(device),
                        "attention_mask": mask.to(device),
                        "pad_token_id": pad,
                        "use_cache": True,
                    }
                )
            except ValueError as error:  # transformers' own check of its arguments
                given = ", ".join(f"{name}={value!r}" for name, value in first.kwargs.items())
                raise ArgumentError(f"transformers refuses to generate with {given}: {error}") from error
        if by_row:
            return [tuple(tokens) for tokens in loop.answers]
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        return [loop.cut(tokens) for tokens in sequences[: len(batch), width:].tolist()]

    def rows_of(self, request: GenerateRequest) -> int:
        """Rows that ``generate`` makes of one prompt: its beams, or several answers."""
        config, counts = self.model.generation_config, []
        for name in ("num_beams", "num_return_sequences"):
            count = request.kwargs.get(name, getattr(config, name, None))
            counts.append(count if isinstance(count, int) else 1)
        return max(counts)

    def _ends(self, kwargs: Mapping[str, Any]) -> set[int]:
        given = kwargs.get("eos_token_id", self.model.generation_config.eos_token_id)
        return _as_set(given) | _as_set(self.tokenizer.eos_token_id)


class _Loop:
    """Decoding as ``generate`` does it, with rows that leave."""

    def __init__(
        self, stop: _Stop, ends: set[int], seeds: Sequence[int], max_new_tokens: int, leave: Leave | None
    ) -> None:
        self.stop = stop
        self.ends = ends
        self.max_new_tokens = max_new_tokens
        self.leave = leave
        self.answers: list[list[int]] = [[] for _ in seeds]
        self._generators = [torch.Generator().manual_seed(seed % (1 << 63)) for seed in seeds]
        # Request of each row that is left.
        self._rows = list(range(len(seeds)))
        self._done: set[int] = set()

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: transformers.StoppingCriteriaList,
        generation_config: transformers.GenerationConfig,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        cache = model_kwargs.get("past_key_values")
        shrinks = let_rows_leave(cache)
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
        outputs = model(**inputs, return_dict=True)
        optimised = getattr(model, "_optimize_model_for_decode", contextlib.nullcontext)
        with optimised():
            while True:
                model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
                logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
                del outputs
                scores = logits_processor(input_ids, logits)
                tokens = self._draw(scores) if generation_config.do_sample else scores.argmax(dim=-1)
                input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
                self._take(tokens.tolist())
                if len(self._done) == len(self.answers):
                    return input_ids
                kept = self._left() if shrinks else None
                if kept is not None:
                    index = torch.tensor(kept, device=input_ids.device)
                    model_kwargs = _kept_kwargs(model_kwargs, index, len(input_ids))
                    input_ids = input_ids[index]
                    logits_processor = _kept_processors(logits_processor, index)
                    if self.leave is not None:
                        self.leave(index)
                inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
                outputs = model(**inputs, return_dict=True)

    def _draw(self, scores: torch.Tensor) -> torch.Tensor:
        """One token per row, by the inverse of its distribution function at a number of the row's own generator."""
        drawn = [torch.rand((), dtype=torch.float64, generator=self._generators[row]) for row in self._rows]
        masses = torch.softmax(scores, dim=-1).double().cumsum(dim=-1)
        wanted = torch.stack(drawn).to(masses.device).unsqueeze(1) * masses[:, -1:]
        # Rounding may ask for all of the mass, which its last token reaches.
        last = (masses < masses[:, -1:]).sum(dim=-1)
        return torch.minimum(torch.searchsorted(masses, wanted, right=True).squeeze(1), last)

    def _take(self, tokens: list[int]) -> None:
        for row, token in zip(self._rows, tokens, strict=True):
            if row not in self._done:
                answer = self.answers[row]
                answer.append(token)
                if token in self.ends or len(answer) >= self.max_new_tokens or self.stop.ends(answer):
                    self._done.add(row)

    def cut(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """An answer that ``transformers`` generated, up to and with what ends it."""
        for count in range(1, len(tokens) + 1):
            if tokens[count - 1] in self.ends or self.stop.ends(tokens[:count]):
                return tuple(tokens[:count])
        return tuple(tokens)

    def _left(self) -> list[int] | None:
        """Places of the rows that are not done, in the order in which fewest move; None when no row has left."""
        places = [place for place, row in enumerate(self._rows) if row not in self._done]
        count = len(places)
        if count == len(self._rows):
            return None
        movers = [place for place in places if place >= count]
        index = [place if self._rows[place] not in self._done else movers.pop() for place in range(count)]
        self._rows = [self._rows[place] for place in index]
        return index


def _kept_kwargs(kwargs: dict[str, Any], index: torch.Tensor, rows: int) -> dict[str, Any]:
    kept = dict(kwargs)
    for name, value in kwargs.items():
        if name == "past_key_values":
            keep_rows(value, index)
        elif isinstance(value, torch.Tensor) and value.dim():
            if value.shape[0] == rows:
                kept[name] = value[index]
            elif value.dim() == 3 and value.shape[1] == rows:  # positions along several axes
                kept[name] = value[:, index]
    return kept


def _kept_processors(processors: Any, index: torch.Tensor) -> transformers.LogitsProcessorList:
    """The processors, where those that know of rows know of those that are left."""
    kept = transformers.LogitsProcessorList()
    for processor in processors:
        ignored = getattr(processor, "prompt_ignore_length", None)
        if isinstance(processor, RepetitionPenaltyLogitsProcessor) and isinstance(ignored, torch.Tensor):
            kept.append(RepetitionPenaltyLogitsProcessor(processor.penalty, ignored[index]))
        else:
            kept.append(processor)
    return kept


class _Stop:
    """Sees stop texts in answers.

    A token can end a stop text only if it holds the text's last character, or a part of a character; of the others
    the answer is not decoded.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.texts = [text for text in texts if text]
        # However an answer spells a stop text, every token holds a byte of it.
        self.window = max((len(text.encode()) for text in self.texts), default=0)
        self._lasts = {text[-1] for text in self.texts}
        # These may join or drop characters where tokens meet.
        self._always = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)) or any(
            last.isspace() for last in self._lasts
        )
        self._may: dict[int, bool] = {}

    def ends(self, answer: Sequence[int]) -> bool:
        """Whether an answer, of whose earlier tokens this was asked before, contains a stop text."""
        if not self.texts or not (self._always or self._may_end(answer[-1])):
            return False
        tail = self.tokenizer.decode(list(answer[-self.window :]))
        return any(text in tail for text in self.texts)

    def _may_end(self, token: int) -> bool:
        if token not in self._may:
            text = self.tokenizer.decode([token])
            self._may[token] = not text or "\N{REPLACEMENT CHARACTER}" in text or any(c in text for c in self._lasts)
        return self._may[token]


class _RowStop(transformers.StoppingCriteria):
    """Ends each row, or beam, when its text contains a stop text."""

    def __init__(self, stop: _Stop, prompt: int) -> None:
        self.stop = stop
        self.prompt = prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        done = [self.stop.ends(answer) for answer in input_ids[:, self.prompt :].tolist()]
        return torch.tensor(done, device=input_ids.device)


def _as_set(value: int | list[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)


@contextlib.contextmanager
def plain_sampling(model: transformers.PreTrainedModel) -> Iterator[None]:
    """Context in which the model's generation configuration says nothing but which tokens begin, end and pad texts."""
    own: Any = model.generation_config
    configure: Any = transformers.GenerationConfig
    tokens = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = configure(**tokens)
    try:
        yield
    finally:
        model.generation_config = own


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Context in which torch draws from ``seed``; its global generators are as before afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
