"""What lies between two trainings, as ``benchmarks/interpolation.py`` measures it."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM

from benchmarks.interpolation import Answered, between, markdown, midpoint
from t2.core.errors import TaskError
from t2.training.api import build_problem, finished
from t2.training.config import TrainConfig, make_config
from t2.training.methods import build_engine
from t2.training.split import split_docs
from tests.training import planted


def configs(method: str) -> list[TrainConfig]:
    values: dict[str, Any] = {
        "steps": 4,
        "batch": 16,
        "learning_rate": 2e-2,
        "clip": 1.0,
        "validate_every": 2,
        "select": "reward",
    }
    return [make_config(task="planted", name=f"{method}-{seed}", method=method, seed=seed, **values) for seed in (0, 1)]


@pytest.mark.parametrize("method", ["svf", "lora"])
def test_the_ends_are_the_trainings_and_the_base_is_the_base(method: str, tiny_lm: HFLM, tmp_path: Path) -> None:
    task, pair = planted.choices(), configs(method)
    found = between(pair, tmp_path, tiny_lm, task, points=3, docs=6)
    assert [one.t for one in found] == [None, 0.0, 0.5, 1.0]
    assert {len(one.rewards) for one in found} == {6}
    # As the trainer itself measures the base on these documents.
    halves = split_docs(task, 0)
    halves.validation[:] = list(task.test_docs())[:6]
    engine = build_engine(tiny_lm, pair[0])
    base = build_problem(pair[0], engine, tiny_lm, task, halves).measure(None)
    engine.close()
    assert (fmean(found[0].scores), fmean(found[0].rewards)) == pytest.approx((base.score, base.reward), abs=1e-5)
    rewards = [fmean(one.rewards) for one in found]
    assert min(rewards[1], rewards[3]) > rewards[0]
    assert rewards[1] != rewards[3]
    assert all(finished(config, tmp_path) is not None for config in pair)
    # Done again it takes the trainings that are there.
    assert between(pair, tmp_path, tiny_lm, task, points=3, docs=6) == found


def test_the_midpoint_is_paired_with_the_mean_of_the_ends() -> None:
    rows = [
        Answered(None, [0.0] * 4, [0.0] * 4),
        Answered(0.0, [1.0, 0.0, 0.0, 0.0], [0.5, -0.5, 0.0, 0.1]),
        Answered(0.5, [1.0, 1.0, 0.0, 0.0], [0.6, 0.1, 0.0, 0.1]),
        Answered(1.0, [0.0, 1.0, 0.0, 0.0], [0.1, 0.5, 0.0, 0.1]),
    ]
    one = midpoint(rows)
    assert one["scores"]["difference"] == pytest.approx(0.25)
    assert one["rewards"]["difference"] == pytest.approx((0.3 + 0.1) / 4)
    text = markdown({"svf": rows})
    assert "| svf | 0.5 | 50.0 [" in text
    assert "| svf | 4 | +25.0 [" in text


def test_a_task_without_choices_is_refused(tiny_lm: HFLM, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="task vowels has no choices"):
        between(configs("svf"), tmp_path, tiny_lm, planted.texts(), points=3, docs=6)
