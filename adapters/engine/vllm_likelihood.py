"""How vLLM is asked for likelihoods: of a whole text, or of the tokens that may follow a shared beginning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm import SamplingParams

from t2.adapters.engine.base import Scored, ScoreRequest

_MOST = 128
"""Tokens that vLLM tells the likelihood of after one text (its ``MAX_LOGPROB_TOKEN_IDS``)."""

Tokens = tuple[int, ...]


@dataclass
class Question:
    """One text that vLLM reads.

    Attributes:
        text: its tokens.
        row: which mixture is asked.
        after: the tokens whose likelihood after the text is wanted; none asks for that of each token of the text.
    """

    text: Tokens
    row: int
    after: dict[int, None] = field(default_factory=dict)

    def params(self) -> SamplingParams:
        """The same in vLLM's words."""
        if not self.after:
            return of_text()
        return SamplingParams(
            temperature=0, max_tokens=1, detokenize=False, ignore_eos=True, logprob_token_ids=list(self.after)
        )


class Likelihoods:
    """The questions that give the likelihoods of continuations, the fewest tokens to read.

    Continuations of one token after the same context, such as the labels of a dispatch, are one question. Longer ones
    are read whole, unless reading each of their beginnings, which they may share, takes fewer tokens.

    Args:
        requests: the continuations.
        rows: which mixture is asked, for each.

    Attributes:
        questions: what vLLM is to be asked.
    """

    def __init__(self, requests: Sequence[ScoreRequest], rows: Sequence[int]) -> None:
        self.questions: list[Question] = []
        self._requests = list(zip(requests, rows, strict=True))
        self._places: dict[tuple[int, bool, Tokens], int] = {}
        together: dict[tuple[int, Tokens], dict[Tokens, None]] = {}
        for request, row in self._requests:
            together.setdefault((row, request.context), {})[request.continuation] = None
        self._whole: dict[tuple[int, Tokens], bool] = {}
        for (row, context), continuations in together.items():
            after: dict[Tokens, dict[int, None]] = {}
            for continuation in continuations:
                for i, token in enumerate(continuation):
                    after.setdefault((*context, *continuation[:i]), {})[token] = None
            read = sum(len(context) + len(continuation) for continuation in continuations)
            self._whole[row, context] = whole = (
                sum(map(len, after)) >= read or max(map(len, after.values()), default=0) > _MOST
            )
            asked = {(*context, *continuation): {} for continuation in continuations} if whole else after
            for text, tokens in asked.items():
                self._places[row, whole, text] = len(self.questions)
                self.questions.append(Question(text, row, tokens))

    def read(self, answers: Sequence[Any]) -> list[Scored]:
        """The likelihoods, by vLLM's answers to the questions."""
        return [self._of(request, row, answers) for request, row in self._requests]

    def _of(self, request: ScoreRequest, row: int, answers: Sequence[Any]) -> Scored:
        context, continuation = request.context, request.continuation
        if self._whole[row, context]:
            text = (*context, *continuation)
            found = answers[self._places[row, True, text]].prompt_logprobs[len(context) :]
        else:
            texts = ((*context, *continuation[:i]) for i in range(len(continuation)))
            found = [answers[self._places[row, False, text]].outputs[0].logprobs[0] for text in texts]
        likeliest = [max(known, key=lambda token: known[token].logprob) for known in found]
        return Scored(sum(of_tokens(continuation, found)), likeliest == list(continuation))


def of_text() -> SamplingParams:
    """Asks for the likelihood of each token of a text but the first."""
    return SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False)


def of_tokens(tokens: Iterable[int], found: Iterable[Any]) -> list[float]:
    """Log-likelihood of each token, in nats, of what vLLM tells of each place."""
    return [float(known[token].logprob) for token, known in zip(tokens, found, strict=True)]
