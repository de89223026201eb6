"""What an engine does: generate and score tokens under a mixture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from t2.adapters.basis import Basis
from t2.adapters.expert import Z
from t2.core.manifest import BaseModelRef


@dataclass(frozen=True)
class GenerateRequest:
    """One prompt to continue.

    Attributes:
        context: prompt tokens, without padding.
        max_new_tokens: at most so many tokens are generated.
        stop: generation of a row ends when its text contains one of these.
        kwargs: further arguments of ``transformers``' ``generate``, for example ``do_sample`` and ``temperature``.
        seed: of sampling this answer; None derives it from the call's seed and the request's place in the call.
    """

    context: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True)
class Generated:
    """An answer.

    Attributes:
        tokens: up to and with the end-of-sequence token or the stop text.
        text: as the engine spells it, without that stop text, where it spells its answers itself.
    """

    tokens: tuple[int, ...]
    text: str | None = None


@dataclass(frozen=True)
class ScoreRequest:
    """A continuation whose likelihood is asked, as tokens."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Scored:
    """Log-likelihood of a continuation in nats, and whether greedy decoding would have produced it."""

    loglikelihood: float
    greedy: bool


class Engine(Protocol):
    """A base model that answers under mixtures.

    ``rows`` gives for each request the index of its mixture in ``mixtures``; a mixture of None is the base. An engine
    with ``supports_rows`` runs requests of different mixtures in one batch, another one runs them mixture by mixture;
    the answers are the same (in float32 token for token, likelihoods within 1e-3).
    """

    base: BaseModelRef
    supports_rows: bool

    @property
    def precision(self) -> str:
        """The dtype of the adapted weights by name, for example ``bfloat16``, and how they are quantised."""
        ...

    def ranks(self) -> Mapping[str, int]:
        """The rank of every adaptable matrix, by parameter name."""
        ...

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        mixtures: Sequence[Z | None] = (None,),
        rows: Sequence[int] | None = None,
        *,
        seed: int = 0,
        progress: str | None = None,
    ) -> list[Generated]:
        """Continue prompts.

        Args:
            requests: the prompts.
            mixtures: the distinct mixtures.
            rows: mixture of each request; None means all use the first.
            seed: seeds sampling, when a request samples.
            progress: text of a progress bar; None shows none.
        """
        ...

    def score(
        self,
        requests: Sequence[ScoreRequest],
        mixtures: Sequence[Z | None] = (None,),
        rows: Sequence[int] | None = None,
        *,
        progress: str | None = None,
    ) -> list[Scored]:
        """Log-likelihoods of continuations; arguments as :meth:`generate`."""
        ...

    def probe(self, tokens: Sequence[int], mixtures: Sequence[Z | None] = (None,)) -> list[torch.Tensor]:
        """What the model makes of a text under each mixture: logits or log-likelihoods.

        Two mixtures that act alike give equal tensors, and others hardly ever.

        Args:
            tokens: the text, two tokens or more.
            mixtures: of None, the model as it is.
        """
        ...

    def bases(self, names: Iterable[str]) -> Mapping[str, Basis]:
        """The spectral bases of some matrices."""
        ...

    def applied(self, z: Z | None) -> contextlib.AbstractContextManager[None]:
        """Context in which the model itself, for any caller, is the base under ``z``; it restores the base exactly."""
        ...

    def switching(self, experts: Sequence[Z], mixtures: Sequence[Z | None]) -> contextlib.AbstractContextManager[None]:
        """Context in which these mixtures, most of them of ``experts``, are :meth:`applied` one after another."""
        ...

    def release(self) -> None:
        """Let go what is in memory only to make changes of the mixture cheap."""
        ...
