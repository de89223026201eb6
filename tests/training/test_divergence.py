"""A run whose rewards stop being numbers ends in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from t2.adapters.expert import Z
from t2.core.curve import read_curve
from t2.core.errors import TrainingError
from t2.training.config import make_config
from t2.training.parameters import Parameters
from t2.training.problem import Measured
from t2.training.trainer import Trainer


class Diverging:
    """Its gradients are finite, but the model that they lead to answers NaN."""

    method = "expected-reward"
    kl = 0.0

    def measure(self, z: Z | None, progress: str | None = None) -> Measured:
        return Measured(math.nan, 0.0)

    def has_signal(self) -> bool:
        return True

    def accumulate(self, z: Mapping[str, torch.Tensor], docs: Sequence[int], step: int) -> Measured:
        for vector in z.values():
            vector.grad = torch.ones_like(vector)
        return Measured(0.5, 0.5)


def test_a_reward_that_is_not_a_number_ends_the_run(tmp_path: Path) -> None:
    config = make_config(task="any", name="lost", validate_every=2)
    trainer = Trainer(config, "0", Diverging(), Parameters(config, {"w": 4}), 8, tmp_path, progress=False)
    with pytest.raises(
        TrainingError, match="the reward after step 2 is not a finite number: training of lost diverged"
    ):
        trainer.run(Measured(0.0, 0.5))
    assert [point.split for point in read_curve(tmp_path / "curve.jsonl")] == ["validation", "train", "train"]
