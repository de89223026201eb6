"""The engine over ``transformers``: one mixture in weight form, or one mixture per row in activation form."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import transformers
from torch import nn
from tqdm import tqdm

from t2.adapters.basis import Basis, fingerprint, load_bases, matrix_digest
from t2.adapters.engine.base import Generated, GenerateRequest, Scored, ScoreRequest
from t2.adapters.engine.likelihood import Branches, LikelihoodModel
from t2.adapters.expert import Z
from t2.adapters.quantised import keep_form
from t2.adapters.targets import Target, find_targets
from t2.core.errors import ArgumentError, ModelError
from t2.core.manifest import BaseModelRef
from t2.core.seeds import derive_seed

_PAD = 0
_BATCH_TOKENS = (4096, 65536)
"""Padded prompt tokens of a batch on a CPU, where larger ones fall out of the caches, and on a GPU."""


class TransformersEngine:
    """A ``transformers`` causal language model that answers under mixtures.

    *Weight form* (:meth:`applied`): each adapted parameter is replaced by W′ = W + Q·diag(z−1)·QᵀW (or its input-side
    twin), summed in float32 and rounded once into the model's dtype; leaving the context puts the original tensors
    back. A quantised matrix is not replaced: hooks act on it as in activation form.

    *Activation form* (:meth:`activation`, used by :meth:`generate` and :meth:`score`): the weights stay, hooks compute
    y′ = y + Q((z−1)⊙Qᵀy) on the output side, where y = Wx before the bias, or x′ = x + Q((z−1)⊙Qᵀx) on the input side.
    Every row of a batch has its own z.

    Both forms hold :attr:`lock`, so threads that ask one model under several mixtures take turns.

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
        self.lock = threading.RLock()
        self.model = model
        model.train(False).requires_grad_(False)
        keep_form(model)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.targets: dict[str, Target] = find_targets(model, moe=moe)
        self._digests = {name: matrix_digest(target.matrix) for name, target in self.targets.items()}
        self.base = BaseModelRef(id=base_id, revision=revision, fingerprint=fingerprint(self._digests))
        self._bases: dict[str, Basis] = {}
        self._factors: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._generator = cast(Callable[..., torch.Tensor], model.generate)
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
        """The bases of some matrices, from memory, else from the cache, else built.

        Raises:
            ModelError: the model has no such matrix.
            StorageError: a basis could not be written to the cache.
        """
        wanted = list(names)
        missing = [name for name in wanted if name not in self._bases]
        for name in missing:
            if name not in self.targets:
                raise ModelError(f"{self.base.id} has no adaptable matrix {name}")
        if missing:
            targets = {name: self.targets[name] for name in missing}
            with self.lock:  # not of weights that another thread has adapted
                self._bases.update(load_bases(targets, self._digests, progress=progress))
        return {name: self._bases[name] for name in wanted}

    @contextlib.contextmanager
    def applied(self, z: Z | None) -> Iterator[None]:
        """Weight form: inside the context the model is the base under ``z``, for any caller; None is the base.

        The base comes back bit for bit, also after an error.

        Raises:
            ModelError: the model has no matrix of that name.
        """
        moving = {name: vector for name, vector in (z or {}).items() if bool((vector != 1).any())}
        self.bases(moving)
        hooked = {name: vector for name, vector in moving.items() if self.targets[name].form is not None}
        originals: dict[str, torch.Tensor] = {}
        with self.lock:
            try:
                for name, vector in moving.items():
                    if name not in hooked:
                        parameter = self.targets[name].parameter
                        originals[name] = parameter.data
                        parameter.data = self._adapted(name, vector)
                with self.activation([hooked]):
                    yield
            finally:
                for name, original in originals.items():
                    self.targets[name].parameter.data = original

    def _adapted(self, name: str, vector: torch.Tensor) -> torch.Tensor:
        """W′ in the layout and dtype of the parameter."""
        target, basis = self.targets[name], self.bases([name])[name]
        w = target.matrix.float()
        q = basis.q.to(w.device)
        shift = (vector.to(w.device, torch.float32) - 1).unsqueeze(1)
        delta = q @ (shift * (q.T @ w)) if basis.side == "out" else (q @ (shift * (q.T @ w.T))).T
        adapted = (w + delta).to(target.parameter.dtype)
        return (adapted.T if target.transposed else adapted).contiguous()

    @contextlib.contextmanager
    def activation(
        self, mixtures: Sequence[Mapping[str, torch.Tensor] | None], rows: torch.Tensor | None = None
    ) -> Iterator[None]:
        """Activation form: inside the context, row b of every forward call runs under ``mixtures[rows[b]]``.

        Args:
            mixtures: z by parameter name, each of shape (r,); None is the base. Vectors that require gradients get
            them. rows: shape (batch,), integer; None means that all rows use the only mixture.

        Raises:
            ModelError: a layer's input has another leading dimension than ``rows``.
        """
        if rows is None and len(mixtures) != 1:
            raise ValueError(f"{len(mixtures)} mixtures need rows")
        names = dict.fromkeys(name for mixture in mixtures for name in (mixture or {}))
        moving = [name for name in names if any(_moves((mixture or {}).get(name)) for mixture in mixtures)]
        bases = self.bases(moving)
        handles = []
        with self.lock:
            try:
                for name in moving:
                    rank = self.targets[name].rank
                    shifts = [
                        torch.zeros(rank) if vector is None else vector.float() - 1
                        for vector in ((mixture or {}).get(name) for mixture in mixtures)
                    ]
                    shift = torch.stack([shift.to(self.targets[name].parameter.device) for shift in shifts])
                    if rows is not None:
                        shift = shift[rows.to(shift.device)]
                    handles.append(self._hook(name, bases[name], shift))
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _hook(self, name: str, basis: Basis, shift: torch.Tensor) -> torch.utils.hooks.RemovableHandle:
        module = self.targets[name].module

        def move(x: torch.Tensor) -> torch.Tensor:
            q = self._factor(name, x.dtype)
            moved, rows = x @ q, shift.shape[0]
            if rows == 1 or x.shape[0] == rows:
                return (moved * shift.to(x.dtype).view(rows, *([1] * (x.dim() - 2)), -1)) @ q.T
            if x.dim() != 2 or x.shape[0] % rows:
                raise ModelError(
                    f"{name} sees {x.shape[0]} rows in a batch of {rows}; this layer mixes rows, "
                    "so it can only be adapted in weight form"
                )
            # Mixture-of-experts layers flatten (rows, positions), row after row.
            return (moved * shift.to(x.dtype).repeat_interleave(x.shape[0] // rows, 0)) @ q.T

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0] + move(args[0]), *args[1:])

        def after(layer: nn.Module, _: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor:
            bias = layer.bias
            return y + move(y - bias if isinstance(bias, torch.Tensor) else y)

        return module.register_forward_hook(after) if basis.side == "out" else module.register_forward_pre_hook(before)

    def _factor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        key = (name, dtype)
        if key not in self._factors:
            parameter = self.targets[name].parameter
            self._factors[key] = self._bases[name].q.to(parameter.device, dtype)
        return self._factors[key]

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

        Sampling is seeded per batch from ``seed``, so the same call gives the same tokens.
        """
        answers: list[Generated | None] = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            same = json.dumps([request.max_new_tokens, request.stop, sorted(request.kwargs.items())], default=repr)
            groups.setdefault(same, []).append(i)
        batches = [b for group in groups.values() for b in self._batches(group, lambda i: len(requests[i].context))]
        with _bar(progress, len(requests)) as bar:
            for number, batch in enumerate(batches):
                first = requests[batch[0]]
                tokens = self._generate_batch(
                    [requests[i] for i in batch],
                    first,
                    mixtures,
                    _pick(rows, batch),
                    derive_seed(seed, "generate", number),
                )
                for i, row in zip(batch, tokens, strict=True):
                    answers[i] = Generated(row)
                bar.update(len(batch))
        return [answer for answer in answers if answer is not None]

    def _generate_batch(
        self,
        batch: Sequence[GenerateRequest],
        first: GenerateRequest,
        mixtures: Sequence[Z | None],
        rows: Sequence[int],
        seed: int,
    ) -> list[tuple[int, ...]]:
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else _PAD
        width = max(len(request.context) for request in batch)
        ids = torch.full((len(batch), width), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, width - len(request.context) :] = torch.tensor(request.context, dtype=torch.long)
            mask[row, width - len(request.context) :] = 1
        used, index = _compact(mixtures, rows)
        stop = _RowStop(self.tokenizer, first.stop, width)
        with self.activation(used, index), seeded(seed, self.device):
            try:
                out = self._generator(
                    input_ids=ids.to(self.device),
                    attention_mask=mask.to(self.device),
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
        branches = [Branches(requests[u[0]].context, tuple(requests[i].continuation for i in u)) for u in units]
        with _bar(progress, len(requests)) as bar:
            most = _BATCH_TOKENS[self.device.type == "cuda"]
            for batch in self.likelihood.batches([[item] for item in branches], most, self.batch_size):
                work = [branches[unit] for unit in batch]
                packed = self.likelihood.rows(work, [picked[units[unit][0]] for unit in batch])
                used, index = _compact(mixtures, [picked[units[batch[row[0]]][0]] for row in packed])
                with self.activation(used, index):
                    spans = self.likelihood.run(work, packed)
                order = [i for unit in batch for i in units[unit]]
                for i, value, greedy in zip(order, spans.loglikelihoods().tolist(), spans.greedy(), strict=True):
                    answers[i] = Scored(value, greedy)
                bar.update(len(order))
        return [answer for answer in answers if answer is not None]

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


def _moves(vector: torch.Tensor | None) -> bool:
    return vector is not None and (vector.requires_grad or bool((vector != 1).any()))


def _pick(rows: Sequence[int] | None, batch: Sequence[int]) -> list[int]:
    return [0 if rows is None else rows[i] for i in batch]


def _compact(mixtures: Sequence[Z | None], rows: Sequence[int]) -> tuple[list[Z | None], torch.Tensor | None]:
    """Only the mixtures that a batch uses, and its rows renumbered; no rows when it uses one."""
    used = sorted(set(rows))
    index = None if len(used) == 1 else torch.tensor([used.index(row) for row in rows])
    return [mixtures[i] for i in used], index


def _as_set(value: int | list[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Context in which torch draws from ``seed``; its global generators are as before afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _bar(text: str | None, total: int) -> tqdm[Any]:
    return tqdm(total=total, desc=text, unit="request", disable=text is None, delay=1, leave=False)
