"""The engine over ``transformers``: one mixture in weight form, or one mixture per row in activation form."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import transformers

from t2.adapters.basis import Basis, matrix_digest
from t2.adapters.engine.base import Generated, GenerateRequest, Scored, ScoreRequest
from t2.adapters.engine.batch_proofs import GenerationProofs
from t2.adapters.engine.batching import Budget
from t2.adapters.engine.costs import CostModel, FormName, Load, spanning
from t2.adapters.engine.decoding import Decoder
from t2.adapters.engine.forms import ActiveRows, Forms
from t2.adapters.engine.likelihood import Branches, LikelihoodModel
from t2.adapters.expert import Z
from t2.adapters.progress import Bar, request_bar
from t2.adapters.quantised import keep_form
from t2.adapters.targets import Ranks, Target, find_targets, left_out, warn_left_out
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
        batch_size: rows of a batch at most; None for as many as memory holds and are worth it, 32 on a CPU.
        moe: what to do with mixture-of-experts layers; see :func:`t2.adapters.targets.find_targets`.

    Attributes:
        budget: limits batches by memory.
        costs: chooses the cheaper form.
        form: the form of :meth:`generate` and :meth:`score`; None leaves it to ``costs``.

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
        batch_size: int | None = None,
        moe: str = "refuse",
    ) -> None:
        self.model = model
        model.train(False).requires_grad_(False)
        keep_form(model)
        self.tokenizer = tokenizer
        self.targets: dict[str, Target] = find_targets(model, moe=moe)
        digests = {name: matrix_digest(target.matrix) for name, target in self.targets.items()}
        self._ranks = Ranks(self.targets, digests)
        self.base = BaseModelRef(id=base_id, revision=revision, fingerprint=self._ranks.fingerprint)
        warn_left_out(base_id, left_out(model, self.targets))
        self.forms = Forms(base_id, self.targets, digests)
        self.lock = self.forms.lock
        self.budget = Budget(model, batch_size)
        self.costs = CostModel(model, self.targets)
        self.form: FormName | None = None
        self._decoder = Decoder(model, tokenizer)
        self._proofs = GenerationProofs(self._decoder)
        self.likelihood = LikelihoodModel(model)

    @property
    def batch_size(self) -> int:
        """Rows of a batch at most; less than asked for after memory ran out."""
        return self.budget.most

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

    def ranks(self) -> Ranks:
        """The rank of every adaptable matrix, by parameter name."""
        return self._ranks

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

    def untrained(
        self, z: Mapping[str, torch.Tensor], rank: int | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """The base in the form that :meth:`trained` has with ``z``: it rounds as that does, so at z = 1 both agree."""
        ones = {name: torch.ones_like(vector, requires_grad=False) for name, vector in z.items()}
        return self.trained(ones, rank)

    def trained_targets(self, z: Mapping[str, torch.Tensor]) -> dict[str, Target]:
        """The matrices that ``z`` changes."""
        return {own: self.targets[own] for own in (self._ranks.aliases.get(name, name) for name in z)}

    def close(self) -> None:
        """Leave the model as it was found; here nothing of it was changed."""

    @property
    def random(self) -> bool:
        """Whether a pass of :meth:`trained` that takes gradients draws from torch's random state."""
        return False

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
        """Continue prompts; see :class:`t2.adapters.engine.Engine`.

        Mixtures are applied one after another in weight form, or share batches in activation form, whichever costs less
        by :attr:`costs`; in float32 the tokens are the same. Greedy answers and plain samples do not depend on which
        requests share a batch, but for rounding; a request without a seed samples from one derived from ``seed`` and
        its place in the call.

        Raises:
            ArgumentError: ``transformers`` refuses a request's arguments.
            ModelError: memory does not hold one request; of more it holds as many as it can.
        """
        answers: list[Generated | None] = [None] * len(requests)
        picked = _pick(rows, range(len(requests)))
        seeds = [derive_seed(seed, "generate", i) if r.seed is None else r.seed for i, r in enumerate(requests)]

        def size(i: int) -> int:
            return len(requests[i].context)

        def answer(batch: list[int], shown: Bar, apart: bool) -> None:
            asked = [requests[i] for i in batch]
            used, index = _compact(mixtures, [picked[i] for i in batch]) if apart else ([None], None)
            with self.activation(used, index) as active:
                found = self._decoder.run(asked, [seeds[i] for i in batch], active.keep)
            for i, row in zip(batch, found, strict=True):
                answers[i] = Generated(row)
            shown.update(len(batch))

        def run(indices: list[int], shown: Bar, apart: bool) -> None:
            waiting = sorted(indices, key=lambda i: (-size(i), i))
            while waiting:
                new = requests[waiting[0]].max_new_tokens
                batch = waiting[: self._batch([requests[i] for i in waiting])]
                what = f"{self.base.id} with prompts of {size(batch[0])} tokens and answers of {new}"
                batch = batch[: self.budget.fitting(batch, size(batch[0]) + new, what)]
                del waiting[: len(batch)]
                self.budget.shrinking(batch, lambda part: answer(part, shown, apart), what, self.forms.release)

        with request_bar(progress, len(requests)) as bar:
            for group in _alike(requests):
                own = _by(picked, group)
                if self._in_turn(
                    [mixtures[m] for m in own],
                    [load for some in own.values() for load in self._loads(requests, some)],
                    self._loads(requests, group),
                ):
                    with self._switching([mixtures[m] for m in own]):
                        for m, some in own.items():
                            with self.applied(mixtures[m]):
                                run(some, bar, apart=False)
                else:
                    run(group, bar, apart=True)
        return [answer for answer in answers if answer is not None]

    @torch.no_grad()
    def faster_in_rows(
        self,
        requests: Sequence[GenerateRequest],
        mixtures: Sequence[Z | None],
        rows: Sequence[int],
        batch: int | None = None,
    ) -> bool:
        """Whether one batch of many mixtures costs less than one mixture after another elsewhere.

        Args:
            requests: the prompts.
            mixtures: the distinct mixtures.
            rows: mixture of each request.
            batch: rows of a batch where each mixture is answered by itself; None is as many as here.
        """
        in_turn, in_one = [], []
        for group in _alike(requests):
            in_turn += [load for some in _by(rows, group).values() for load in self._loads(requests, some, batch)]
            in_one += self._loads(requests, group)
        return not self._in_turn([mixtures[m] for m in dict.fromkeys(rows)], in_turn, in_one)

    def _loads(
        self, requests: Sequence[GenerateRequest], indices: Iterable[int], batch: int | None = None
    ) -> list[Load]:
        """What some requests cost, in batches of so many rows or as many as are worth it, the longest prompts first."""
        found, left = [], sorted(indices, key=lambda i: (-len(requests[i].context), i))
        while left:
            prompt, new = len(requests[left[0]].context), requests[left[0]].max_new_tokens
            part = left[: batch or self._batch([requests[i] for i in left])]
            del left[: len(part)]
            found.append(Load(len(part), len(part) * prompt, _expected_tokens(new)))
        return found

    def pads(self, requests: Sequence[GenerateRequest]) -> bool:
        """Whether :meth:`generate` may answer requests of different lengths in one batch."""
        return all(
            self._proofs.hold((len(requests[i].context) for i in group), requests[group[0]].max_new_tokens)
            for group in _alike(requests)
        )

    def _batch(self, waiting: Sequence[GenerateRequest]) -> int:
        """Number of prompts in the next batch; ``waiting`` is sorted, the longest first."""
        prompts, new = [len(request.context) for request in waiting], waiting[0].max_new_tokens
        count = min(len(prompts), self._rows(waiting[0]))
        if count == 1 or self._proofs.hold(prompts[:count], new):
            return count
        alike = prompts[:count].count(prompts[0])
        return alike if alike == 1 or self._proofs.hold(prompts[:alike], new) else 1

    def _rows(self, request: GenerateRequest) -> int:
        """Rows of a batch of such prompts, limited by memory and by the tokens of one pass."""
        if self._decoder.rows_of(request) > 1:
            return 1
        prompt = len(request.context)
        most = _BATCH_TOKENS[self.device.type == "cuda"] // max(1, prompt)
        return max(1, min(self.budget.rows(prompt + request.max_new_tokens), most))

    def _in_turn(self, mixtures: Sequence[Z | None], in_turn: Sequence[Load], in_one: Sequence[Load]) -> bool:
        moving = [z for z in mixtures if z and any(bool((vector != 1).any()) for vector in z.values())]
        if self.form is not None:
            return self.form == "weight"
        return self.costs.choose(moving, in_turn, in_one) == "weight"

    @contextlib.contextmanager
    def _switching(self, mixtures: Sequence[Z | None]) -> Iterator[None]:
        span = spanning(mixtures)
        with self.forms.switching(span, mixtures) if span else contextlib.nullcontext():
            yield

    @torch.no_grad()
    def score(
        self,
        requests: Sequence[ScoreRequest],
        mixtures: Sequence[Z | None] = (None,),
        rows: Sequence[int] | None = None,
        *,
        progress: str | None = None,
    ) -> list[Scored]:
        """Log-likelihoods of continuations, softmax in float32; see :class:`t2.adapters.engine.Engine`.

        Mixtures come in turn or in one batch, as in :meth:`generate`.
        """
        answers: list[Scored | None] = [None] * len(requests)
        picked = _pick(rows, range(len(requests)))
        own = _by(picked, range(len(requests)))
        loads = [Load(1, self._input_tokens(requests, some), 0) for some in own.values()]
        whole = Load(1, sum(load.prompt for load in loads), 0)
        with request_bar(progress, len(requests)) as bar:
            if self._in_turn([mixtures[m] for m in own], loads, [whole]):
                with self._switching([mixtures[m] for m in own]):
                    for m, some in own.items():
                        with self.applied(mixtures[m]):
                            self._score(requests, {0: some}, (None,), answers, bar)
            else:
                self._score(requests, own, mixtures, answers, bar)
        return [answer for answer in answers if answer is not None]

    def _units(self, requests: Sequence[ScoreRequest], indices: Sequence[int]) -> list[list[int]]:
        """Group requests that share a context, if the context can be computed once."""
        shared: dict[tuple[int, ...], list[int]] = {}
        for i in indices:
            shared.setdefault(requests[i].context, []).append(i)
        return [
            part
            for unit in shared.values()
            for part in ([unit] if self.likelihood.packs(_branches(requests, unit)) else [[i] for i in unit])
        ]

    def _input_tokens(self, requests: Sequence[ScoreRequest], indices: Sequence[int]) -> int:
        return sum(_branches(requests, unit).inputs for unit in self._units(requests, indices))

    def _score(
        self,
        requests: Sequence[ScoreRequest],
        own: Mapping[int, Sequence[int]],
        mixtures: Sequence[Z | None],
        answers: list[Scored | None],
        bar: Bar,
    ) -> None:
        """Score requests in batches of rows with their own mixtures.

        Args:
            requests: of the call.
            own: the requests to score, by their mixture.
            mixtures: the mixtures.
            answers: take the results.
            bar: is told of them.
        """
        units = [(m, unit) for m, some in own.items() for unit in self._units(requests, some)]
        branches = [_branches(requests, unit) for _, unit in units]
        begin = self._shared_prefix(branches, len(own))
        cut = len(begin)
        branches = [Branches(item.context[cut:], item.continuations) for item in branches]
        prefix, prefix_of = None, [-1]
        most = _BATCH_TOKENS[self.device.type == "cuda"]
        # A row holds the keys and values of the prefix too.
        rows_of_batch = min(self.batch_size, max(1, most // max(1, cut)))

        def answer(batch: list[int]) -> None:
            nonlocal prefix, prefix_of
            work = [branches[unit] for unit in batch]
            packed = self.likelihood.rows(work, [units[unit][0] for unit in batch], cut)
            of_rows = [units[batch[row[0]]][0] for row in packed]
            used, index = _compact(mixtures, of_rows)
            if begin and prefix_of != sorted(set(of_rows)):
                with self.activation(used, None if index is None else torch.arange(len(used))):
                    prefix = self.likelihood.prefix(begin, len(used))
                prefix_of = sorted(set(of_rows))
            with self.activation(used, index):
                spans = self.likelihood.run(work, packed, prefix, None if index is None else index.tolist())
            order = [i for unit in batch for i in units[unit][1]]
            for i, value, greedy in zip(order, spans.loglikelihoods().tolist(), spans.greedy(), strict=True):
                answers[i] = Scored(value, greedy)
            bar.update(len(order))

        for batch in self.likelihood.batches([[item] for item in branches], most, rows_of_batch, cut):
            what = f"{self.base.id} with texts of {max(branches[unit].inputs for unit in batch)} tokens"
            self.budget.shrinking(batch, answer, what, self.forms.release)

    def _shared_prefix(self, items: Sequence[Branches], mixtures: int) -> tuple[int, ...]:
        """The tokens that all contexts begin with, where computing them once for each mixture saves work."""
        if len(items) < max(2, 2 * mixtures):
            return ()
        contexts = [item.context for item in items]
        first, last = min(contexts), max(contexts)
        most = min(map(len, contexts)) - 1  # something is left of each
        length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), most)
        common = first[: min(length, most)]
        return common if len(common) >= _PREFIX and self.likelihood.reuses(items, len(common)) else ()

    @torch.no_grad()
    def probe(self, tokens: Sequence[int], mixtures: Sequence[Z | None] = (None,)) -> list[torch.Tensor]:
        """Logits of a text under each mixture, shape (tokens, vocabulary), in one batch and in activation form."""
        rows = torch.arange(len(mixtures)) if len(mixtures) > 1 else None
        with self.activation(mixtures, rows):
            ids = torch.tensor([list(tokens)] * len(mixtures), device=self.device)
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return list(logits.clone())


