"""Training on past the selected point, and from the last step of a finished training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM

from t2.core.errors import ArgumentError
from t2.core.settings import experts_dir
from t2.harness.base import open_base
from t2.training.api import TrainResult
from t2.training.checkpoint import load_checkpoint
from t2.training.config import make_config
from t2.training.trainer import learning_rate
from tests.training import planted
from tests.training.test_train import run


def points(result: Any) -> list[tuple[int, str, float, float]]:
    return [(p.step, p.split, p.reward, p.score) for p in result.curve]


@pytest.mark.parametrize(
    "values",
    [
        {"schedule": "constant", "patience": 0},
        {"decay_steps": 8, "patience": 0, "kl": 0.1, "parametrisation": "sigmoid"},
        {"decay_steps": 8, "patience": 0, "update": "epoch"},
    ],
    ids=["constant", "sigmoid", "epoch"],
)
def test_four_steps_and_then_on_to_eight_are_eight(tiny_lm: HFLM, values: dict[str, Any]) -> None:
    task = planted.choices()
    whole = run(tiny_lm, task, folder=experts_dir() / "whole", **values, steps=8, validate_every=2)
    first = run(tiny_lm, task, **values, steps=4, validate_every=2)
    second = run(tiny_lm, task, **values, steps=8, validate_every=2, continue_=True)
    assert second.digest == whole.digest != first.digest
    assert points(second) == points(whole)
    assert not list(experts_dir().glob("letters.*"))


def test_a_run_stopped_by_patience_goes_on_from_its_last_step(tiny_lm: HFLM) -> None:
    values: dict[str, Any] = {"steps": 8, "validate_every": 1, "learning_rate": 0.4, "schedule": "constant"}
    stopped = run(tiny_lm, planted.choices(), patience=2, **values)
    last = stopped.curve[-1].step
    assert last < 8
    further = run(tiny_lm, planted.choices(), patience=0, continue_=True, **values)
    at_once = run(tiny_lm, planted.choices(), patience=0, folder=experts_dir() / "at once", **values)
    assert further.curve[-1].step == 8
    assert points(further)[: len(stopped.curve)] == points(stopped)
    assert further.digest == at_once.digest


def test_a_killed_continuation_goes_on(tiny_lm: HFLM, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {"schedule": "constant", "validate_every": 2, "checkpoint_every": 1}
    whole = run(tiny_lm, planted.choices(), folder=experts_dir() / "whole", **values, steps=6)
    first = run(tiny_lm, planted.choices(), **values, steps=2)
    with monkeypatch.context() as patched:

        def cut(config: Any, step: int) -> float:
            if step == 4:
                raise KeyboardInterrupt
            return learning_rate(config, step)

        patched.setattr("t2.training.trainer.learning_rate", cut)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_lm, planted.choices(), **values, steps=6, continue_=True)
    assert first.path.exists()
    assert (experts_dir() / "letters.training").exists()
    with pytest.raises(ArgumentError, match=r"steps was 6 and is 7"):
        run(tiny_lm, planted.choices(), **values, steps=7, continue_=True)
    assert run(tiny_lm, planted.choices(), **values, steps=6, continue_=True).digest == whole.digest


def test_the_chosen_run_of_a_sweep_goes_on_and_the_sweep_stays(tiny_lm: HFLM) -> None:
    values: dict[str, Any] = {"schedule": "constant", "validate_every": 2}
    swept = run(tiny_lm, planted.choices(), kl=(0.0, 0.1), steps=2, **values)
    with pytest.raises(ArgumentError, match="give the one --kl that was chosen"):
        run(tiny_lm, planted.choices(), kl=(0.0, 0.1), steps=4, continue_=True, **values)
    further = run(tiny_lm, planted.choices(), kl=swept.kl, steps=4, continue_=True, **values)
    alone = run(tiny_lm, planted.choices(), kl=swept.kl, steps=4, folder=experts_dir() / "alone", **values)
    assert further.digest == alone.digest
    assert json.loads((further.path.parent / "sweep.json").read_text())["chosen"] == swept.kl


def test_a_kill_between_the_two_renames_is_mended(tiny_lm: HFLM) -> None:
    values: dict[str, Any] = {"schedule": "constant", "validate_every": 2}
    run(tiny_lm, planted.choices(), steps=2, **values)
    done = run(tiny_lm, planted.choices(), steps=4, continue_=True, **values)
    home = done.path.parent
    home.rename(home.with_name("letters.training"))
    assert run(tiny_lm, planted.choices(), steps=4, continue_=True, **values).digest == done.digest
    assert done.path.exists()


def test_what_cannot_go_on_is_told(tiny_lm: HFLM) -> None:
    values: dict[str, Any] = {"steps": 2, "validate_every": 1}
    with pytest.raises(ArgumentError, match="no finished expert letters"):
        run(tiny_lm, planted.choices(), continue_=True, **values)
    done = run(tiny_lm, planted.choices(), **values)
    with pytest.raises(ArgumentError, match=r"has 2 steps.*give more --steps"):
        run(tiny_lm, planted.choices(), continue_=True, **values)
    with pytest.raises(ArgumentError, match=r"may change steps, .* only, and seed was 0 and is 1"):
        run(tiny_lm, planted.choices(), continue_=True, **{**values, "seed": 1, "steps": 4})
    with pytest.raises(ArgumentError, match="another base model, dtype or set of documents"):
        run(tiny_lm, planted.choices(40), continue_=True, **{**values, "steps": 4})
    shutil.move(done.path.parent / "checkpoint.safetensors", experts_dir() / "elsewhere")
    with pytest.raises(ArgumentError, match="holds no checkpoint"):
        run(tiny_lm, planted.choices(), continue_=True, **{**values, "steps": 4})


def test_the_schedule_follows_from_step_and_configuration() -> None:
    def rates(steps: int, **values: Any) -> list[float]:
        config = make_config(task="t", name="n", steps=steps, **values)
        return [learning_rate(config, step) for step in range(steps)]

    assert rates(4, decay_steps=8) == rates(8, decay_steps=8)[:4] == rates(8)[:4] != rates(4)
    assert rates(6, schedule="constant", warmup=2, learning_rate=1.0) == [0.5, 1, 1, 1, 1, 1]
    for values, message in (
        ({"decay_steps": 3}, "ends the schedule"),
        ({"schedule": "constant", "decay_steps": 9}, "cosine"),
    ):
        with pytest.raises(ArgumentError, match=message):
            make_config(task="t", name="n", steps=4, **values)


@pytest.mark.parametrize("at_first", [True, False], ids=["factors", "hooks"])
def test_a_run_stays_with_the_form_that_memory_allowed_at_first(
    tiny_folder: Path, at_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {"schedule": "constant", "validate_every": 2, "checkpoint_every": 1, "steps": 4}

    def trained(plenty: bool, stop: int | None = None, **more: Any) -> TrainResult:
        def rate(config: Any, step: int) -> float:
            if step == stop:
                raise KeyboardInterrupt
            return learning_rate(config, step)

        with monkeypatch.context() as patched:
            patched.setattr("t2.adapters.engine.forms.total_bytes", lambda device: 2**40 if plenty else 1000)
            patched.setattr("t2.training.trainer.learning_rate", rate)
            lm = open_base(str(tiny_folder), device="cpu", dtype="bfloat16")
            return run(lm, planted.choices(), **values, **more)

    whole, otherwise = (
        trained(plenty, folder=experts_dir() / str(plenty)).digest for plenty in (at_first, not at_first)
    )
    assert whole != otherwise
    with pytest.raises(KeyboardInterrupt):
        trained(at_first, stop=2)
    kept = load_checkpoint(experts_dir() / "letters.training" / "checkpoint.safetensors")
    assert (kept.progress.step, kept.progress.factors) == (2, at_first)
    assert trained(not at_first).digest == whole
