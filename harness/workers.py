"""``workers=``: engines on several processes, GPUs or machines, which answer during searches and dispatches."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from t2.adapters.engine import Engine
from t2.adapters.engine.pool import PooledEngine, Workers
from t2.adapters.engine.transformers import TransformersEngine
from t2.core.errors import ArgumentError, ModelError
from t2.harness.args import Settings
from t2.harness.base import base_id, open_base
from t2.harness.identity import identity_of

_ROWS = 32
"""Rows of a worker's batch where the user names no bound."""


@dataclass(frozen=True)
class EngineSpec:
    """How a worker makes its engine: as this process made its own.

    Attributes:
        pretrained: a name or path; None is the demo model.
        engine: the value of ``engine=``.
        hf: further arguments of lm-eval's model.
        batch: rows of a batch.
        moe: as the model_arg.
        identity: identity of the model in this process.
    """

    pretrained: str | None
    engine: str
    hf: Mapping[str, Any]
    batch: int
    moe: str
    identity: str

    def __call__(self) -> Engine:
        """Load the model.

        Raises:
            ModelError: it cannot be loaded, or differs from the model of the main process.
        """
        hf = dict(self.hf)
        if str(hf.get("device", "")).startswith("cuda"):
            hf["device"] = "cuda"  # a worker sees its own alone
        lm = open_base(self.pretrained, self.engine, **hf)
        if identity_of(lm) != self.identity:
            raise ModelError(
                f"a worker loaded another model ({identity_of(lm)[:12]}) than the main process ({self.identity[:12]}); "
                "use the same files on all machines of the cluster"
            )
        return TransformersEngine(
            lm.model,
            lm.tokenizer,
            base_id(self.pretrained, hf.get("gguf_file")),
            hf.get("revision"),
            batch_size=self.batch,
            moe=self.moe,
        )


def start_workers(settings: Settings, lm: Any, home: Engine) -> PooledEngine:
    """The workers that the settings ask for, stopped when nothing uses them any more.

    Raises:
        ArgumentError: they cannot have this model.
        DependencyError: Ray is not installed.
        ModelError: a worker cannot load the model.
    """
    assert settings.workers is not None
    hf = dict(settings.hf)
    pretrained = hf.pop("pretrained", None)
    if pretrained is not None and not isinstance(pretrained, str):
        raise ArgumentError("workers needs pretrained= as a name or folder; a model in memory cannot be sent to them")
    if settings.engine != "hf" or not isinstance(home, TransformersEngine):
        raise ArgumentError(f"workers works with engine=hf, not with engine={settings.engine}")
    spec = EngineSpec(pretrained, settings.engine, hf, settings.batch or _ROWS, settings.moe, identity_of(lm))
    workers = Workers(spec, settings.workers, home.base, gpus=1 if home.device.type == "cuda" else 0)
    pooled = PooledEngine(home, workers, settings.batch or _ROWS)
    weakref.finalize(pooled, workers.close)
    return pooled
