"""The engine over ``transformers``: one mixture in weight form, or one mixture per row in activation form."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers
from tqdm import tqdm

from t2.adapters.basis import Basis, fingerprint, matrix_digest
from t2.adapters.engine.base import Generated, GenerateRequest, Scored, ScoreRequest
from t2.adapters.engine.decoding import Decoder
from t2.adapters.engine.forms import ActiveRows, Forms
from t2.adapters.engine.likelihood import Branches, LikelihoodModel
from t2.adapters.expert import Z
from t2.adapters.quantised import keep_form
from t2.adapters.targets import Target, find_targets
from t2.core.manifest import BaseModelRef
from t2.core.seeds import derive_seed

_BATCH_TOKENS = (4096, 65536)
"""Padded prompt tokens of a batch on a CPU, where larger ones fall out of the caches, and on a GPU."""
_PREFIX = 16
"""Tokens that contexts share at their beginning, from which on these are computed once."""


class TransformersEngine:
    """A ``transformers`` causal language model that answers under mixtures.

    :meth:`applied` is the weight form, :meth:`activation`, which :meth:`generate` and :meth:`score` use, the activation
    form; see :class:`t2.adapters.engine.forms.Forms`. Both hold :attr:`lock`.

    Args:
        model: a decoder-only model; it is put in eval mode and its parameters stop requiring gradients.
        tokenizer: its tokenizer, used to see stop texts.
        base_id: the name it was loaded by.
        revision: its revision.
        batch_size: rows of a batch.
        moe: what to do with mixture-of-experts layers; see :func:`t2.adapters.targets.find_targets`.

    Raises:
        ModelError: the model has nothing to adapt, or something that cannot be adapted.
    """

    supports_rows = True

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        base_id: str,
        revision: str | None = None,
        *,
        batch_size: int = 32,
        moe: str = "refuse",
    ) -> None:
        self.model = model
        model.train(False).requires_grad_(False)
        keep_form(model)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.targets: dict[str, Target] = find_targets(model, moe=moe)
        digests = {name: matrix_digest(target.matrix) for name, target in self.targets.items()}
        self.base = BaseModelRef(id=base_id, revision=revision, fingerprint=fingerprint(digests))
        self.forms = Forms(base_id, self.targets, digests)
        self.lock = self.forms.lock
        self._decoder = Decoder(model, tokenizer)
        self.likelihood = LikelihoodModel(model)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the adapted weights; of quantised ones that of the model's other weights."""
        target = next(iter(self.targets.values()))
        return target.parameter.dtype if target.form is None else self.model.dtype

    @property
    def precision(self) -> str:
        """The dtype by name, for example ``bfloat16``, and before it how weights are quantised: ``nf4+bfloat16``."""
        forms = sorted({target.form for target in self.targets.values() if target.form is not None})
        return "+".join([*forms, str(self.dtype).removeprefix("torch.")])

    def ranks(self) -> Mapping[str, int]:
        """The rank of every adaptable matrix, by parameter name."""
        return {name: target.rank for name, target in self.targets.items()}

    def bases(self, names: Iterable[str], progress: bool = True) -> dict[str, Basis]:
        """The bases of some matrices; see :meth:`t2.adapters.engine.forms.Forms.bases`."""
        return self.forms.bases(names, progress)

    def applied(self, z: Z | None) -> contextlib.AbstractContextManager[None]:
        """Weight form; see :meth:`t2.adapters.engine.forms.Forms.applied`."""
        return self.forms.applied(z)

    def switching(self, experts: Sequence[Z], mixtures: Sequence[Z | None]) -> contextlib.AbstractContextManager[None]:
        """Many mixtures in weight form; see :meth:`t2.adapters.engine.forms.Forms.switching`."""
        return self.forms.switching(experts, mixtures)

    def release(self) -> None:
        """See :meth:`t2.adapters.engine.forms.Forms.release`."""
        self.forms.release()

    def activation(
        self, mixtures: Sequence[Mapping[str, torch.Tensor] | None], rows: torch.Tensor | None = None
    ) -> contextlib.AbstractContextManager[ActiveRows]:
        """Activation form; see :meth:`t2.adapters.engine.forms.Forms.activation`."""
        return self.forms.activation(mixtures, rows)

    def trained(
        self, z: Mapping[str, torch.Tensor], rank: int | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Training form; see :meth:`t2.adapters.engine.forms.Forms.trained`."""
        return self.forms.trained(z, rank)

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[GenerateRequest],
        mixtures: Sequence[Z | None] = (None,),
        rows: Sequence[int] | None = None,
        *,
        seed: int = 0,
        progress: str | None = None,
    ) -> list[Generated]:
        """Continue prompts in batches of rows that each have their own mixture; see :class:`t2.adapters.engine.Engine`.

        Greedy answers and plain samples do not depend on which requests share a batch, but for rounding; a request
        without a seed samples from one derived from ``seed`` and its place in the call.
        """
        answers: list[Generated | None] = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            same = json.dumps([request.max_new_tokens, request.stop, sorted(request.kwargs.items())], default=repr)
            groups.setdefault(same, []).append(i)
        batches = [b for group in groups.values() for b in self._batches(group, lambda i: len(requests[i].context))]
        seeds = [derive_seed(seed, "generate", i) if r.seed is None else r.seed for i, r in enumerate(requests)]
        with _bar(progress, len(requests)) as bar:
            for batch in batches:
                used, index = _compact(mixtures, _pick(rows, batch))
                asked = [requests[i] for i in batch]
                with self.activation(used, index) as active:
                    tokens = self._decoder.run(asked, [seeds[i] for i in batch], active.keep)
                for i, row in zip(batch, tokens, strict=True):
                    answers[i] = Generated(row)
                bar.update(len(batch))
        return [answer for answer in answers if answer is not None]

    @torch.no_grad()
    def score(
        self,
        requests: Sequence[ScoreRequest],
        mixtures: Sequence[Z | None] = (None,),
        rows: Sequence[int] | None = None,
        *,
        progress: str | None = None,
    ) -> list[Scored]:
        """Log-likelihoods of continuations, softmax in float32; see :class:`t2.adapters.engine.Engine`."""
        answers: list[Scored | None] = [None] * len(requests)
        picked = _pick(rows, range(len(requests)))
        shared: dict[tuple[object, ...], list[int]] = {}
        for i, request in enumerate(requests):
            shared.setdefault((request.context, picked[i]) if self.likelihood.share else (i,), []).append(i)
        units = list(shared.values())
        begin = self._shared_prefix([requests[u[0]].context for u in units], len(set(picked)))
        cut = len(begin)
        branches = [Branches(requests[u[0]].context[cut:], tuple(requests[i].continuation for i in u)) for u in units]
        prefix, prefix_of = None, [-1]
        with _bar(progress, len(requests)) as bar:
            most = _BATCH_TOKENS[self.device.type == "cuda"]
            # A row holds the keys and values of the prefix too.
            rows_of_batch = min(self.batch_size, max(1, most // max(1, cut)))
            for batch in self.likelihood.batches([[item] for item in branches], most, rows_of_batch):
                work = [branches[unit] for unit in batch]
                packed = self.likelihood.rows(work, [picked[units[unit][0]] for unit in batch])
                own = [picked[units[batch[row[0]]][0]] for row in packed]
                used, index = _compact(mixtures, own)
                if begin and prefix_of != sorted(set(own)):
                    prefix_of = sorted(set(own))
                    with self.activation(used, None if index is None else torch.arange(len(used))):
                        prefix = self.likelihood.prefix(begin, len(used))
                with self.activation(used, index):
                    spans = self.likelihood.run(work, packed, prefix, None if index is None else index.tolist())
                order = [i for unit in batch for i in units[unit]]
                for i, value, greedy in zip(order, spans.loglikelihoods().tolist(), spans.greedy(), strict=True):
                    answers[i] = Scored(value, greedy)
                bar.update(len(order))
        return [answer for answer in answers if answer is not None]

    def _shared_prefix(self, contexts: Sequence[tuple[int, ...]], mixtures: int) -> tuple[int, ...]:
        """The tokens that all contexts begin with, where computing them once for each mixture saves work."""
        if len(contexts) < max(2, 2 * mixtures):
            return ()
        first, last = min(contexts), max(contexts)
        most = min(map(len, contexts)) - 1  # something is left of each
        length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), most)
        common = first[: min(length, most)]
        return common if len(common) >= _PREFIX and self.likelihood.prefixes else ()

    @torch.no_grad()
    def probe(self, tokens: Sequence[int], mixtures: Sequence[Z | None] = (None,)) -> list[torch.Tensor]:
        """Logits of a text under each mixture, shape (tokens, vocabulary), in one batch and in activation form."""
        rows = torch.arange(len(mixtures)) if len(mixtures) > 1 else None
        with self.activation(mixtures, rows):
            ids = torch.tensor([list(tokens)] * len(mixtures), device=self.device)
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return list(logits.clone())

    def _batches(self, indices: list[int], length: Callable[[int], int]) -> list[list[int]]:
        """Longest first, at most ``batch_size`` rows and a bounded number of padded tokens a batch."""
        most = _BATCH_TOKENS[self.device.type == "cuda"]
        batches: list[list[int]] = []
        for i in sorted(indices, key=lambda i: (-length(i), i)):
            if (
                batches
                and len(batches[-1]) < self.batch_size
                and (len(batches[-1]) + 1) * length(batches[-1][0]) <= most
            ):
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches


def _pick(rows: Sequence[int] | None, batch: Sequence[int]) -> list[int]:
    return [0 if rows is None else rows[i] for i in batch]


def _compact(mixtures: Sequence[Z | None], rows: Sequence[int]) -> tuple[list[Z | None], torch.Tensor | None]:
    """Only the mixtures that a batch uses, and its rows renumbered; no rows when it uses one."""
    used = sorted(set(rows))
    index = None if len(used) == 1 else torch.tensor([used.index(row) for row in rows])
    return [mixtures[i] for i in used], index


def _bar(text: str | None, total: int) -> tqdm[Any]:
    return tqdm(total=total, desc=text, unit="request", disable=text is None, delay=1, leave=False)
