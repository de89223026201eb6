"""What the training loop asks of a task: measure an expert, and the gradient of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lm_eval.api.instance import Instance

from t2.adapters.engine.base import Engine
from t2.adapters.engine.likelihood import LikelihoodModel
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z
from t2.harness.tasks import TaskDocs
from t2.training.config import TrainConfig
from t2.training.passes import Passes
from t2.training.rewards import SHAPERS, reward_of, shaped, unit_score, well_formed

LOWEST = -1e9
"""Stands for a metric that is undefined on a set of documents; JSON has no infinity."""


@dataclass(frozen=True)
class Measured:
    """Mean reward, the task's metric by its own aggregation (higher is better), and mean KL in nats where measured."""

    reward: float
    score: float
    kl: float | None = None


class Problem(Protocol):
    """One way to learn from a task.

    Attributes:
        method: the ``method`` of the manifest.
        kl: λ; a sweep sets one after the other.
    """

    method: str
    kl: float

    def measure(self, z: Z | None, progress: str | None = None) -> Measured:
        """Reward, score and KL on the validation documents, in weight form; None is the base model."""
        ...

    def has_signal(self) -> bool:
        """Whether the base model's answers to validation documents earn different rewards; ask after a measurement."""
        ...

    def accumulate(self, z: Mapping[str, torch.Tensor], docs: Sequence[int], step: int) -> Measured:
        """Add to ``z[…].grad`` the gradient of the step's loss on some training documents.

        Args:
            z: leaves that require gradients.
            docs: indices into the training documents.
            step: number of the step; seeds sampling.
        """
        ...


@dataclass(frozen=True)
class Setup:
    """What every problem needs.

    Attributes:
        config: the run's configuration.
        engine: the base model that is trained.
        model: gives likelihoods of it.
        passes: cuts work into passes over it.
        rollouts: generates answers; the same base model, in whichever engine.
        docs: the task.
        train: its training documents.
        validation: its validation documents.
    """

    config: TrainConfig
    engine: TransformersEngine
    model: LikelihoodModel
    passes: Passes
    rollouts: Engine
    docs: TaskDocs
    train: Sequence[Any]
    validation: Sequence[Any]

    def reward(self, metrics: Mapping[str, Any]) -> float:
        """Reward of one answer from the task's metrics of it alone."""
        return reward_of(self._unit(metrics), right=self.config.reward_right, wrong=self.config.reward_wrong)

    def judge(self, doc: Any, instance: Instance, text: str) -> tuple[dict[str, Any], float]:
        """The task's metrics of a generated answer, and its reward with partial credit and the bonus for its form.

        Raises:
            TaskError: the document has nothing to give partial credit by.
        """
        config, docs = self.config, self.docs
        metrics = docs.metrics(doc, [instance], [text])
        if config.reward == "outcome" and not config.reward_format:
            return metrics, self.reward(metrics)
        (found,) = docs.filtered([instance], [text])
        answer = str(found[0] if isinstance(found, (list, tuple)) and found else found)
        score = self._unit(metrics)
        if score < 1:
            score = shaped(score, SHAPERS[config.reward](docs, doc, answer), config.reward_partial)
        bonus = config.reward_format if config.reward_format and well_formed(docs, doc, answer) else 0.0
        return metrics, reward_of(score, right=config.reward_right, wrong=config.reward_wrong) + bonus

    def _unit(self, metrics: Mapping[str, Any]) -> float:
        if not self.docs.has_value(metrics):
            return 0.0  # an answer without the metric gets the reward of a wrong one
        number = self.docs.number(metrics)
        objective = self.docs.objective
        if number is None:  # a metric that has a value only when aggregated, here over this one answer
            score, higher = self.docs.aggregate([metrics]), True
            score = score if objective.higher_is_better else -score
            higher = objective.higher_is_better
        else:
            score, higher = number, objective.higher_is_better
        return unit_score(score, higher)

    def score(self, metrics: Sequence[Mapping[str, Any]]) -> float:
        """The task's metric over the documents that have it, signed so that higher is better.

        Raises:
            TaskError: no validation document has the metric.
        """
        if len(metrics) < len(self.validation) and not any(self.docs.has_value(found) for found in metrics):
            return LOWEST
        return max(LOWEST, self.docs.aggregate(metrics))
