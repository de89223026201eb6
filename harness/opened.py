"""A base model in memory, which several t2 models may share: one after another they adapt and ask the same weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lm_eval.api.model import CacheHook

from t2.adapters.engine import Engine
from t2.adapters.engine.pool import PooledEngine
from t2.core.errors import ModelError
from t2.core.manifest import NO_FINGERPRINT
from t2.core.record import ModelRef
from t2.harness.answers import Answers
from t2.harness.args import Settings
from t2.harness.base import base_id, open_base, open_engine
from t2.harness.identity import identity_of, model_ref
from t2.harness.workers import start_workers

_OF_THE_BASE = ("engine", "moe", "batch", "workers", "hf")
"""The settings that decide what is loaded."""


@dataclass
class Opened:
    """A loaded base model.

    Attributes:
        inner: lm-eval's own model.
        base: its name, revision, fingerprint and identity; the fingerprint is zeros if it cannot be adapted.
        settings: what it was loaded by.
        engine: runs it under mixtures; None where it has nothing to adapt.
        unadaptable: why there is no engine.
        memory: what dispatches were answered, by who was asked and the question.
        answers: keeps what the second pass was answered; None keeps nothing.
    """

    inner: Any
    base: ModelRef
    settings: Settings
    engine: Engine | None = None
    unadaptable: ModelError | None = None
    memory: dict[tuple[str, str], tuple[float, ...]] = field(default_factory=dict)
    answers: Answers | None = None
    _workers: PooledEngine | None = None

    def workers(self) -> PooledEngine:
        """The workers that the settings ask for, started when first asked for."""
        assert self.engine is not None
        if self._workers is None:
            self._workers = start_workers(self.settings, self.inner, self.engine)
        return self._workers

    def serves(self, settings: Settings) -> bool:
        """Whether other settings load the same."""
        return all(getattr(self.settings, name) == getattr(settings, name) for name in _OF_THE_BASE)


def open_model(settings: Settings, answers: Answers | None = None) -> Opened:
    """Load the base model that settings name.

    Args:
        settings: the parsed model_args.
        answers: what keeps the answers of the second pass, where several evaluations follow each other.

    Raises:
        T2Error: it cannot be loaded.
    """
    hf = dict(settings.hf)
    pretrained = hf.pop("pretrained", None)
    inner = open_base(pretrained, settings.engine, **hf)
    # A search must not put its candidates' answers into the user's cache.
    inner.set_cache_hook(CacheHook(None))
    name = base_id(pretrained, hf.get("gguf_file"))
    revision = str(hf["revision"]) if hf.get("revision") is not None else None
    try:
        engine = open_engine(inner, name, revision, settings.batch, settings.moe)
    except ModelError as error:
        base = ModelRef(id=name, revision=revision, fingerprint=NO_FINGERPRINT, identity=identity_of(inner))
        return Opened(inner, base, settings, unadaptable=error, answers=answers)
    return Opened(inner, model_ref(engine, inner), settings, engine, answers=answers)
