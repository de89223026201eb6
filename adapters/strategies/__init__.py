"""Strategies decide which mixture answers which prompt: one protocol, one file per strategy."""

from __future__ import annotations

from collections.abc import Callable

from t2.adapters.strategies.auto import AutoStrategy
from t2.adapters.strategies.base import Choice, DomainPrompts, Job, Options, Plan, Score, Scorer, Strategy
from t2.adapters.strategies.best import BestStrategy
from t2.adapters.strategies.classifier import ClassifierStrategy
from t2.adapters.strategies.expert import ExpertStrategy
from t2.adapters.strategies.few_shot import FewShotStrategy
from t2.adapters.strategies.mix import MixStrategy
from t2.adapters.strategies.none import NoneStrategy
from t2.adapters.strategies.prompt import PromptStrategy

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "none": NoneStrategy,
    "expert": ExpertStrategy,
    "mix": MixStrategy,
    "best": BestStrategy,
    "prompt": PromptStrategy,
    "classifier": ClassifierStrategy,
    "cem": FewShotStrategy,
    "auto": AutoStrategy,
    # The adapter is part of the model, which answers as it is.
    "peft": NoneStrategy,
}

__all__ = ["STRATEGIES", "Choice", "DomainPrompts", "Job", "Options", "Plan", "Score", "Scorer", "Strategy"]
