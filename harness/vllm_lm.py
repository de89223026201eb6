"""lm-eval's own ``VLLM``, started so that its weights can be changed; imported only where ``engine=vllm`` is given."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import inspect
import signal
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from lm_eval.models.utils import maybe_truncate
from lm_eval.models.vllm_causallms import VLLM
from transformers import GenerationConfig
from vllm import EngineArgs, SamplingParams

from t2.adapters.checkpoint import Checkpoint, open_checkpoint
from t2.adapters.engine.vllm import VllmEngine, in_one_line
from t2.adapters.engine.vllm_worker import NAME
from t2.core.errors import ArgumentError

_OURS = ("worker_extension_cls", "model", "runner", "convert")
_ENDING = 30.0
"""Seconds in which vLLM's processes end by themselves; by default it kills them while one waits for another."""
_REFUSED = {
    "quantization": "t2 adapts the matrices of an unquantised checkpoint; leave it out",
    "lora_local_path": "t2 adapts the base model; merge the adapter into it",
    "enable_lora": "t2 adapts the base model; leave it out",
    "load_format": "t2 reads safetensors files; leave it out",
}


def arguments() -> list[str]:
    """The named parameters of lm-eval's ``VLLM``, and those of vLLM itself, which it hands on."""
    named = [
        p.name
        for p in inspect.signature(VLLM.__init__).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"
    ]
    own = [field.name for field in dataclasses.fields(EngineArgs)]
    return [name for name in dict.fromkeys([*named, *own]) if name not in _OURS]


class AdaptableVLLM(VLLM):  # type: ignore[misc]
    """lm-eval's ``vllm`` model, with what t2 needs of it.

    Args:
        pretrained: a folder or a Hub name, of safetensors files.
        args: further arguments of ``VLLM``.

    Raises:
        ArgumentError: an argument that adapting rules out.
        ModelError: vLLM does not start.
    """

    def __init__(self, pretrained: str, **args: Any) -> None:
        args.pop("device", None)
        for name, why in _REFUSED.items():
            if args.get(name):
                raise ArgumentError(f"model_args: {name}={args[name]} does not go with engine=vllm: {why}")
        if int(args.get("data_parallel_size") or 1) > 1:
            raise ArgumentError(
                "model_args: data_parallel_size does not go with engine=vllm: lm-eval starts such copies anew for each "
                "call; use tensor_parallel_size"
            )
        self._pretrained = pretrained
        self._revision = args.get("revision")
        with in_one_line(f"does not start with pretrained={pretrained}"), _deaf_to_ctrl_c():
            super().__init__(pretrained=pretrained, worker_extension_cls=NAME, **args)
        atexit.register(self.close)
        self.t2_rules = VLLMRules(self)

    def close(self) -> None:
        """End vLLM's processes, where it has some of its own; asked again it does nothing."""
        atexit.unregister(self.close)
        with contextlib.suppress(AttributeError):
            self.model.llm_engine.engine_core.shutdown(timeout=_ENDING)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.model.llm_engine.vllm_config.device_config.device_type)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        dtype: torch.dtype = self.model.llm_engine.model_config.dtype
        return dtype

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self._config

    @property
    def batch_sizes(self) -> dict[Any, Any]:
        """None are found by trial."""
        return {}

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results."""
        return {"model_dtype": str(self.dtype), "model_revision": self._revision or "main"}

    def tok_decode(self, tokens: int | Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        with in_one_line("cannot answer"):
            return super()._model_generate(*args, **kwargs)

    def ends(self) -> set[int]:
        """Tokens that end an answer: the tokenizer's and those of the generation configuration."""
        ends = {self.tokenizer.eos_token_id}
        with contextlib.suppress(OSError):
            found = GenerationConfig.from_pretrained(self._pretrained, revision=self._revision or "main").eos_token_id
            ends |= set(found if isinstance(found, list) else [found])
        return {int(end) for end in ends if end is not None}

    def engine(self, checkpoint: Checkpoint, base_id: str) -> VllmEngine:
        """The engine over the same model."""
        return VllmEngine(self.model, checkpoint, self.ends(), base_id, self._revision)

    def checkpoint(self, moe: str) -> Checkpoint:
        """The files that it was loaded from.

        Raises:
            ModelError: they are not in safetensors files, are quantised, or have nothing to adapt.
        """
        return open_checkpoint(self._pretrained, self._revision, moe)


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Context in which processes that are started do not hear Ctrl-C, nor do those that they start.

    A terminal sends it to all processes of a command. vLLM's would end at once, before this one could restore the base
    and end them in order.
    """
    # To start this helper of multiprocessing would let Ctrl-C through again.
    resource_tracker.ensure_running()
    start = BaseProcess.start

    def deaf(self: BaseProcess) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            start(self)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    BaseProcess.start = deaf  # type: ignore[method-assign]
    try:
        yield
    finally:
        BaseProcess.start = start  # type: ignore[method-assign]


class VLLMRules:
    """How ``VLLM`` turns requests into tokens: it generates one token after what it scores."""

    def __init__(self, lm: AdaptableVLLM) -> None:
        self._lm = lm

    @property
    def pair(self) -> int:
        """One token less than the model holds."""
        return int(self._lm.max_length) - 1

    @property
    def rolling(self) -> int:
        """Two tokens less than the model holds."""
        return int(self._lm.max_length) - 2

    def prompt(self, context: str, room: int) -> list[int]:
        """Cut from where ``truncation_side`` says."""
        tokens = self._lm.tok_encode([context])[0]
        kept, _ = maybe_truncate(tokens, max_gen_toks=0, max_model_len=room, side=self._lm.truncation_side)
        return list(kept)

    def stops_seen(self, stops: Sequence[str], eos: str) -> list[str]:
        """All, but of a model that thinks first the end of text alone."""
        return [stop for stop in stops if stop == eos] if self._lm.think_end_token else list(stops)

    def check(self, kwargs: Mapping[str, Any]) -> None:
        """Check generation arguments by building vLLM's ``SamplingParams``, which raises on errors."""
        own, until, most = VLLM.modify_gen_kwargs(dict(kwargs), eos=None, default_max_gen_toks=self._lm.max_gen_toks)
        SamplingParams(max_tokens=most, stop=until, **own)

    def arguments(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments without the temperature of greedy decoding."""
        given = dict(kwargs)
        if not given.get("do_sample") and given.get("temperature", 0.0) == 0.0:
            given.pop("temperature", None)
        return given

    def new_tokens(self, asked: int, stops: Sequence[str]) -> int:
        """Return the number of tokens in the request."""
        return asked

    def same_in_batches(self, kwargs: Mapping[str, Any], stops: Sequence[str], eos: str) -> bool:
        """True: vLLM computes each request by itself."""
        return True

    def same_encoded(self, contexts: Sequence[str]) -> bool:
        """True: each prompt is encoded by itself."""
        return True

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """vLLM's own."""
        return contextlib.nullcontext()
