"""Learning from tasks that ask for generated answers: REINFORCE over sampled or greedy rollouts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lm_eval.api.instance import Instance

from t2.adapters.engine import GenerateRequest
from t2.adapters.engine.decoding import plain_sampling
from t2.adapters.engine.likelihood import Branches
from t2.adapters.expert import Z
from t2.core.errors import TaskError
from t2.core.seeds import derive_seed
from t2.training.objective import advantages, reinforce, vocabulary_kl
from t2.training.passes import Gradient, accumulate, gradient
from t2.training.problem import Measured, Setup
from t2.training.rewards import check_form

_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "num_beams", "repetition_penalty")


@dataclass(frozen=True)
class Rollout:
    """One answer: the document's index among those asked for, its prompt and answer tokens, its metrics and reward."""

    doc: int
    context: tuple[int, ...]
    tokens: tuple[int, ...]
    metrics: dict[str, Any]
    reward: float


class GenerationProblem:
    """REINFORCE on generated answers.

    Sampled answers come from softmax(logits/τ) over the whole vocabulary, without the task's own top-k or top-p and
    without what the model's generation configuration says of logits, so that their probability under the policy is
    that of the gradient. Greedy answers (τ = 0) have the gradient of log π at τ = 1, as in the public code of
    Transformer²; that is not an estimate of the expected reward's gradient.

    Raises:
        TaskError: the task asks for more than one answer per document.
    """

    method = "reinforce"

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.kl = setup.config.kls[0]
        if setup.config.reward_format:
            check_form(setup.docs, setup.train[0])
        self._train: dict[int, Instance] = {}
        self._validation = self._prepare(setup.validation)
        self._rewards: list[float] = []

    def has_signal(self) -> bool:
        """Whether greedy answers, or else sampled ones, of the base model earn different rewards."""
        rewards = set(self._rewards)
        if len(rewards) < 2 and self.setup.config.temperature > 0:
            seed = derive_seed(self.setup.config.seed, "rollouts", "base")
            sampled = self._answer(self.setup.validation, self._validation, None, seed, "Sampling the base model")
            rewards |= {rollout.reward for rollout in sampled}
        return len(rewards) > 1

    def measure(self, z: Z | None, progress: str | None = None) -> Measured:
        """See :class:`Problem`; answers are those of the task's own generation arguments. KL is not measured here."""
        docs = self.setup.docs
        with self.setup.rollouts.applied(z):
            answers = docs.answer(
                self.setup.rollouts,
                [[instance] for instance in self._validation],
                seed=derive_seed(self.setup.config.seed, "validation"),
                progress=progress,
            )
        judged = [
            self.setup.judge(doc, instance, str(response))
            for doc, instance, (response,) in zip(self.setup.validation, self._validation, answers, strict=True)
        ]
        rewards = [reward for _, reward in judged]
        if z is None:
            self._rewards = rewards
        return Measured(math.fsum(rewards) / len(rewards), self.setup.score([metrics for metrics, _ in judged]))

    def accumulate(self, z: Mapping[str, torch.Tensor], docs: Sequence[int], step: int) -> Measured:
        """See :class:`Problem`."""
        self.setup.passes.begin(step)
        config = self.setup.config
        missing = sorted({i for i in docs if i not in self._train})
        self._train.update(zip(missing, self._prepare([self.setup.train[i] for i in missing]), strict=True))
        rollouts = self._answer(
            [self.setup.train[i] for i in docs],
            [self._train[i] for i in docs],
            {name: vector.detach().cpu() for name, vector in z.items()},
            derive_seed(config.seed, "rollouts", step),
            None,
        )
        rewards = torch.tensor([rollout.reward for rollout in rollouts]).view(len(docs), config.samples)
        gains = advantages(rewards, config.baseline).flatten().tolist()
        kl = self._gradient(z, rollouts, gains)
        score = self.setup.score([rollout.metrics for rollout in rollouts])
        return Measured(float(rewards.mean()), score, kl)

    def _gradient(
        self, z: Mapping[str, torch.Tensor], rollouts: Sequence[Rollout], gains: Sequence[float]
    ) -> float | None:
        total = sum(len(rollout.tokens) for rollout in rollouts)
        # An answer without advantage has no gradient, unless the penalty gives it one.
        kept = [i for i, rollout in enumerate(rollouts) if rollout.tokens and (gains[i] != 0 or self.kl > 0)]
        answers: dict[int, list[int]] = {}
        for i in kept:
            answers.setdefault(rollouts[i].doc, []).append(i)
        groups = [part for group in answers.values() for part in self._chunks(group, rollouts)]
        units = [[Branches(rollouts[g[0]].context, tuple(rollouts[i].tokens for i in g))] for g in groups]
        weights = [torch.tensor([gains[j] for j in group]) / len(rollouts) for group in groups]
        penalty = 0.0
        for _, part in self.setup.passes.run(
            units,
            lambda batch: self._part(
                z, [units[i][0] for i in batch], torch.cat([weights[i] for i in batch]), self.kl / total
            ),
        ):
            accumulate(z, part[0])
            penalty += part[1] / total
        return penalty if self.kl > 0 else None

    def _chunks(self, group: Sequence[int], rollouts: Sequence[Rollout]) -> list[list[int]]:
        """Answers to one prompt that share its context in a pass, so many that they fill one."""
        chunks: list[list[int]] = []
        left = 0
        for i in group:
            tokens = len(rollouts[i].tokens)
            if tokens > left:
                chunks.append([])
                left = self.setup.passes.micro_tokens - len(rollouts[i].context)
            chunks[-1].append(i)
            left -= tokens
        return chunks

    def _part(
        self, z: Mapping[str, torch.Tensor], items: Sequence[Branches], weights: torch.Tensor, kl_weight: float
    ) -> tuple[Gradient, float]:
        """The gradient of one pass's share of the loss, and the sum of KL over its positions."""
        temperature = self.setup.config.temperature or 1.0
        base = None
        if self.kl > 0:
            with self.setup.passes.base(z):
                base = self.setup.model.run(items)
        with self.setup.passes.trained(z):
            spans = self.setup.model.run(items)
            gain = reinforce(spans.loglikelihoods(temperature), weights.to(spans.logits.device))
            apart = 0.0
            if base is not None:
                kl = vocabulary_kl(spans.logits, base.logits, temperature).sum()
                apart = float(kl.detach())
                gain = gain - kl_weight * kl
            return gradient(-gain, z), apart

    def _answer(
        self, docs: Sequence[Any], instances: Sequence[Instance], z: Z | None, seed: int, progress: str | None
    ) -> list[Rollout]:
        config, source = self.setup.config, self.setup.docs
        requests = [self._sampling(source.generation(instance)) for instance in instances]
        asked = [request for request in requests for _ in range(config.samples)]
        # An engine of vLLM has no such model, and samples by the request's arguments alone.
        model = getattr(self.setup.rollouts, "model", None)
        plain = contextlib.nullcontext() if model is None or not config.temperature else plain_sampling(model)
        with self.setup.rollouts.applied(z), plain:
            found = self.setup.rollouts.generate(asked, seed=seed, progress=progress)
        rollouts = []
        for i, (request, answer) in enumerate(zip(asked, found, strict=True)):
            doc = i // config.samples
            metrics, reward = self.setup.judge(docs[doc], instances[doc], source.text(answer.tokens, request.stop))
            rollouts.append(Rollout(doc, request.context, answer.tokens, metrics, reward))
        return rollouts

    def _sampling(self, request: GenerateRequest) -> GenerateRequest:
        kwargs = {name: value for name, value in request.kwargs.items() if name not in _SAMPLING}
        temperature = self.setup.config.temperature
        if temperature == 0:
            kwargs |= {"do_sample": False}
        else:
            kwargs |= {
                "do_sample": True,
                "temperature": temperature,
                "top_k": 0,
                "top_p": 1.0,
                "repetition_penalty": 1.0,
            }
        return replace(request, kwargs=kwargs)

    def _prepare(self, docs: Sequence[Any]) -> list[Instance]:
        built = self.setup.docs.instances(docs)
        for instances in built:
            if len(instances) != 1:
                raise TaskError(
                    f"task {self.setup.docs.name} asks for {len(instances)} answers per document; t2 trains on tasks "
                    "that ask for one"
                )
        return [instances[0] for instances in built]
