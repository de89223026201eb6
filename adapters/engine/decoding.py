"""Decoding of one batch of prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import transformers

from t2.adapters.engine.base import GenerateRequest
from t2.core.errors import ArgumentError

_PAD = 0


class Decoder:
    """Continues batches of prompts under whatever mixtures are active.

    Args:
        model: a decoder-only model.
        tokenizer: its tokenizer, used to see stop texts.
    """

    def __init__(self, model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._generator = cast(Callable[..., torch.Tensor], model.generate)

    def run(self, batch: Sequence[GenerateRequest], seed: int) -> list[tuple[int, ...]]:
        """Continue prompts that differ in their context alone.

        Args:
            batch: the prompts.
            seed: of sampling.

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
        stop = _RowStop(self.tokenizer, first.stop, width)
        with seeded(seed, device):
            try:
                out = self._generator(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=first.max_new_tokens,
                    stopping_criteria=transformers.StoppingCriteriaList([stop]),
                    pad_token_id=pad,
                    use_cache=True,
                    **first.kwargs,
                )
            except ValueError as error:  # transformers' own check of its arguments
                given = ", ".join(f"{name}={value!r}" for name, value in first.kwargs.items())
                raise ArgumentError(f"transformers refuses to generate with {given}: {error}") from error
        ends = _as_set(self.model.generation_config.eos_token_id) | _as_set(self.tokenizer.eos_token_id)
        answers = []
        for row, tokens in enumerate(out[:, width:].tolist()):
            length = stop.lengths[row] if row < len(stop.lengths) and stop.lengths[row] else len(tokens)
            end = next((i + 1 for i, token in enumerate(tokens[:length]) if token in ends), length)
            answers.append(tuple(tokens[:end]))
        return answers


class _RowStop(transformers.StoppingCriteria):
    """Ends each row on its own when its text contains a stop text; remembers the length at which it did."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, stop: Sequence[str], prompt: int) -> None:
        self.tokenizer = tokenizer
        self.stop = [text for text in stop if text]
        self.prompt = prompt
        # However an answer spells a stop text, every token holds a byte of it.
        self.window = max((len(text.encode()) for text in self.stop), default=0)
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if not self.lengths:
            self.lengths = [0] * input_ids.shape[0]
        if self.stop:
            generated = input_ids[:, self.prompt :]
            tails = self.tokenizer.batch_decode(generated[:, -self.window :])
            for row, tail in enumerate(tails):
                if not self.lengths[row] and any(text in tail for text in self.stop):
                    self.lengths[row] = generated.shape[1]
        return torch.tensor([length > 0 for length in self.lengths], device=input_ids.device)


def _as_set(value: int | list[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Context in which torch draws from ``seed``; its global generators are as before afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
