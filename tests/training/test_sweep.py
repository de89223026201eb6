"""A sweep over λ: every run's curve, the best expert, and no run twice."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM

from t2.adapters.expert import load_expert
from t2.core.curve import read_curve
from t2.core.digests import sha256_file
from t2.core.errors import ArgumentError, StorageError, TrainingError
from t2.core.settings import experts_dir
from t2.harness.catalogue import known_experts
from t2.training.choices import ChoiceProblem
from tests.training import planted
from tests.training.test_train import run

KLS = (5.0, 0.0, 0.1)
FEW: dict[str, Any] = {"steps": 4, "validate_every": 2}


def table(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((experts_dir() / name / "sweep.json").read_text())
    return found


def test_the_chosen_run_is_the_expert_that_its_kl_alone_gives(tiny_lm: HFLM) -> None:
    result = run(tiny_lm, planted.choices(), kl=KLS, **FEW)
    found = table("letters")
    rows = {row["kl"]: row for row in found["runs"]}
    assert tuple(rows) == KLS
    measured = {kl: (row["best_score"], row["best_reward"]) for kl, row in rows.items()}
    assert len(set(measured.values())) == 3
    assert found["chosen"] == result.kl == max(measured, key=measured.__getitem__) != KLS[0]
    assert (result.base_score, result.best_score) == (rows[result.kl]["base_score"], rows[result.kl]["best_score"])
    digest = sha256_file(result.path)
    for kl in KLS:
        folder = result.path.parent / "sweep" / f"kl-{kl:g}"
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "curve.jsonl", "scores.json"]
        assert [p.step for p in read_curve(folder / "curve.jsonl") if p.split == "validation"] == [0, 2, 4]
    assert load_expert(result.path).manifest.training["kl"] == result.kl
    assert run(tiny_lm, planted.choices(), kl=result.kl, overwrite=True, **FEW).digest == digest


def test_an_interrupted_sweep_goes_on_and_repeats_nothing(tiny_lm: HFLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tiny_lm, planted.choices(), kl=(0.0, 0.1), folder=experts_dir() / "whole", **FEW)
    steps: list[tuple[float, int]] = []
    accumulate = ChoiceProblem.accumulate

    def counted(self: ChoiceProblem, z: Any, docs: Any, step: int) -> Any:
        if len(steps) == 7 and steps[-1] != (0.0, 0):
            steps.append((0.0, 0))  # the fourth step of the second run is cut off once
            raise KeyboardInterrupt
        steps.append((self.kl, step))
        return accumulate(self, z, docs, step)

    monkeypatch.setattr(ChoiceProblem, "accumulate", counted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_lm, planted.choices(), kl=(0.0, 0.1), checkpoint_every=1, **FEW)
    assert set(known_experts()) & {"letters", "letters.training"} == set()
    assert not [name for name in known_experts() if "sweep" in name]
    with pytest.raises(ArgumentError, match=r"kl was \[0\.0, 0\.1\] and is \[0\.0, 0\.2\]"):
        run(tiny_lm, planted.choices(), kl=(0.0, 0.2), **FEW)
    broken = run(tiny_lm, planted.choices(), kl=(0.0, 0.1), checkpoint_every=1, **FEW)
    assert broken.digest == whole.digest
    assert steps == [*((0.0, i) for i in range(4)), *((0.1, i) for i in range(3)), (0.0, 0), (0.1, 3)]


def test_a_run_that_improves_nothing_is_not_chosen(tiny_lm: HFLM) -> None:
    result = run(tiny_lm, planted.choices(), kl=(1e9, 0.0), **FEW)
    rows = table("letters")["runs"]
    assert rows[0]["best_step"] == 0 or rows[0]["best_score"] <= rows[1]["best_score"]
    assert result.kl == 0.0
    with pytest.raises(TrainingError, match=r"no run of the sweep over kl=0,0\.1 beat the base model.*curves are in"):
        run(tiny_lm, planted.choices(), "still", kl=(0.0, 0.1), learning_rate=1e-9, steps=2, validate_every=2)
    curves = sorted((experts_dir() / "still.training").rglob("curve.jsonl"))
    assert [path.parent.name for path in curves] == ["kl-0", "kl-0.1"]


def test_runs_of_nearly_equal_lambdas_are_two(tiny_lm: HFLM) -> None:
    result = run(tiny_lm, planted.choices(), kl=(0.1234567, 0.12345678), steps=1, validate_every=1)
    folders = [path.parent.name for path in (result.path.parent / "sweep").rglob("curve.jsonl")]
    assert sorted(folders) == ["kl-0.1234567", "kl-0.12345678"]


def test_a_sweep_whose_runs_all_diverge_says_so(tiny_lm: HFLM) -> None:
    with pytest.raises(TrainingError, match=r"with kl=0: .* diverged; lower learning_rate") as caught:
        run(tiny_lm, planted.choices(), kl=(0.0, 0.1), learning_rate=1e30, **FEW)
    assert "\n" not in str(caught.value)


def test_a_run_that_diverges_is_not_chosen(tiny_lm: HFLM, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulate = ChoiceProblem.accumulate

    def poisoned(self: ChoiceProblem, z: Any, docs: Any, step: int) -> Any:
        measured = accumulate(self, z, docs, step)
        if self.kl == 0.1 and step == 1:
            next(iter(z.values())).grad.fill_(float("nan"))
        return measured

    monkeypatch.setattr(ChoiceProblem, "accumulate", poisoned)
    result = run(tiny_lm, planted.choices(), kl=(0.1, 0.0), **FEW)
    assert result.kl == 0.0
    (diverged, finished) = table("letters")["runs"]
    assert "not finite" in diverged["error"]
    assert "error" not in finished
    assert [p.step for p in read_curve(result.path.parent / "sweep" / "kl-0.1" / "curve.jsonl")] == [0, 0]


@pytest.mark.parametrize(
    ("kl", "message"), [((0.1, 0.1), "names a value twice"), ((0.0, -1.0), "kl="), ("0,x", "kl=0,x"), ((), "kl=")]
)
def test_bad_lists_are_named(tiny_lm: HFLM, kl: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        run(tiny_lm, planted.choices(), kl=kl)


@pytest.mark.parametrize("place", range(8))
def test_a_kill_while_the_chosen_run_is_laid_out_costs_no_step(
    tiny_lm: HFLM, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    values: dict[str, Any] = {"kl": (0.0, 0.1), "steps": 1, "validate_every": 1}
    whole = run(tiny_lm, planted.choices(), folder=experts_dir() / "whole", **values)
    calls = 0

    def cut(function: Any) -> Any:
        def until(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > place:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return until

    with monkeypatch.context() as patched:
        patched.setattr("t2.training.runs.shutil.copy", cut(shutil.copy))
        patched.setattr("t2.training.folders.Path.unlink", cut(Path.unlink))
        with pytest.raises(KeyboardInterrupt):
            run(tiny_lm, planted.choices(), **values)
    with monkeypatch.context() as patched:
        patched.setattr(ChoiceProblem, "accumulate", None)
        again = run(tiny_lm, planted.choices(), **values)
    assert again.digest == whole.digest
    assert sorted(path.name for path in again.path.parent.iterdir()) == [
        "base.json",
        "checkpoint.safetensors",
        "config.json",
        "curve.jsonl",
        "expert.safetensors",
        "scores.json",
        "sweep",
        "sweep.json",
    ]
    assert not list((again.path.parent / "sweep").rglob("*.safetensors"))


def test_a_full_disk_while_the_chosen_run_is_laid_out_is_one_line(
    tiny_lm: HFLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("t2.training.runs.shutil.copy", full)
        with pytest.raises(StorageError, match=r"No space left on device; free space and start again"):
            run(tiny_lm, planted.choices(), kl=(0.0, 0.1), steps=1, validate_every=1)
    assert run(tiny_lm, planted.choices(), kl=(0.0, 0.1), steps=1, validate_every=1).path.exists()
