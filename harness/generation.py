"""Generation requests as lm-eval's own model takes and answers them, for an engine to answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from t2.adapters.engine.base import Generated, GenerateRequest
from t2.core.errors import ArgumentError, TaskError
from t2.harness.rules import rules_of

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", "max_length")
"""Generation arguments that limit an answer's length."""


class Generations:
    """Requests to engines, and their tokens back to texts, by the rules of one of lm-eval's models.

    Args:
        lm: the model.
    """

    def __init__(self, lm: TemplateLM) -> None:
        self._lm: Any = lm
        self._rules = rules_of(lm)

    def request(self, instance: Instance) -> GenerateRequest:
        """A request's tokens and arguments.

        Raises:
            TaskError: the answer's room leaves none for the prompt.
        """
        context, gen_kwargs = instance.args[:2]
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self._lm.max_gen_toks))
        kwargs.pop("until", None)
        stops = self.stops(instance)
        new_tokens = int(kwargs.pop("max_gen_toks"))
        room = self._lm.max_length - new_tokens
        if room <= 0:
            raise TaskError(
                f"task {instance.task_name} asks for {new_tokens} new tokens, the model holds {self._lm.max_length} in "
                "all; lower max_gen_toks or raise max_length"
            )
        tokens = tuple(self._rules.prompt(context, room))
        if "max_length" in kwargs:
            new_tokens = max(1, int(kwargs.pop("max_length")) - len(tokens))
        new_tokens = self._rules.new_tokens(new_tokens, stops)
        seen = tuple(self._rules.stops_seen(stops, self._eos))
        return GenerateRequest(tokens, new_tokens, seen, self._rules.arguments(kwargs))

    def same_in_batches(self, requests: Sequence[Instance]) -> bool:
        """Whether an engine's batches give exactly the answers of lm-eval's model.

        Where they do not, lm-eval's model has to answer itself. Sampled answers count as the same: each is drawn from
        the same distribution.
        """
        contexts = [str(request.args[0]) for request in requests]
        blank = [request for request, context in zip(requests, contexts, strict=True) if not context.strip()]
        if not self._rules.same_encoded(contexts) or not all(self.request(request).context for request in blank):
            return False
        return all(self.is_implemented(own[0]) for own in by_arguments(requests))

    def is_implemented(self, request: Instance) -> bool:
        """Whether an engine's batches give the answers of lm-eval's model under a request's arguments."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1], self._lm.max_gen_toks))
        for name in ("until", "max_gen_toks"):
            kwargs.pop(name, None)
        return self._rules.same_in_batches(self._rules.arguments(kwargs), self.stops(request), self._eos)

    def samples(self, instance: Instance) -> bool:
        """Whether a request's answer is drawn at random."""
        return bool(normalize_gen_kwargs(instance.args[1], self._lm.max_gen_toks).get("do_sample"))

    def stops(self, instance: Instance) -> list[str]:
        """The texts that a request's answer ends before."""
        until = normalize_gen_kwargs(instance.args[1], self._lm.max_gen_toks).get("until")
        return list(handle_stop_sequences(until, eos=self._eos))

    def text(self, tokens: Sequence[int], stop: Sequence[str]) -> str:
        """The text of an answer's tokens."""
        kept = list(tokens)
        end = self._lm.think_end_token
        if isinstance(end, int) and end in kept:
            kept = kept[len(kept) - kept[::-1].index(end) :]
        text = self._lm.tok_decode(kept)
        if isinstance(end, int):
            text = text.lstrip()
        return str(postprocess_generated_text(text, list(stop), end if isinstance(end, str) else None))

    def answer(self, instance: Instance, found: Generated) -> str:
        """What a request is answered, from what an engine generated."""
        stop = self.stops(instance)
        if found.text is None:
            return self.text(found.tokens, stop)
        return str(postprocess_generated_text(found.text, stop, self._lm.think_end_token))

    @property
    def _eos(self) -> str:
        end = self._lm.eot_token_id
        return "" if end is None else str(self._lm.tok_decode(end, skip_special_tokens=False))


@contextlib.contextmanager
def requested_length(lm: Any) -> Iterator[None]:
    """Context in which a request's length holds, also where the model's generation configuration has one of its own.

    In ``transformers`` the configuration's ``max_new_tokens`` comes before the ``max_length`` that lm-eval computes
    from a request. lm-eval's runs keep that; the caller of a Python function gets the length it names.
    """
    config = getattr(getattr(lm, "model", None), "generation_config", None)
    if config is None:  # vLLM has no such configuration
        yield
        return
    own, config.max_new_tokens = config.max_new_tokens, None
    try:
        yield
    finally:
        config.max_new_tokens = own


def by_arguments(requests: Sequence[Instance]) -> list[list[Instance]]:
    """Requests that differ in their prompts alone, together."""
    groups: dict[str, list[Instance]] = {}
    for request in requests:
        groups.setdefault(repr(sorted(request.args[1].items())), []).append(request)
    return list(groups.values())


def chat_text(
    lm: Any, history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True, *, where: str = ""
) -> str:
    """Chat messages as one prompt, by lm-eval's model.

    Args:
        lm: the model.
        history: the messages.
        add_generation_prompt: end where the answer begins.
        where: what needs the template, for the message; empty where the user asked for it.

    Raises:
        ArgumentError: the model has no chat template, or its template refuses the messages.
    """
    try:
        return str(lm.apply_chat_template(list(history), add_generation_prompt))
    except (TypeError, ValueError, jinja2.TemplateError) as error:
        begin = f"{where}; " if where else ""
        if not getattr(lm.tokenizer, "chat_template", None):
            hint = "name a tokenizer= with one" if where else "leave --apply_chat_template out"
            raise ArgumentError(f"{begin}the tokenizer has no chat template; {hint}") from error
        told = " ".join(str(error).split())
        raise ArgumentError(
            f"{begin}the chat template cannot be applied: {told[:400]}; change the messages or it"
        ) from error
