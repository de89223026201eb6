"""The loop's decisions, over measurements that are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from t2.core.curve import read_curve
from t2.core.errors import TrainingError
from t2.training.checkpoint import load_checkpoint
from t2.training.config import make_config
from t2.training.parameters import Parameters
from t2.training.problem import Measured
from t2.training.trainer import Trainer


class Given:
    """Measures what it was told to; every step's gradient is that of the sum of z."""

    method = "given"
    kl = 0.0

    def __init__(self, measurements: Sequence[tuple[float, float]], gradient: float = -1.0) -> None:
        self.left = [Measured(reward, score) for score, reward in measurements]
        self.gradient = gradient
        self.seen: list[dict[str, torch.Tensor]] = []

    def measure(self, z: dict[str, torch.Tensor] | None, progress: str | None = None) -> Measured:
        self.seen.append(dict(z or {}))
        return self.left.pop(0)

    def has_signal(self) -> bool:
        return True

    def accumulate(self, z: Mapping[str, torch.Tensor], docs: Sequence[int], step: int) -> Measured:
        sum(self.gradient * vector.sum() for vector in z.values()).backward()  # type: ignore[union-attr]
        return Measured(0.0, 0.0)


def trainer(problem: Given, folder: Path, **values: object) -> Trainer:
    given: dict[str, Any] = {"task": "t", "name": "n", "validate_every": 1, "clip": 1.0, **values}
    config = make_config(**given)
    return Trainer(config, "0" * 64, problem, Parameters(config, {"a": 4}), 10, folder, progress=False)


def test_training_stops_after_so_many_measurements_without_a_new_best_and_keeps_the_best(tmp_path: Path) -> None:
    problem = Given([(0.4, 0.1), (0.6, 0.2), (0.6, 0.2), (0.5, 0.9), (0.6, 0.1), (0.9, 0.9)])
    done = trainer(problem, tmp_path, steps=50, patience=3).run(Measured(0.0, 0.3))
    assert (done.progress.step, done.progress.best_step, done.progress.best_score) == (5, 2, 0.6)
    torch.testing.assert_close(1 + done.best_theta, problem.seen[1]["a"])
    assert not torch.equal(done.theta, done.best_theta)
    assert [p.score for p in read_curve(tmp_path / "curve.jsonl") if p.split == "validation"] == [
        0.3,
        0.4,
        0.6,
        0.6,
        0.5,
        0.6,
    ]
    saved = load_checkpoint(tmp_path / "checkpoint.safetensors")
    assert saved.progress == done.progress
    assert torch.equal(saved.exp_avg_sq, done.exp_avg_sq)


@pytest.mark.parametrize(("select", "best"), [("score", 3), ("reward", 2)])
def test_what_is_best_can_be_chosen_and_ties_go_to_the_other(tmp_path: Path, select: str, best: int) -> None:
    problem = Given([(0.5, 0.4), (0.4, 0.8), (0.5, 0.5), (0.3, 0.8)])
    done = trainer(problem, tmp_path, steps=4, select=select).run(Measured(0.0, 0.3))
    assert done.progress.best_step == best


def test_the_last_step_is_validated_whatever_its_number(tmp_path: Path) -> None:
    problem = Given([(0.4, 0.1), (0.5, 0.1)])
    done = trainer(problem, tmp_path, steps=5, validate_every=3).run(Measured(0.0, 0.3))
    assert (done.progress.step, done.progress.best_step) == (5, 5)


def test_the_first_step_of_adamw_is_the_learning_rate_and_clipping_does_not_scale_it(tmp_path: Path) -> None:
    for clip in (1.0, 1e-3):
        problem = Given([(0.4, 0.1)], gradient=-3.0)
        folder = tmp_path / str(clip)
        done = trainer(problem, folder, steps=1, learning_rate=0.1, clip=clip).run(Measured(0.0, 0.3))
        assert done.theta.tolist() == pytest.approx([0.1] * 4, rel=1e-3)
        (point,) = [p for p in read_curve(folder / "curve.jsonl") if p.split == "train"]
        assert point.gradient_norm == pytest.approx(6.0)


def test_a_gradient_that_is_not_finite_ends_training(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 0 is not finite.*lower learning_rate"):
        trainer(Given([], gradient=float("nan")), tmp_path, steps=3).run(Measured(0.0, 0.3))
