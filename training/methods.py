"""What is trained: the numbers of an expert, or an adapter of PEFT, each with the engine that it acts through."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import save_expert
from t2.adapters.peft_folder import CONFIG, TRAINING, require_peft
from t2.adapters.targets import Target, choose, find_targets, parse_layers
from t2.core.errors import ArgumentError
from t2.core.expertfile import encode_expert
from t2.core.files import atomic_write
from t2.core.manifest import Manifest
from t2.harness.base import base_id
from t2.training import folders
from t2.training.config import TrainConfig
from t2.training.parameters import Parameters, PlainParameters, Trainable

_QUERIES_AND_VALUES = ("q_proj", "v_proj", "query", "value")


class Method(Protocol):
    """One kind of trained numbers.

    Attributes:
        engine: the model under them: its ``applied`` and ``trained`` take what ``parameters`` makes of θ.
        parameters: what θ stands for.
        ranks: rank of each adapted matrix, by name.
        files: what :meth:`write` writes, in its order; where the last one is, the training is finished.
    """

    engine: TransformersEngine
    parameters: Trainable
    ranks: dict[str, int]
    files: tuple[str, ...]

    def check_room(self, manifest: Manifest) -> None:
        """Check before the training that its result can be written.

        Raises:
            ExpertFileError: what it would say of itself does not fit.
        """
        ...

    def write(self, folder: Path, manifest: Manifest, theta: torch.Tensor) -> None:
        """Write the result.

        Raises:
            StorageError: a file cannot be written.
        """
        ...


class Svf:
    """Singular value fine-tuning: an expert, one z per matrix."""

    files: tuple[str, ...] = (folders.EXPERT,)

    def __init__(self, config: TrainConfig, engine: TransformersEngine, *, progress: bool) -> None:
        self.engine = engine
        self.ranks = {name: target.rank for name, target in _matrices(config, engine.targets).items()}
        bases = engine.bases(self.ranks, progress=progress)
        self.parameters: Trainable = Parameters(
            config, self.ranks, {name: basis.sigma.cpu() for name, basis in bases.items()}
        )

    def check_room(self, manifest: Manifest) -> None:
        """See :class:`Method`."""
        encode_expert(manifest, {name: np.ones(rank, dtype=np.float32) for name, rank in self.ranks.items()})

    def write(self, folder: Path, manifest: Manifest, theta: torch.Tensor) -> None:
        """See :class:`Method`."""
        save_expert(folder / folders.EXPERT, manifest, self.parameters.z(theta))


class Peft:
    """An adapter of PEFT in a folder as PEFT reads it, and in ``training.json`` what an expert says of itself."""

    files: tuple[str, ...] = (TRAINING, CONFIG, folders.ADAPTER)

    def __init__(self, config: TrainConfig, engine: TransformersEngine) -> None:
        from t2.adapters.engine.peft import PeftEngine

        assert isinstance(engine, PeftEngine)
        self.engine: TransformersEngine = engine
        self._adapter = engine
        self.ranks = {name: target.rank for name, target in _matrices(config, engine.targets).items()}
        self.parameters: Trainable = PlainParameters(engine.parameters())

    def check_room(self, manifest: Manifest) -> None:
        """There is room for any."""

    def write(self, folder: Path, manifest: Manifest, theta: torch.Tensor) -> None:
        """See :class:`Method`."""
        atomic_write(folder / TRAINING, (manifest.canonical() + "\n").encode())
        self._adapter.write(folder, self.parameters.z(theta))


def build_engine(lm: HFLM, config: TrainConfig, *, given: bool = True) -> TransformersEngine:
    """The engine over a loaded base model, with an adapter in it where the method has one.

    Args:
        lm: the base model.
        config: its ``model_args`` name it.
        given: the caller loaded it, so it goes by its own name.

    Raises:
        ArgumentError: the model has no such matrices.
        DependencyError: PEFT is needed and not installed.
    """
    pretrained = lm.model if given else config.model_args.get("pretrained")
    name = base_id(pretrained, config.model_args.get("gguf_file"))
    batch = lm.batch_size if isinstance(lm.batch_size, int) and lm.batch_size > 1 else 32
    revision = config.model_args.get("revision")
    if config.method == "svf":
        return TransformersEngine(lm.model, lm.tokenizer, name, revision, batch_size=batch, moe=config.moe)
    require_peft(f"method={config.method}")
    from t2.adapters.engine.peft import PeftEngine, PeftForm

    return PeftEngine(
        lm.model,
        lm.tokenizer,
        name,
        revision,
        adapter=PeftForm(config.method, config.lora_rank, config.lora_alpha, config.lora_dropout),
        matrices=list(_matrices(config, find_targets(lm.model, moe=config.moe))),
        seed=config.seed,
        batch_size=batch,
        moe=config.moe,
    )


def build_method(config: TrainConfig, engine: TransformersEngine, *, progress: bool) -> Method:
    """What is trained, over the engine of :func:`build_engine`."""
    if config.method == "svf":
        return Svf(config, engine, progress=progress)
    return Peft(config, engine)


def _matrices(config: TrainConfig, found: Mapping[str, Target]) -> dict[str, Target]:
    """The matrices that a configuration adapts, among a model's.

    Raises:
        ArgumentError: the model has no such layers, or no projections to queries and values.
    """
    layers = parse_layers(config.layers) if config.layers is not None else None
    if config.targets != "qv":
        return choose(found, config.targets, layers)
    chosen = choose(found, "attn", layers)
    picked = {name: target for name, target in chosen.items() if name.split(".")[-2] in _QUERIES_AND_VALUES}
    if not picked:
        raise ArgumentError("targets=qv: the model has no separate projections to queries and values; use attn")
    return picked
