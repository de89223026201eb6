"""Asking a model under mixtures: through lm-eval's own ``hf``, in weight form, as scored answers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance

from t2.adapters.engine.transformers import seeded
from t2.adapters.strategies import Choice
from t2.core.errors import ArgumentError
from t2.core.seeds import derive_seed
from t2.harness.examples import continuation

if TYPE_CHECKING:
    from t2.api.model import Model


def render(model: Model, prompt: str, chat: bool, system: str | None) -> str:
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


def generate(
    model: Model,
    prompts: Sequence[str],
    choices: Sequence[Choice],
    *,
    max_new_tokens: int,
    stop: Sequence[str],
    chat: bool,
    system: str | None,
    seed: int,
    kwargs: Mapping[str, Any],
) -> list[str]:
    """Continue prompts, each under its own mixture; one pass of the model per distinct mixture."""
    if max_new_tokens < 1:
        raise ArgumentError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if max_new_tokens >= model.lm.max_length:
        raise ArgumentError(
            f"max_new_tokens={max_new_tokens} leaves no room in the model's {model.lm.max_length} tokens"
        )
    arguments = {"do_sample": False, **kwargs, "until": list(stop), "max_gen_toks": max_new_tokens}
    answers = [""] * len(prompts)
    for number, indices in enumerate(_groups(choices)):
        requests = [_request("generate_until", render(model, prompts[i], chat, system), arguments) for i in indices]
        own = derive_seed(seed, "generate", number)
        with seeded(own, model.engine.device), model.engine.applied(choices[indices[0]].z):
            found = model.lm.generate_until(requests, disable_tqdm=True)
        for i, text in zip(indices, found, strict=True):
            answers[i] = str(text)
    return answers


def loglikelihoods(
    model: Model, prompt: str, texts: Sequence[str], choice: Choice, *, chat: bool, system: str | None
) -> list[float]:
    """Log-likelihoods in nats of texts that may follow a prompt."""
    if not texts or not all(texts):
        raise ArgumentError("choices: give one or more texts, none of them empty")
    context = render(model, prompt, chat, system)
    requests = [_request("loglikelihood", context, continuation(prompt, text, chat)) for text in texts]
    with model.engine.applied(choice.z):
        return [float(found) for found, _ in model.lm.loglikelihood(requests, disable_tqdm=True)]


def _request(kind: Any, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def _groups(choices: Sequence[Choice]) -> list[list[int]]:
    groups: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for index, choice in enumerate(choices):
        groups.setdefault(tuple(sorted(choice.alpha.items())), []).append(index)
    return list(groups.values())
