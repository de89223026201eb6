"""Proofs that a model gives a batch the logits that it gives each text alone, at the lengths at hand.

A model may compute otherwise in a batch: it may ignore the mask of padding (recurrent layers), count a window by places
in a row, hold a table for so many places and no more, or scale its positions by the longest row. No list of models
knows them all, so a probe of random tokens compares both ways of computing. It is as long as the texts at hand, since
a window only shows beyond its end.
"""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers

from t2.adapters.engine.base import GenerateRequest
from t2.adapters.engine.batching import out_of_memory
from t2.adapters.engine.decoding import Decoder

_log = logging.getLogger(__name__)
_SHORTEST = 16
"""Shortest length of a probe that is not a length of the model's own."""
_SHORT = 3
_STEPS = 4
"""Tokens that a probe of generation generates."""
_WINDOW = re.compile(r"window|sliding|local|chunk|block|attention_types|position|max_seq|n_ctx", re.IGNORECASE)
_FLOAT32_ERROR = 1e-4
"""Largest relative error of logits in float32; other dtypes have a multiple of their rounding error."""


def integers(config: object, name: str = "") -> Iterator[tuple[str, int]]:
    """Every integer of a configuration with its name, those in lists and parts of it included."""
    if isinstance(config, transformers.PretrainedConfig):
        config = vars(config)
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from integers(value, str(key) if isinstance(key, str) else name)
    elif isinstance(config, (list, tuple, set)):
        for value in config:
            yield from integers(value, name)
    elif isinstance(config, (int, float)) and not isinstance(config, bool) and config == config // 1:
        yield name, int(config)


class Lengths:
    """Lengths at which a model may begin to compute otherwise.

    Args:
        model: the model.

    Attributes:
        windows: those whose name in the configuration is that of a window or limit, ascending.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        named = [(name, value) for name, value in integers(model.config) if value > 1]
        self.windows = sorted({value for name, value in named if _WINDOW.search(name)})
        # Tables of masks and positions may have a size that no configuration names.
        sizes = {size for buffer in model.buffers() for size in buffer.shape if size > 1}
        self._all = sorted(sizes | {value for _, value in named})

    def probe(self, length: int) -> int:
        """Length of the probe for texts of at most ``length``: the next power of two, or the model's own next length.

        A probe never crosses a length that the texts at hand do not cross.
        """
        power = max(_SHORTEST, 1 << max(0, length - 1).bit_length())
        return min([power, *(own for own in self._all if own >= length)])


class Proofs:
    """Results of a probe by lengths, in memory.

    Args:
        what: what is proven, for the log.
        probe: runs it at some lengths.
        ordered: what holds at some lengths holds at shorter ones.
    """

    def __init__(self, what: str, probe: Callable[..., bool], ordered: bool = True) -> None:
        self._what = what
        self._probe = probe
        self._implied_by = _all_at_most if ordered else operator.eq
        self._held: list[tuple[int, ...]] = []
        self._failed: list[tuple[int, ...]] = []

    def hold(self, *lengths: int) -> bool:
        """Whether the probe holds at these lengths; runs it where that does not follow from earlier ones."""
        if any(self._implied_by(lengths, held) for held in self._held):
            return True
        if any(self._implied_by(failed, lengths) for failed in self._failed):
            return False
        holds = self._run(lengths)
        (self._held if holds else self._failed).append(lengths)
        return holds

    @torch.no_grad()
    def _run(self, lengths: tuple[int, ...]) -> bool:
        try:
            return self._probe(*lengths)
        except Exception as error:  # noqa: BLE001 (models raise anything where a mask or a cache does not suit them)
            level = logging.WARNING if out_of_memory(error) else logging.DEBUG
            _log.log(level, "no %s at lengths %s: %r", self._what, lengths, error)
            return False


class ProbeTokens:
    """Random tokens of a model's vocabulary, always the same, without those that its configuration names."""

    def __init__(self, model: Any) -> None:
        named = {value for name, value in integers(model.config) if "token" in name}
        size = int(model.get_input_embeddings().weight.shape[0])
        self._tokens = [token for token in range(size) if token not in named] or list(range(size))
        self._generator = torch.Generator().manual_seed(0)

    def draw(self, count: int) -> tuple[int, ...]:
        """So many tokens; the next call draws others."""
        index = torch.randint(len(self._tokens), (count,), generator=self._generator)
        return tuple(self._tokens[i] for i in index.tolist())


