"""How lm-eval's models turn requests into tokens, where its classes differ."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from lm_eval.api.model import LM
from lm_eval.models.utils import has_bos_prefix

from t2.adapters.engine.decoding import decodes_by_row


class Rules(Protocol):
    """The rules of one of lm-eval's models.

    Attributes:
        pair: tokens that a context and its continuation may have together.
        rolling: tokens of a window of a rolling request.
    """

    @property
    def pair(self) -> int: ...

    @property
    def rolling(self) -> int: ...

    def prompt(self, context: str, room: int) -> list[int]:
        """Tokens of a prompt to continue, cut to ``room`` where it is longer."""
        ...

    def stops_seen(self, stops: Sequence[str], eos: str) -> list[str]:
        """The stop texts that end an answer while it is generated; the others cut it afterwards."""
        ...

    def check(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse a request's arguments where this can be seen without a call of the model.

        Raises:
            ValueError: lm-eval's model refuses them.
        """
        ...

    def arguments(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments for the model's library, from a request's arguments that lm-eval has normalised."""
        ...

    def new_tokens(self, asked: int, stops: Sequence[str]) -> int:
        """Tokens of an answer at most, where the request asks for ``asked``."""
        ...

    def same_in_batches(self, kwargs: Mapping[str, Any], stops: Sequence[str], eos: str) -> bool:
        """Whether an engine's batches give the answers of lm-eval's model under these arguments and stop texts."""
        ...

    def same_encoded(self, contexts: Sequence[str]) -> bool:
        """Whether lm-eval's model encodes each of these prompts as it does alone."""
        ...

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which the engine computes as lm-eval's model does."""
        ...


class HFRules:
    """Those of ``HFLM``."""

    def __init__(self, lm: Any) -> None:
        self._lm = lm

    @property
    def pair(self) -> int:
        """The last token of a continuation is not fed to the model."""
        return int(self._lm.max_length) + 1

    @property
    def rolling(self) -> int:
        """All that the model holds."""
        return int(self._lm.max_length)

    def prompt(self, context: str, room: int) -> list[int]:
        """Cut from the left."""
        ids, _ = self._lm.tok_batch_encode([context], left_truncate_len=room, truncation=bool(self._lm.truncation))
        return list(ids[0].tolist())

    def stops_seen(self, stops: Sequence[str], eos: str) -> list[str]:
        """All."""
        return list(stops)

    def check(self, kwargs: Mapping[str, Any]) -> None:
        """Stop texts are texts, and an answer has a token, unless the model's own configuration says how many."""
        odd = next((stop for stop in kwargs["until"] if not isinstance(stop, str)), "")
        if odd != "":
            raise ValueError(f"until must be texts, got {odd!r}")
        if int(kwargs["max_gen_toks"]) < 1 and self._lm.model.generation_config.max_new_tokens is None:
            raise ValueError(f"max_gen_toks must be at least 1, got {kwargs['max_gen_toks']}")

    def arguments(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Temperature 0 where none is given, and none for greedy decoding."""
        given = {"temperature": 0.0, **kwargs}
        if given.get("do_sample") is False and given["temperature"] == 0.0:
            del given["temperature"]
        return given

    def new_tokens(self, asked: int, stops: Sequence[str]) -> int:
        """One before an empty stop text; else those of the model's generation configuration, which come first."""
        own = self._lm.model.generation_config.max_new_tokens
        return 1 if "" in stops else asked if own is None else int(own)

    def same_in_batches(self, kwargs: Mapping[str, Any], stops: Sequence[str], eos: str) -> bool:
        """Whether the engine implements the arguments, and an answer ends where it does alone.

        In a batch of lm-eval's, a row goes on after its stop text until all rows have had theirs; what comes then is
        cut off, unless the text that is cut shows the stop text elsewhere or not at all.
        """
        model, tokenizer = self._lm.model, self._lm.tokenizer
        if tokenizer.eos_token_id is None or not all(isinstance(stop, str) for stop in stops):
            return False
        if not decodes_by_row(model, kwargs):
            return False
        given = kwargs.get("eos_token_id", model.generation_config.eos_token_id)
        ends = set(given if isinstance(given, list) else [given])
        texts = [stop for stop in stops if stop and not (stop == eos and tokenizer.eos_token_id in ends)]
        thinks = self._lm.think_end_token is not None
        if self._lm.batch_size == 1:
            # While it thinks, an answer ends where a stop text is seen: here by its bytes, there by its tokens.
            wide = [len(tokenizer.encode(text, add_special_tokens=False)) + 2 >= len(text.encode()) for text in texts]
            return not thinks or all(wide)
        special = [tokenizer.decode([token]) for token in tokenizer.all_special_ids if token not in ends]
        return not (
            (texts and thinks)
            or tokenizer.eos_token_id not in ends
            or any(_may_share(text, other) for text in texts for other in special)
            or any(_ends_within(text, other) for text in texts for other in texts)
        )

    def same_encoded(self, contexts: Sequence[str]) -> bool:
        """Whether all begin with the token of the beginning, or none does: of a batch the first decides for all."""
        begin = getattr(self._lm.tokenizer, "bos_token", None)
        return self._lm.batch_size == 1 or len({has_bos_prefix(context, begin) for context in contexts}) < 2

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast where lm-eval was told a ``mixed_precision_dtype``."""
        dtype = self._lm.mixed_precision_dtype
        return torch.autocast(self._lm.device.type, dtype=dtype, enabled=dtype is not None)


def _may_share(text: str, special: str) -> bool:
    """Whether a text may be seen only by characters of a special token."""
    longest = min(len(text), len(special))
    return (
        text in special
        or special in text
        or any(text.endswith(special[:n]) or special.endswith(text[:n]) for n in range(1, longest + 1))
    )


def _ends_within(text: str, other: str) -> bool:
    """Whether a stop text is seen in the middle of another one, which would cut the answer earlier."""
    return 0 < other.find(text) < len(other) - len(text)


def rules_of(lm: LM) -> Rules:
    """The rules of a model: those that it brings, else those of ``HFLM``."""
    return cast("Rules | None", getattr(lm, "t2_rules", None)) or HFRules(lm)
