"""Supervised learning of right answers, token by token: the paper's next-token objective (its Table 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance

from t2.adapters.engine.likelihood import Branches, Spans
from t2.adapters.expert import Z
from t2.core.errors import TaskError
from t2.harness.tasks import encode_pair
from t2.training.objective import vocabulary_kl
from t2.training.passes import Gradient, Result, accumulate, gradient
from t2.training.problem import Measured, Problem, Setup


@dataclass(frozen=True)
class _Part:
    """What one pass adds to a step: its share of J, of the penalty and of the gradient, and the tokens it got right."""

    gradient: Gradient
    reward: float
    penalty: float
    likeliest: int


class NextTokenProblem:
    """Maximises the mean log-likelihood per token of right answers, J = 1/T · Σ_d Σ_t log π(y_dt | x_d, y_d,<t).

    y_d is the document's right answer: the text that few-shot examples would show, or the right choice. T counts the
    tokens of the step's answers. The penalty is per token: the mean of KL(policy‖base) at the same positions. The
    reward that this problem reports is J, in nats; the score is that of what the model answers by itself.

    Args:
        setup: what every problem needs.
        answers: measures what the model answers.

    Raises:
        TaskError: a validation document has no right answer.
    """

    method = "next-token"

    def __init__(self, setup: Setup, answers: Problem) -> None:
        self.setup = setup
        self.kl = setup.config.kls[0]
        self._answers = answers
        self._train: dict[int, Branches] = {}
        self._validation = self._prepare(setup.validation)

    def has_signal(self) -> bool:
        """Every right answer is one, whatever the base model answers."""
        return True

    @torch.no_grad()
    def measure(self, z: Z | None, progress: str | None = None) -> Measured:
        """See :class:`Problem`; KL is not measured here."""
        score = self._answers.measure(z, progress).score
        total = 0.0
        with self.setup.engine.applied(z):
            for _, spans in self._passes(
                self._validation, lambda batch: self._run([self._validation[i] for i in batch])
            ):
                total += float(spans.token_logprobs().sum())
        return Measured(total / sum(item.positions for item in self._validation), score)

    def accumulate(self, z: Mapping[str, torch.Tensor], docs: Sequence[int], step: int) -> Measured:
        """See :class:`Problem`; the score is the share of tokens that were the likeliest."""
        self.setup.passes.begin(step)
        missing = sorted({i for i in docs if i not in self._train})
        self._train.update(zip(missing, self._prepare([self.setup.train[i] for i in missing]), strict=True))
        answers = [self._train[i] for i in docs]
        tokens = sum(item.positions for item in answers)
        reward = penalty = 0.0
        likeliest = 0
        for _, part in self._passes(answers, lambda batch: self._part(z, [answers[i] for i in batch], tokens)):
            accumulate(z, part.gradient)
            reward += part.reward
            penalty += part.penalty
            likeliest += part.likeliest
        return Measured(reward, likeliest / tokens, penalty if self.kl > 0 else None)

    def _part(self, z: Mapping[str, torch.Tensor], answers: Sequence[Branches], tokens: int) -> _Part:
        base = None
        if self.kl > 0:
            with self.setup.passes.base(z):
                base = self._run(answers)
        with self.setup.passes.trained(z):
            spans = self._run(answers)
            gain = spans.token_logprobs().sum() / tokens
            reward, penalty = float(gain.detach()), 0.0
            likeliest = int((spans.logits.detach().argmax(dim=-1) == spans.tokens).sum())
            if base is not None:
                kl = vocabulary_kl(spans.logits, base.logits).sum() / tokens
                penalty = float(kl.detach())
                gain = gain - self.kl * kl
            return _Part(gradient(-gain, z), reward, penalty, likeliest)

    def _run(self, part: Sequence[Branches]) -> Spans:
        return self.setup.model.run(part)

    def _passes(
        self, answers: Sequence[Branches], work: Callable[[list[int]], Result]
    ) -> Iterator[tuple[list[int], Result]]:
        return self.setup.passes.run([[item] for item in answers], work)

    def _prepare(self, docs: Sequence[Any]) -> list[Branches]:
        built = self.setup.docs.instances(docs)
        return [self._right_answer(doc, instances) for doc, instances in zip(docs, built, strict=True)]

    def _right_answer(self, doc: Any, instances: Sequence[Instance]) -> Branches:
        docs = self.setup.docs
        if not docs.labelled(doc):
            raise TaskError(f"objective=next-token needs right answers, and a document of task {docs.name} has none")
        if docs.output_type == "generate_until":
            text = str(docs.gold_text(doc))
            if docs.form.apply_chat_template:
                # The template itself ends where the answer begins.
                text = text.removeprefix(docs.task.config.target_delimiter or "")
            request = docs.window(*encode_pair(docs.lm, str(instances[0].args[0]), text))
        else:
            request = docs.continuation(instances[docs.gold_index(doc)[0]])
        return Branches(request.context, (request.continuation,))
