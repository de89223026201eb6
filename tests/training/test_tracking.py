"""Curves in a tracker, through accelerate's own interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker, get_available_trackers
from lm_eval.models.huggingface import HFLM
from typer.testing import CliRunner

from t2.cli.main import app
from t2.core.errors import ArgumentError, DependencyError
from t2.training.tracking import Tracking
from tests.training import planted
from tests.training.test_train import run


class Kept(GeneralTracker):  # type: ignore[misc]
    """A tracker of accelerate's kind that keeps what it is told."""

    name = "kept"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    @property
    def tracker(self) -> list[Any]:
        return self.told

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append("finished")


class Broken(Kept):
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        raise RuntimeError("no network")


def test_a_tracker_gets_the_configuration_and_every_point(tiny_lm: HFLM) -> None:
    tracker = Kept()
    result = run(tiny_lm, planted.choices(), kl=0.1, steps=4, validate_every=2, trackers=[tracker])
    settings, *points, end = tracker.told
    assert (settings["kl"], settings["learning_rate"], settings["model_args"]) == (0.1, 2e-2, "{}")
    assert end == "finished"
    assert [step for step, _ in points] == [point.step for point in result.curve]
    for (_, values), point in zip(points, result.curve, strict=True):
        assert values[f"{point.split}/reward"] == point.reward
        assert values[f"{point.split}/kl"] == point.kl
        assert (f"{point.split}/learning_rate" in values) == (point.split == "train")


def test_each_run_of_a_sweep_is_a_run_of_the_tracker(tiny_lm: HFLM) -> None:
    tracker = Kept()
    run(tiny_lm, planted.choices(), kl=(0.0, 0.1), steps=2, validate_every=2, trackers=[tracker])
    assert [one["kl"] for one in tracker.told if isinstance(one, dict)] == [0.0, 0.1]
    assert tracker.told.count("finished") == 2


def test_a_tracker_that_fails_is_named_and_the_training_can_go_on(tiny_lm: HFLM) -> None:
    with pytest.raises(DependencyError, match="tracker kept could not take a point: RuntimeError: no network"):
        run(tiny_lm, planted.choices(), steps=2, validate_every=2, trackers=[Broken()])
    assert run(tiny_lm, planted.choices(), steps=2, validate_every=2).path.exists()


def test_what_accelerate_does_not_know_or_has_not_installed(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="accelerate knows no such tracker; did you mean 'tensorboard'"):
        Tracking(["tensorbord"], tmp_path)
    absent = next(name for name in ("dvclive", "aim", "swanlab") if name not in set(map(str, get_available_trackers())))
    arguments = ["train", "--task", "t2_arc_easy", "--name", "x", "--tracker", absent, "--output", str(tmp_path)]
    with pytest.raises(DependencyError, match=f"run: pip install {absent}"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
