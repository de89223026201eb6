"""Learning from tasks that ask for likelihoods: the policy is the softmax over the choices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from tqdm import tqdm

from t2.adapters.engine.likelihood import Branches, Spans
from t2.adapters.expert import Z
from t2.core.errors import TaskError
from t2.core.seeds import derive_seed
from t2.training.config import TrainConfig
from t2.training.objective import (
    Normalise,
    advantages,
    choice_kl,
    choice_scores,
    expected_reward,
    reinforce,
)
from t2.training.passes import Gradient, Result, accumulate, gradient
from t2.training.problem import Measured, Setup

_NEVER = -1e4
"""Log-likelihood of the choices not taken when the task is asked what a choice would earn."""


@dataclass(frozen=True)
class ChoiceDoc:
    """A document as choices.

    Attributes:
        doc: the document.
        instances: its requests; the first ``len(rewards)`` are the choices, or the only one is hit or missed.
        unit: what is run: choices with the same context branch from it.
        order: for each continuation of the unit in turn, the index of its request.
        rewards: what each choice earns, shape (choices,).
        lengths: of each choice, shape (choices,), for normalising.
        single: the one request is an answer that the model gives or does not give.
    """

    doc: Any
    instances: list[Instance]
    unit: list[Branches]
    order: list[int]
    rewards: torch.Tensor
    lengths: torch.Tensor
    single: bool


@dataclass(frozen=True)
class _Part:
    """What one pass adds to a step; sums over its documents, the gradient of the loss."""

    gradient: Gradient
    reward: float
    penalty: float
    metrics: list[dict[str, Any]]


class ChoiceProblem:
    """Expected reward with its exact gradient, or REINFORCE over sampled choices.

    Raises:
        TaskError: the task's answers cannot be chosen.
    """

    def __init__(self, setup: Setup, *, exact: bool) -> None:
        if setup.docs.output_type == "loglikelihood_rolling":
            raise TaskError(
                f"task {setup.docs.name} measures the likelihood of whole texts, so there is no answer to reward; "
                "take a task with choices or generated answers"
            )
        if setup.docs.objective.metric == "acc_mutual_info":
            raise TaskError(f"metric=acc_mutual_info of task {setup.docs.name} cannot be rewarded; take metric=acc")
        self.setup = setup
        self.exact = exact
        self.kl = setup.config.kls[0]
        self.method = "expected-reward" if exact else "reinforce"
        self.normalise = normalise_of(setup.config, setup.docs.objective.metric)
        self._train: dict[int, ChoiceDoc] = {}
        self._validation: list[ChoiceDoc] | None = None
        self._base: list[torch.Tensor] | None = None

    @property
    def validation(self) -> list[ChoiceDoc]:
        """The validation documents as choices."""
        if self._validation is None:
            self._validation = self._prepare(self.setup.validation)
        return self._validation

    def has_signal(self) -> bool:
        """Whether some choices of some validation document earn more than others."""
        return any(bool((doc.rewards != doc.rewards[0]).any()) for doc in self.validation)

    @torch.no_grad()
    def measure(self, z: Z | None, progress: str | None = None) -> Measured:
        """See :class:`Problem`; the reward is the expected one, the score that of the likeliest choice."""
        docs = self.validation
        scores: list[torch.Tensor | None] = [None] * len(docs)
        metrics: list[dict[str, Any]] = [{} for _ in docs]
        with (
            self.setup.engine.applied(z),
            tqdm(total=len(docs), desc=progress, unit="doc", disable=progress is None, delay=1, leave=False) as bar,
        ):
            for batch, results in self._passes(docs, lambda batch: self._run([docs[i] for i in batch])):
                for i, (found, responses) in zip(batch, results, strict=True):
                    scores[i] = found.cpu()
                    metrics[i] = self._metrics(docs[i], responses)
                bar.update(len(batch))
        done = [found for found in scores if found is not None]
        if self._base is None:
            if z is not None:
                self.measure(None)
            else:
                self._base = done
        temperature = self.setup.config.temperature or 1.0
        rewards = [float(expected_reward(s, d.rewards, temperature)) for s, d in zip(done, docs, strict=True)]
        kls = [float(choice_kl(s, b, temperature)) for s, b in zip(done, self._base or done, strict=True)]
        return Measured(_mean(rewards), self.setup.score(metrics), _mean(kls))

    def accumulate(self, z: Mapping[str, torch.Tensor], docs: Sequence[int], step: int) -> Measured:
        """See :class:`Problem`."""
        self.setup.passes.begin(step)
        picked = self._training_docs(docs)
        weights = None if self.exact else self._sampled(z, picked, step)
        reward = penalty = 0.0
        metrics: list[dict[str, Any]] = [{} for _ in picked]

        def work(batch: list[int]) -> _Part:
            return self._part(z, [picked[i] for i in batch], [weights[i] for i in batch] if weights else None)

        for batch, part in self._passes(picked, work):
            accumulate(z, tuple(None if own is None else own / len(picked) for own in part.gradient))
            reward += part.reward
            penalty += part.penalty
            for i, found in zip(batch, part.metrics, strict=True):
                metrics[i] = found
        return Measured(reward / len(picked), self.setup.score(metrics), penalty / len(picked) if self.kl else None)

    def _part(
        self, z: Mapping[str, torch.Tensor], docs: Sequence[ChoiceDoc], weights: Sequence[torch.Tensor] | None
    ) -> _Part:
        temperature = self.setup.config.temperature or 1.0
        base: Sequence[torch.Tensor | None] = [None] * len(docs)
        if self.kl:
            with self.setup.passes.base(z):
                base = [scores for scores, _ in self._run(docs)]
        reward = penalty = 0.0
        metrics = []
        with self.setup.passes.trained(z):
            found = self._run(docs)
            gain = torch.zeros((), device=found[0][0].device)
            for i, (doc, (scores, responses), base_scores) in enumerate(zip(docs, found, base, strict=True)):
                expected = expected_reward(scores, doc.rewards.to(scores), temperature)
                reward += float(expected.detach())
                metrics.append(self._metrics(doc, responses))
                if weights is None:
                    gain = gain + expected
                else:
                    gain = gain + reinforce(torch.log_softmax(scores / temperature, dim=-1), weights[i].to(scores))
                if base_scores is not None:
                    kl = choice_kl(scores, base_scores, temperature)
                    penalty += float(kl.detach())
                    gain = gain - self.kl * kl
            return _Part(gradient(-gain, z), reward, penalty, metrics)

    @torch.no_grad()
    def _sampled(self, z: Mapping[str, torch.Tensor], docs: Sequence[ChoiceDoc], step: int) -> list[torch.Tensor]:
        """For each document the summed advantages of the samples that took each choice, over the number of samples."""
        config = self.setup.config
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "choices", step))
        scores: list[torch.Tensor] = [torch.empty(0)] * len(docs)
        with self.setup.passes.trained(z):
            for batch, results in self._passes(docs, lambda batch: self._run([docs[i] for i in batch])):
                for i, (found, _) in zip(batch, results, strict=True):
                    scores[i] = found.cpu()
        taken = torch.stack([sample_choices(s, config.temperature, config.samples, generator) for s in scores])
        rewards = torch.stack([doc.rewards[row] for doc, row in zip(docs, taken, strict=True)])
        gains = advantages(rewards, config.baseline) / config.samples
        return [
            torch.zeros(len(doc.rewards)).index_add_(0, row, gain)
            for doc, row, gain in zip(docs, taken, gains, strict=True)
        ]

    def _run(self, docs: Sequence[ChoiceDoc]) -> list[tuple[torch.Tensor, list[tuple[float, bool]]]]:
        """For each document the scores of its choices and the answers to its requests."""
        spans = self.setup.model.run([item for doc in docs for item in doc.unit])
        return self._split(docs, spans)

    def _split(self, docs: Sequence[ChoiceDoc], spans: Spans) -> list[tuple[torch.Tensor, list[tuple[float, bool]]]]:
        parts = torch.split(spans.loglikelihoods(), [len(doc.order) for doc in docs])
        greedy = iter(spans.greedy())
        results = []
        for doc, part in zip(docs, parts, strict=True):
            flags = dict(zip(doc.order, [next(greedy) for _ in doc.order], strict=True))
            inverse = sorted(range(len(doc.order)), key=doc.order.__getitem__)
            loglikelihoods = part[torch.tensor(inverse, device=part.device)]
            values = loglikelihoods.detach().tolist()
            responses = [(values[i], flags[i]) for i in range(len(values))]
            responses += [(0.0, False)] * (len(doc.instances) - len(responses))
            if doc.single:
                missed = torch.log((-torch.expm1(loglikelihoods)).clamp_min(1e-7))
                scores = torch.cat([loglikelihoods, missed])
            else:
                scores = choice_scores(loglikelihoods, doc.lengths.to(part.device), self.normalise)
            results.append((scores, responses))
        return results

    def _metrics(self, doc: ChoiceDoc, responses: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        return self.setup.docs.metrics(doc.doc, doc.instances, responses)

    def _passes(
        self, docs: Sequence[ChoiceDoc], work: Callable[[list[int]], Result]
    ) -> Iterator[tuple[list[int], Result]]:
        return self.setup.passes.run([doc.unit for doc in docs], work)

    def _training_docs(self, indices: Sequence[int]) -> list[ChoiceDoc]:
        missing = sorted({i for i in indices if i not in self._train})
        prepared = self._prepare([self.setup.train[i] for i in missing])
        self._train.update(zip(missing, prepared, strict=True))
        return [self._train[i] for i in indices]

    def _prepare(self, docs: Sequence[Any]) -> list[ChoiceDoc]:
        built = self.setup.docs.instances(docs)
        return [self._choice_doc(doc, instances) for doc, instances in zip(docs, built, strict=True)]

    def _choice_doc(self, doc: Any, instances: list[Instance]) -> ChoiceDoc:
        source = self.setup.docs
        single = source.output_type == "loglikelihood"
        texts = [""] if single else [str(choice) for choice in source.task.doc_to_choice(doc)]
        choices = instances[: len(texts)]
        requests = [source.continuation(instance) for instance in choices]
        contexts = list(dict.fromkeys(request.context for request in requests))
        members = [[i for i, request in enumerate(requests) if request.context == context] for context in contexts]
        unit = [
            Branches(context, tuple(requests[i].continuation for i in group))
            for context, group in zip(contexts, members, strict=True)
        ]
        if single:
            outcomes = [[(0.0, True)], [(_NEVER, False)]]
        else:
            rest = [(0.0, False)] * (len(instances) - len(choices))
            outcomes = [
                [(0.0, True) if i == taken else (_NEVER, False) for i in range(len(choices))] + rest
                for taken in range(len(choices))
            ]
        rewards = [self.setup.reward(source.metrics(doc, instances, outcome)) for outcome in outcomes]
        lengths = [len(r.continuation) for r in requests] if self.normalise == "tokens" else list(map(len, texts))
        order = [i for group in members for i in group]
        return ChoiceDoc(
            doc, instances, unit, order, torch.tensor(rewards), torch.tensor(lengths, dtype=torch.float32), single
        )


def normalise_of(config: TrainConfig, metric: str) -> Normalise:
    """How choices' log-likelihoods are normalised, ``auto`` resolved by the metric."""
    if config.normalise == "auto":
        return "chars" if metric == "acc_norm" else "none"
    return config.normalise


def sample_choices(scores: torch.Tensor, temperature: float, samples: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of choices drawn from softmax(s/τ), shape (samples,); τ = 0 takes the likeliest."""
    if temperature == 0:
        return scores.argmax().repeat(samples)
    return torch.multinomial(
        torch.softmax(scores / temperature, dim=-1), samples, replacement=True, generator=generator
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
