"""Probes that check that a model returns the same logits for a batch as for each text alone.

A model may compute differently in a batch: it may ignore the padding mask (recurrent layers), count a window by
positions in the row, hold a position table of limited size, or scale its positions by the longest row. No list of
models is complete, so a probe of random tokens compares the batch with single texts. The probe is as long as the texts
to be answered, because a window has no effect below its size.
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
"""Smallest power of two that is used as the length of a probe."""
_SHORT = 3
"""Most tokens of the short text beside the long one of a probe."""
_STEPS = 4
"""Tokens that a probe of generation generates."""
_WINDOW = re.compile(r"window|sliding|local|chunk|block|attention_types|position|max_seq|n_ctx", re.IGNORECASE)
_FLOAT32_ERROR = 1e-4
"""Largest relative error of float32 logits; other dtypes use a multiple of their epsilon."""


def integers(config: object, name: str = "") -> Iterator[tuple[str, int]]:
    """Yield every integer of a configuration with its name, nested parts and lists included."""
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
    """Lengths at which a model may begin to compute differently.

    Args:
        model: the model.

    Attributes:
        windows: lengths that the configuration names as a window or a limit, ascending.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        named = [(name, value) for name, value in integers(model.config) if value > 1]
        self.windows = sorted({value for name, value in named if _WINDOW.search(name)})
        # Mask and position tables may have sizes that no configuration names.
        sizes = {size for buffer in model.buffers() for size in buffer.shape if size > 1}
        self._all = sorted(sizes | {value for _, value in named})

    def probe(self, length: int) -> int:
        """Return the length of the probe for texts of at most ``length`` tokens.

        This is the next power of two or the next of the model's lengths, whichever is smaller, so that a probe never
        crosses a length that the texts do not cross.
        """
        power = max(_SHORTEST, 1 << max(0, length - 1).bit_length())
        return min([power, *(own for own in self._all if own >= length)])


class Proofs:
    """In-memory results of a probe, by lengths.

    Args:
        what: name of the property, for the log.
        probe: runs the probe at the given lengths.
        ordered: whether a result at some lengths implies the same result at short_length ones.
    """

    def __init__(self, what: str, probe: Callable[..., bool], ordered: bool = True) -> None:
        self._what = what
        self._probe = probe
        self._implied_by = _all_at_most if ordered else operator.eq
        self._held: list[tuple[int, ...]] = []
        self._failed: list[tuple[int, ...]] = []

    def hold(self, *lengths: int) -> bool:
        """Whether the probe passes at these lengths; run only if earlier results do not imply it."""
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
        except Exception as error:  # noqa: BLE001 (models raise any exception for a mask or cache they do not support)
            level = logging.WARNING if out_of_memory(error) else logging.DEBUG
            _log.log(level, "probe of %s failed at lengths %s: %r", self._what, lengths, error)
            return False


class ProbeTokens:
    """Reproducible random tokens of a model's vocabulary, without its special tokens."""

    def __init__(self, model: Any) -> None:
        named = {value for name, value in integers(model.config) if "token" in name}
        size = int(model.get_input_embeddings().weight.shape[0])
        self._tokens = [token for token in range(size) if token not in named] or list(range(size))
        self._generator = torch.Generator().manual_seed(0)

    def draw(self, count: int) -> tuple[int, ...]:
        """Draw ``count`` tokens; every call returns different ones."""
        index = torch.randint(len(self._tokens), (count,), generator=self._generator)
        return tuple(self._tokens[i] for i in index.tolist())


def short_length(length: int) -> int:
    """Length of the short text in a probe whose long text has ``length`` tokens."""
    return max(1, min(_SHORT, length // 2))


def agree(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether logits, shape (…, vocabulary), give equal probabilities up to rounding in a dtype."""
    one, other = (torch.log_softmax(logits.float(), dim=-1).clamp_min(-60) for logits in (found, expected))
    spread = (other - other.mean(dim=-1, keepdim=True)).norm()
    tolerance = _FLOAT32_ERROR if dtype in (torch.float32, torch.float64) else 8 * torch.finfo(dtype).eps
    return bool((one - other).norm() <= tolerance * spread)


class GenerationProofs:
    """Probes that check that a batch of prompts gets the same continuations as single prompts.

    Args:
        decoder: continues batches, under the mixture that is active.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._lengths = Lengths(decoder.model)
        self._padded = Proofs("batch with padding", lambda length: self._probe_prompts(length, True))
        self._equal = Proofs("batch", lambda length: self._probe_prompts(length, False))
        # In addition to the prompts: answers that grow past one of the model's windows.
        self._crossing: dict[bool, Proofs] = {True: self._window_proofs(True), False: self._window_proofs(False)}

    def hold(self, prompts: Iterable[int], new_tokens: int) -> bool:
        """Whether prompts of these lengths may share a batch.

        Args:
            prompts: number of tokens of each.
            new_tokens: largest number of generated tokens.
        """
        sizes = set(prompts)
        longest = max(sizes, default=0)
        padded = len(sizes) > 1
        if not (self._padded if padded else self._equal).hold(self._lengths.probe(longest)):
            return False
        windows = [own for own in self._lengths.windows if _STEPS <= own < longest + new_tokens]
        return all(self._crossing[padded].hold(own) for own in windows)

    def _window_proofs(self, padded: bool) -> Proofs:
        return Proofs("answers that cross a window", lambda w: self._probe(w - _STEPS // 2, padded), ordered=False)

    def _probe_prompts(self, length: int, padded: bool) -> bool:
        # Neither the prompt nor its answer may cross a window that the real prompts do not cross.
        return self._probe(max(2, length - _STEPS) if length in self._lengths.windows else length, padded)

    def _probe(self, length: int, padded: bool) -> bool:
        model = self._decoder.model
        other = short_length(length) if padded else length
        tokens = ProbeTokens(model)
        prompts = [tokens.draw(length), tokens.draw(other)]
        together = self._logits(prompts)
        for prompt, own in zip(prompts, together, strict=True):
            (alone,) = self._logits([prompt])
            for (token, found), (wanted, expected) in zip(own, alone, strict=False):
                if not agree(found, expected, model.dtype):
                    return False
                if token != wanted:  # the two most likely tokens differ only by rounding
                    break
        return True

    def _logits(self, prompts: Sequence[tuple[int, ...]]) -> list[list[tuple[int, torch.Tensor]]]:
        """Return each answer as pairs of a token and its logits, shape (vocabulary,)."""
        order = list(range(len(prompts)))
        found: list[list[torch.Tensor]] = [[] for _ in prompts]

        def record_logits(_: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for row, logits in zip(order, output.logits[:, -1].float().clone(), strict=True):
                found[row].append(logits)

        def drop_rows(index: torch.Tensor) -> None:
            order[:] = [order[i] for i in index.tolist()]

        handle = self._decoder.model.register_forward_hook(record_logits)
        try:
            requests = [GenerateRequest(prompt, _STEPS, (), {"do_sample": False}) for prompt in prompts]
            answers = self._decoder.run(requests, [0] * len(prompts), drop_rows)
        finally:
            handle.remove()
        return [list(zip(answer, logits, strict=False)) for answer, logits in zip(answers, found, strict=True)]


def _all_at_most(some: tuple[int, ...], others: tuple[int, ...]) -> bool:
    return all(one <= other for one, other in zip(some, others, strict=True))