def shorter(length: int) -> int:
    """Length of a short text beside one of ``length``."""
    return max(1, min(_SHORT, length // 2))


def agree(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether logits, shape (…, vocabulary), give the same probabilities up to the rounding of a model's dtype."""
    one, other = (torch.log_softmax(logits.float(), dim=-1).clamp_min(-60) for logits in (found, expected))
    spread = (other - other.mean(dim=-1, keepdim=True)).norm()
    tolerance = _FLOAT32_ERROR if dtype in (torch.float32, torch.float64) else 8 * torch.finfo(dtype).eps
    return bool((one - other).norm() <= tolerance * spread)


class GenerationProofs:
    """Proofs that prompts in one batch are continued as each of them alone.

    Args:
        decoder: continues batches; its model is asked under whatever mixture is active.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._lengths = Lengths(decoder.model)
        self._padded = Proofs("batch with padding", lambda length: self._probe_prompts(length, True))
        self._equal = Proofs("batch", lambda length: self._probe_prompts(length, False))
        # Beside the probes of whole prompts: answers that grow over a window of the model.
        self._crossing: dict[bool, Proofs] = {True: self._crossed(True), False: self._crossed(False)}

    def hold(self, prompts: Iterable[int], new_tokens: int) -> bool:
        """Whether prompts of these lengths may share a batch.

        Args:
            prompts: number of tokens of each.
            new_tokens: number of tokens generated at most.
        """
        sizes = set(prompts)
        longest = max(sizes, default=0)
        padded = len(sizes) > 1
        if not (self._padded if padded else self._equal).hold(self._lengths.probe(longest)):
            return False
        windows = [own for own in self._lengths.windows if _STEPS <= own < longest + new_tokens]
        return all(self._crossing[padded].hold(own) for own in windows)

    def _crossed(self, padded: bool) -> Proofs:
        return Proofs("answers over a window", lambda w: self._probe(w - _STEPS // 2, padded), ordered=False)

    def _probe_prompts(self, length: int, padded: bool) -> bool:
        # Neither the prompt nor its answer crosses a window that the prompts at hand do not cross.
        return self._probe(max(2, length - _STEPS) if length in self._lengths.windows else length, padded)

    def _probe(self, length: int, padded: bool) -> bool:
        model = self._decoder.model
        other = shorter(length) if padded else length
        tokens = ProbeTokens(model)
        prompts = [tokens.draw(length), tokens.draw(other)]
        together = self._logits(prompts)
        for prompt, own in zip(prompts, together, strict=True):
            (alone,) = self._logits([prompt])
            for (token, found), (wanted, expected) in zip(own, alone, strict=False):
                if not agree(found, expected, model.dtype):
                    return False
                if token != wanted:  # two tokens as likely as each other up to rounding
                    break
        return True

    def _logits(self, prompts: Sequence[tuple[int, ...]]) -> list[list[tuple[int, torch.Tensor]]]:
        """Tokens of the answer to each prompt, and the logits that each comes from, shape (vocabulary,)."""
        order = list(range(len(prompts)))
        found: list[list[torch.Tensor]] = [[] for _ in prompts]

        def note(_: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for row, logits in zip(order, output.logits[:, -1].float().clone(), strict=True):
                found[row].append(logits)

        def leave(index: torch.Tensor) -> None:
            order[:] = [order[i] for i in index.tolist()]

        handle = self._decoder.model.register_forward_hook(note)
        try:
            requests = [GenerateRequest(prompt, _STEPS, (), {"do_sample": False}) for prompt in prompts]
            answers = self._decoder.run(requests, [0] * len(prompts), leave)
        finally:
            handle.remove()
        return [list(zip(answer, logits, strict=False)) for answer, logits in zip(answers, found, strict=True)]


def _all_at_most(some: tuple[int, ...], others: tuple[int, ...]) -> bool:
    return all(one <= other for one, other in zip(some, others, strict=True))
