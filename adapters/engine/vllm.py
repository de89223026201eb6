"""The engine over vLLM: one mixture at a time, in the weights that vLLM's workers hold."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
import vllm.exceptions
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.v1.engine.exceptions import EngineDeadError

from t2.adapters.basis import Basis, load_bases, matrix_digest
from t2.adapters.checkpoint import Checkpoint
from t2.adapters.engine.base import Generated, GenerateRequest, Scored, ScoreRequest
from t2.adapters.engine.vllm_likelihood import Likelihoods, of_text, of_tokens
from t2.adapters.engine.vllm_worker import Place, Plan
from t2.adapters.expert import Z, by_weight, z_digest
from t2.adapters.progress import request_bar
from t2.adapters.targets import Ranks, warn_left_out
from t2.core.errors import ArgumentError, ModelError
from t2.core.manifest import BaseModelRef
from t2.core.seeds import derive_seed
from t2.core.settings import cache_dir

# The base of vLLM's own errors has come in some version; before, those it does not hold are of these kinds.
_OF_VLLM: type[Exception] = getattr(vllm.exceptions, "VLLMError", EngineDeadError)
_FAILURES = (RuntimeError, ValueError, TypeError, AssertionError, OSError, KeyError, EngineDeadError, _OF_VLLM)
_AS_LM_EVAL = {"skip_special_tokens": False, "spaces_between_special_tokens": False}


@dataclass(frozen=True)
class _Stored:
    """A matrix of a checkpoint, in the dtype that the model computes in."""

    checkpoint: Checkpoint
    name: str
    dtype: torch.dtype

    @property
    def rank(self) -> int:
        return self.checkpoint.targets[self.name].rank

    @property
    def matrix(self) -> torch.Tensor:
        return self.checkpoint.matrix(self.name).to(self.dtype)


class VllmEngine:
    """A model in vLLM that answers under mixtures, one after another.

    A mixture is put into the weights: vLLM's workers, which have the methods of
    :class:`t2.adapters.engine.vllm_worker.Worker`, get z and load the layers that differ from what they hold; after
    that, what vLLM had kept of prompts is let go. The base comes back from the checkpoint, so it is exact.

    Args:
        llm: vLLM's model, started with ``worker_extension_cls`` :data:`t2.adapters.engine.vllm_worker.NAME`.
        checkpoint: what it was loaded from; every worker sees these files and the cache of bases.
        ends: tokens that end an answer.
        base_id: the name it was loaded by.
        revision: its revision.

    Attributes:
        switches: how often the weights have been changed.

    Raises:
        ModelError: the checkpoint cannot be read, or holds some adaptable matrices in another way than one by one.
    """

    supports_rows = False

    def __init__(
        self,
        llm: LLM,
        checkpoint: Checkpoint,
        ends: Iterable[int],
        base_id: str,
        revision: str | None = None,
    ) -> None:
        self.llm = llm
        self.lock = threading.RLock()
        self._ends = sorted(set(ends))
        self.dtype: torch.dtype = llm.llm_engine.model_config.dtype
        self._matrices = {name: _Stored(checkpoint, name, self.dtype) for name in checkpoint.targets}
        self._digests = {name: matrix_digest(stored.matrix) for name, stored in self._matrices.items()}
        self._ranks = Ranks(checkpoint.targets, self._digests)
        self.base = BaseModelRef(id=base_id, revision=revision, fingerprint=self._ranks.fingerprint)
        warn_left_out(base_id, checkpoint.left_out)
        self._bases: dict[str, Basis] = {}
        self.switches = 0
        self._held: Z = {}
        self._meant: Z = {}
        self._depth = 0
        self._spans = 0
        self._failed: str | None = None
        places = {
            name: Place(checkpoint.keys(name), self._digests[name], stored.rank, checkpoint.targets[name].transposed)
            for name, stored in self._matrices.items()
        }
        files = {key: str(path) for key, path in checkpoint.places.items()}
        self._ask("t2_open", Plan(places, files, str(cache_dir() / "bases")).text())

    @property
    def precision(self) -> str:
        """The dtype of the weights by name, for example ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")

    def ranks(self) -> Ranks:
        """The rank of every adaptable matrix, by parameter name."""
        return self._ranks

    def bases(self, names: Iterable[str], progress: bool = True) -> dict[str, Basis]:
        """The bases of some matrices, from the cache, else built of the checkpoint and kept there for the workers.

        Raises:
            ModelError: the model has no such matrix.
            StorageError: a basis could not be written to the cache.
        """
        wanted = {name: self._ranks.aliases.get(name, name) for name in names}
        missing = [name for name in dict.fromkeys(wanted.values()) if name not in self._bases]
        for name in missing:
            if name not in self._matrices:
                raise ModelError(f"{self.base.id} has no adaptable matrix {name}")
        if missing:
            stored = {name: self._matrices[name] for name in missing}
            self._bases.update(load_bases(stored, self._digests, progress=progress))
        return {name: self._bases[own] for name, own in wanted.items()}

    @contextlib.contextmanager
    def applied(self, z: Z | None) -> Iterator[None]:
        """Inside the context the model is the base under ``z``, for any caller; None leaves it as it is.

        What it was before comes back exactly, also after an error. Of contexts inside each other the inner one holds.

        Raises:
            ModelError: the model has no matrix of that name, or vLLM has failed.
        """
        with self.lock, self._returning():
            if z is not None:
                self._meant = self._moving(z)
            self._switch(self._meant)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    @contextlib.contextmanager
    def switching(self, experts: Sequence[Z], mixtures: Sequence[Z | None]) -> Iterator[None]:
        """Inside the context the weights go from one mixture to the next, not by way of the base.

        What the model was comes back when it is asked for, at the latest with the end of the context.
        """
        with self._returning():
            self._spans += 1
            try:
                yield
            finally:
                self._spans -= 1

    @contextlib.contextmanager
    def _returning(self) -> Iterator[None]:
        """Afterwards the model is what it was before, also after an error."""
        meant = self._meant
        try:
            yield
        except BaseException:
            self._meant = meant
            # An engine that has ended, by Ctrl-C or out of memory, can no longer be changed; that is not the news.
            with contextlib.suppress(ModelError):
                self._settle()
            raise
        self._meant = meant
        self._settle()

    def _settle(self) -> None:
        # Inside `applied` others ask vLLM too, so there the weights are at once what they are meant to be.
        if self._depth or not self._spans:
            self._switch(self._meant)

    def release(self) -> None:
        """Nothing is kept."""

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        mixtures: Sequence[Z | None] = (None,),
        rows: Sequence[int] | None = None,
        *,
        seed: int = 0,
        progress: str | None = None,
    ) -> list[Generated]:
        """Continue prompts, mixture by mixture; see :class:`t2.adapters.engine.Engine`.

        Each request that samples has a seed of its own, so an answer does not depend on its company.

        Raises:
            ArgumentError: vLLM does not know a sampling argument.
            ModelError: vLLM has failed.
        """
        params = [self._sampling(request, derive_seed(seed, "generate", i)) for i, request in enumerate(requests)]
        prompts = [request.context for request in requests]
        found = self._run(prompts, params, mixtures, rows, progress)
        return [Generated(tuple(out.outputs[0].token_ids), out.outputs[0].text) for out in found]

    def score(
        self,
        requests: Sequence[ScoreRequest],
        mixtures: Sequence[Z | None] = (None,),
        rows: Sequence[int] | None = None,
        *,
        progress: str | None = None,
    ) -> list[Scored]:
        """Log-likelihoods of continuations, mixture by mixture; see :class:`t2.adapters.engine.Engine`.

        Raises:
            ModelError: vLLM has failed.
        """
        asked = Likelihoods(requests, [0] * len(requests) if rows is None else rows)
        params = [question.params() for question in asked.questions]
        texts, owners = ([getattr(question, name) for question in asked.questions] for name in ("text", "row"))
        return asked.read(self._run(texts, params, mixtures, owners, progress))

    def probe(self, tokens: Sequence[int], mixtures: Sequence[Z | None] = (None,)) -> list[torch.Tensor]:
        """Log-likelihood of each token of a text after the first, under each mixture; see :class:`Engine`."""
        prompt = tuple(tokens)
        found = self._run([prompt] * len(mixtures), [of_text()] * len(mixtures), mixtures, range(len(mixtures)))
        return [torch.tensor(of_tokens(prompt[1:], out.prompt_logprobs[1:]), dtype=torch.float64) for out in found]

    def _run(
        self,
        prompts: Sequence[tuple[int, ...]],
        params: Sequence[SamplingParams],
        mixtures: Sequence[Z | None],
        rows: Sequence[int] | None,
        progress: str | None = None,
    ) -> list[Any]:
        every = [0] * len(prompts) if rows is None else list(rows)
        answers: list[Any] = [None] * len(prompts)
        with request_bar(progress, len(prompts)) as bar, self.lock, self._returning():
            for index in dict.fromkeys(every):
                own = [i for i, row in enumerate(every) if row == index]
                z = mixtures[index]
                self._switch(self._meant if z is None else self._moving(z))
                asked = [TokensPrompt(prompt_token_ids=list(prompts[i])) for i in own]
                found = self._answers(asked, [params[i] for i in own])
                for i, out in zip(own, found, strict=True):
                    answers[i] = out
                bar.update(len(own))
        return answers

    def _answers(self, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> list[Any]:
        try:
            with in_one_line("cannot answer"):
                return list(self.llm.generate(prompts, params, use_tqdm=False))
        except BaseException:
            # What vLLM has begun it would go on with at the next call, under other weights.
            with contextlib.suppress(Exception):
                engine = self.llm.llm_engine
                engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise

    def _switch(self, z: Z) -> None:
        """Become the base under the moving vectors of a mixture.

        Raises:
            ModelError: a worker failed; nothing is answered from then on, for the weights may be of two mixtures.
        """
        if self._failed is not None:
            raise ModelError(f"vLLM could not change the mixture ({self._failed}); start again")
        if z_digest(z) == z_digest(self._held):
            return
        self.bases(z)
        content = safetensors.torch.save({name: vector.float().contiguous() for name, vector in z.items()})
        try:
            self._ask("t2_apply", content)
            with in_one_line("cannot let go of what it kept of prompts"):
                if not self.llm.reset_prefix_cache():
                    raise RuntimeError("its prefix cache is in use")
        except BaseException as error:
            self._failed = str(error)[:200] or type(error).__name__
            raise
        self._held = z
        self.switches += 1

    def _moving(self, z: Z) -> Z:
        named = by_weight(z, self._ranks.aliases, f"a mixture on {self.base.id}")
        return {name: vector for name, vector in named.items() if bool((vector != 1).any())}

    def _ask(self, method: str, argument: str | bytes) -> None:
        with in_one_line("cannot change its weights"):
            self.llm.collective_rpc(method, args=(argument,))

    def _sampling(self, request: GenerateRequest, seed: int) -> SamplingParams:
        """vLLM's arguments for a request, by the rules of lm-eval's ``VLLM``."""
        kwargs = {**_AS_LM_EVAL, **request.kwargs}
        samples = kwargs.pop("do_sample", None)
        if samples is None:
            samples = float(kwargs.get("temperature") or 0.0) > 0
        if not samples:
            kwargs["temperature"] = 0.0
        elif kwargs.get("temperature") is None:
            kwargs["temperature"] = 1.0
        try:
            return SamplingParams(
                max_tokens=request.max_new_tokens,
                stop=[text for text in request.stop if text],
                stop_token_ids=self._ends,
                seed=(seed if request.seed is None else request.seed) if samples else None,
                **kwargs,
            )
        except _FAILURES as error:
            given = ", ".join(f"{name}={value!r}" for name, value in request.kwargs.items())
            raise ArgumentError(f"vLLM refuses to generate with {given}: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Context in which what vLLM raises becomes a :class:`ModelError`."""
    try:
        yield
    except _FAILURES as error:
        told = " ".join(str(error).split())
        raise ModelError(f"vLLM {what}: {type(error).__name__}: {told[:600]}") from error
