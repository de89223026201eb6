"""Asking a model under mixtures: through lm-eval's own ``hf``, in weight form, as scored answers are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import transformers
from lm_eval.api.instance import Instance

from t2.adapters.engine.decoding import seeded
from t2.adapters.strategies import Choice
from t2.core.errors import ArgumentError, nearest
from t2.core.seeds import derive_seed
from t2.harness.examples import continuation
from t2.harness.generation import requested_length
from t2.harness.preflight import check_likelihoods

if TYPE_CHECKING:
    from t2.api.model import Model


_OWN = {
    "max_length": "give max_new_tokens",
    "max_gen_toks": "give max_new_tokens",
    "until": "give stop",
    "stop_strings": "give stop",
    "num_return_sequences": "one answer for each prompt comes back; ask several times with other seeds",
}
"""Arguments of ``generate`` that have another name here, or no place."""


class Asked(ABC):
    """What can be asked: a base model as it is, or under mixtures."""

    @overload
    def generate(
        self,
        prompts: str,
        *,
        max_new_tokens: int = ...,
        stop: Sequence[str] = ...,
        chat: bool = ...,
        system: str | None = ...,
        seed: int = ...,
        **generate_kwargs: Any,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = ...,
        stop: Sequence[str] = ...,
        chat: bool = ...,
        system: str | None = ...,
        seed: int = ...,
        **generate_kwargs: Any,
    ) -> list[str]: ...

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        chat: bool = False,
        system: str | None = None,
        seed: int = 0,
        **generate_kwargs: Any,
    ) -> str | list[str]:
        """Continue prompts greedily, unless told otherwise; each under its mixture, where there is one.

        Args:
            prompts: a text, or several.
            max_new_tokens: at most so many tokens are generated.
            stop: an answer ends before the first of these texts.
            chat: put each prompt into the model's chat template, as a user's message.
            system: a system message before it.
            seed: of sampling.
            generate_kwargs: further arguments of ``transformers``' ``generate``, for example ``do_sample=True``.

        Raises:
            ArgumentError: an argument does not fit, or a prompt is none of those that were dispatched.
        """
        model = self._asks()
        texts = _texts("prompts", [prompts] if isinstance(prompts, str) else prompts)
        choices = [self._choice(text) for text in texts]
        if max_new_tokens < 1:
            raise ArgumentError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if max_new_tokens >= model.lm.max_length:
            raise ArgumentError(
                f"max_new_tokens={max_new_tokens} leaves no room in the model's {model.lm.max_length} tokens"
            )
        _check_arguments(generate_kwargs)
        rendered = [_render(model, text, chat, system) for text in texts]
        for number, text in enumerate(rendered):
            if not model.lm.tok_encode(text):
                raise ArgumentError(f"prompts: number {number} is empty, and this model needs a text to go on from")
        until = stop_texts(stop)
        arguments = {"do_sample": False, **generate_kwargs, "until": until, "max_gen_toks": max_new_tokens}
        answers = [""] * len(texts)
        for number, indices in enumerate(_groups(choices)):
            requests = [_request("generate_until", rendered[i], arguments) for i in indices]
            own = derive_seed(seed, "generate", number)
            applied = model.engine.applied(choices[indices[0]].z)
            with applied, requested_length(model.lm), seeded(own, model.engine.device):
                try:
                    found = model.lm.generate_until(requests, disable_tqdm=True)
                except (ValueError, TypeError) as error:  # transformers' own checks of its arguments
                    if not generate_kwargs:
                        raise
                    given = ", ".join(f"{name}={value!r}" for name, value in generate_kwargs.items())
                    raise ArgumentError(f"generate: transformers refuses {given}: {error}") from error
            for i, answer in zip(indices, found, strict=True):
                answers[i] = str(answer)
        return answers[0] if isinstance(prompts, str) else answers

    def loglikelihoods(
        self, prompt: str, choices: Sequence[str], *, chat: bool = False, system: str | None = None
    ) -> list[float]:
        """Log-likelihoods in nats of choices after a prompt, under its mixture where there is one.

        A space parts prompt and choice where neither has white space there and no chat template is used.

        Raises:
            ArgumentError: as :meth:`generate`.
        """
        model = self._asks()
        if isinstance(choices, str) or not choices or not all(_texts("choices", choices)):
            raise ArgumentError("choices: give a list of one or more texts, none of them empty")
        context = _render(model, prompt, chat, system)
        requests = [_request("loglikelihood", context, continuation(prompt, text, chat)) for text in choices]
        check_likelihoods("loglikelihoods", model.lm, requests)
        with model.engine.applied(self._choice(prompt).z):
            return [float(found) for found, _ in model.lm.loglikelihood(requests, disable_tqdm=True)]

    @abstractmethod
    def _asks(self) -> Model:
        """The base model."""

    @abstractmethod
    def _choice(self, prompt: str | None) -> Choice:
        """The mixture that answers a prompt."""


def _render(model: Model, prompt: str, chat: bool, system: str | None) -> str:
    """A prompt in the model's chat template, or as it is.

    Raises:
        ArgumentError: a system message without a chat template, or a tokenizer that has none.
    """
    if not chat:
        if system is not None:
            raise ArgumentError("system= is a message of a chat; give chat=True too")
        return prompt
    if not getattr(model.lm.tokenizer, "chat_template", None):
        raise ArgumentError(f"{model.base.id} has no chat template; leave chat=True out")
    history = [{"role": "system", "content": system}] if system is not None else []
    return str(model.lm.apply_chat_template([*history, {"role": "user", "content": prompt}]))


def _texts(name: str, given: Any) -> list[str]:
    texts = list(given) if isinstance(given, Iterable) else [given]
    odd = next((text for text in texts if not isinstance(text, str)), None)
    if odd is not None:
        raise ArgumentError(f"{name}: {odd!r} is no text")
    return texts


def stop_texts(stop: str | Sequence[str]) -> list[str]:
    """The texts that an answer ends before.

    Raises:
        ArgumentError: one is empty, or no text.
    """
    texts = _texts("stop", [stop] if isinstance(stop, str) else stop)
    if "" in texts:
        raise ArgumentError("stop: an empty text would end every answer; leave it out")
    return texts


def _check_arguments(kwargs: Mapping[str, Any]) -> None:
    configure: Any = transformers.GenerationConfig
    known = [name for name in configure().to_dict() if name not in _OWN and name[0] != "_"]
    for name in kwargs:
        if name in _OWN:
            raise ArgumentError(f"generate: {name} is not given here; {_OWN[name]}")
        if name not in known:
            raise ArgumentError(f"generate: {name} is not an argument of transformers' generate{nearest(name, known)}")


def _request(kind: Any, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def _groups(choices: Sequence[Choice]) -> list[list[int]]:
    groups: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for index, choice in enumerate(choices):
        groups.setdefault(tuple(sorted(choice.alpha.items())), []).append(index)
    return list(groups.values())
