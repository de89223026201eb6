"""Generation requests as lm-eval's own model takes and answers them, for an engine to answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from t2.adapters.engine.base import Generated, GenerateRequest
from t2.core.errors import TaskError
from t2.harness.rules import rules_of


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
        stop = self._rules.stops_seen(self.stops(instance), self._eos)
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
        if not kwargs.get("do_sample") and kwargs.get("temperature", 0.0) == 0.0:
            kwargs.pop("temperature", None)
        return GenerateRequest(tokens, new_tokens, tuple(stop), kwargs)

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
        return str(self._lm.tok_decode(self._lm.eot_token_id, skip_special_tokens=False))
