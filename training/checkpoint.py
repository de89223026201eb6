"""Checkpoints: everything a run needs to go on as if it had not been interrupted, in one file.

There is no random state in it: a step's documents and samples follow from the seed and the number of the step.
"""

from __future__ import annotations

from pathlib import Path

import pydantic
import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict

from t2.core.errors import DataError
from t2.core.files import atomic_write

_KEY = "t2"
_TENSORS = ("theta", "exp_avg", "exp_avg_sq", "best_theta")


class Progress(BaseModel):
    """How far a run is.

    Attributes:
        config: digest of its configuration.
        step: gradient steps done.
        points: points of its curve that belong to these steps.
        best_step: steps before the best validation measurement; 0 is the base model. Where nothing is validated it is
            the last step, and the next four are 0.
        best_score: task metric there.
        best_reward: mean reward there.
        base_score: task metric of the base model on the validation documents.
        base_reward: mean reward of the base model there.
        stale: validation measurements since the best one.
        seconds: wall clock, resumes included.
        factors: whether training held the weights' factors, see :class:`t2.adapters.engine.forms.Forms`; the other way
            gives other roundings, so a run stays with it on whatever machine it goes on. None where it was not decided.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: str
    step: int
    points: int
    best_step: int
    best_score: float
    best_reward: float
    base_score: float
    base_reward: float
    stale: int
    seconds: float
    factors: bool | None = None


class Checkpoint(BaseModel):
    """Progress and tensors, each of shape (parameters,), float32.

    Attributes:
        progress: how far the run is.
        theta: θ, as :class:`t2.training.parameters.Parameters` lays it out.
        exp_avg: AdamW's first moment.
        exp_avg_sq: its second.
        best_theta: θ at the best validation measurement; without one, θ before the first step.
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    progress: Progress
    theta: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    best_theta: torch.Tensor


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically: after a kill the file is the old one or the new one.

    Raises:
        StorageError: it cannot be written.
    """
    tensors = {name: getattr(checkpoint, name).detach().cpu().contiguous() for name in _TENSORS}
    atomic_write(path, safetensors.torch.save(tensors, metadata={_KEY: checkpoint.progress.model_dump_json()}))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        DataError: it cannot be read, or is not a checkpoint.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            progress = Progress.model_validate_json((file.metadata() or {}).get(_KEY, ""))
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
    except (OSError, safetensors.SafetensorError, pydantic.ValidationError) as error:
        raise DataError(f"cannot read the checkpoint {path}: {error}; start again with --overwrite") from error
    return Checkpoint(progress=progress, **tensors)