def _expected_tokens(most: int) -> int:
    """Estimated tokens of an answer of at most ``most``: most answers end before their limit."""
    return (most + 1) // 2


def _pick(rows: Sequence[int] | None, batch: Sequence[int]) -> list[int]:
    return [0 if rows is None else rows[i] for i in batch]


def _alike(requests: Sequence[GenerateRequest]) -> list[list[int]]:
    """Requests that differ in their context and seed alone, which can be answered in one batch."""
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
        same = json.dumps([request.max_new_tokens, request.stop, sorted(request.kwargs.items())], default=repr)
        groups.setdefault(same, []).append(i)
    return list(groups.values())


def _branches(requests: Sequence[ScoreRequest], unit: Sequence[int]) -> Branches:
    """Build one item from requests that share a context."""
    return Branches(requests[unit[0]].context, tuple(requests[i].continuation for i in unit))


def _by(picked: Sequence[int], indices: Iterable[int]) -> dict[int, list[int]]:
    """Requests by their mixture."""
    own: dict[int, list[int]] = {}
    for i in indices:
        own.setdefault(picked[i], []).append(i)
    return own


def _compact(mixtures: Sequence[Z | None], rows: Sequence[int]) -> tuple[list[Z | None], torch.Tensor | None]:
    """Only the mixtures that a batch uses, and its rows renumbered; no rows when it uses one."""
    used = sorted(set(rows))
    index = None if len(used) == 1 else torch.tensor([used.index(row) for row in rows])
    return [mixtures[i] for i in used], index
