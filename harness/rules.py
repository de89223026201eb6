"""How lm-eval's models turn requests into tokens, where its classes differ."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from lm_eval.api.model import LM


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

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast where lm-eval was told a ``mixed_precision_dtype``."""
        dtype = self._lm.mixed_precision_dtype
        return torch.autocast(self._lm.device.type, dtype=dtype, enabled=dtype is not None)


def rules_of(lm: LM) -> Rules:
    """The rules of a model: those that it brings, else those of ``HFLM``."""
    return cast("Rules | None", getattr(lm, "t2_rules", None)) or HFRules(lm)
