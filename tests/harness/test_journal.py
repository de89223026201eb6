"""What was answered is not asked again: not by a run that was killed, and not by one with other settings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from t2.adapters.expert import Z
from t2.core.record import AdaptationRecord
from t2.harness import journal
from t2.harness.journal import Journal
from t2.harness.model import T2LM
from t2.harness.scorer import TaskScorer
from t2.harness.tasks import TaskDocs
from tests.harness import tiny
from tests.harness.stopped import SEARCH
from tests.harness.test_scorer import Counting

ROOT = Path(__file__).parents[2]


def adapt(folder: Path, task: str, **args: Any) -> AdaptationRecord:
    lm = T2LM.create_from_arg_obj({"pretrained": str(folder), **SEARCH, **args}, {"device": "cpu", "batch_size": 3})
    tiny.evaluate(lm, [getattr(tiny, task)()])
    return lm.records[0]


def mixtures(engine: Counting, count: int = 3) -> list[Z | None]:
    rng = torch.Generator().manual_seed(1)
    return [
        None,
        *({n: 1 + 0.4 * torch.randn(r, generator=rng) for n, r in engine.ranks().items()} for _ in range(count)),
    ]


@pytest.mark.parametrize("make", [tiny.choice_task, tiny.text_task, tiny.rolling_task])
def test_another_run_asks_only_for_what_is_new(make: Any, tiny_lm: HFLM) -> None:
    def scorer(engine: Counting) -> tuple[TaskScorer, int]:
        found = TaskScorer(TaskDocs(make(), tiny_lm), tiny.questions(6, 100), engine, progress=False)
        return found, found.keep(Journal("key"))

    first, second = (Counting(tiny_lm.model, tiny_lm.tokenizer, "tiny") for _ in range(2))
    zs = mixtures(first)
    one, known = scorer(first)
    assert known == 0
    scores = one.evaluate(zs[:2], [0, 1, 2]) + one.evaluate(zs[:3])
    ties = one.tie_break(zs[:3])
    asked = first.asked
    two, known = scorer(second)
    assert known == 18
    assert two.evaluate(zs[:2], [0, 1, 2]) + two.evaluate(zs[:3]) == scores
    assert two.tie_break(zs[:3]) == ties
    assert second.asked == 0 < asked
    two.evaluate(zs)
    assert 0 < second.asked < asked


def test_a_line_that_is_cut_or_foreign_is_passed_over() -> None:
    kept = Journal("key")
    kept.add("answer", [(("a", 0), [[-1.5, True]]), (("", 1), [float("-inf")])])
    kept.path.write_bytes(
        kept.path.read_bytes() + b'[1]\n{"kind": "tie", "cells": [["a", 0, [-3.0, 2]]]}\n{"kind": "an'
    )
    expected = [
        ("answer", ("a", 0), [[-1.5, True]]),
        ("answer", ("", 1), [float("-inf")]),
        ("tie", ("a", 0), [-3.0, 2]),
    ]
    assert list(Journal("key").read()) == expected
    Journal("key").add("tie", [(("b", 2), [0.0, 0])])
    assert list(Journal("key").read()) == [*expected, ("tie", ("b", 2), [0.0, 0])]
    assert list(Journal("other").read()) == []


def test_it_is_bounded_and_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MOST", 400)
    monkeypatch.setattr(journal, "ALL", 1000)
    for number in range(8):
        kept = Journal(str(number))
        for i in range(20):
            kept.add("answer", [(("z", i), ["x" * 20])])
        assert kept.path.stat().st_size <= 400
        os.utime(kept.path, (number, number))
    left = sorted(path.stem for path in kept.path.parent.glob("*.jsonl"))
    assert left[-1] == "7"
    assert left == [str(number) for number in range(8 - len(left), 8)]
    assert sum(path.stat().st_size for path in kept.path.parent.glob("*.jsonl")) <= 1000


def test_a_cache_that_cannot_be_written_ends_no_search(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    kept = Journal("key")
    kept.add("tie", [])
    kept.add("tie", [])
    assert list(kept.read()) == []
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["answers are not kept for a later run"]


@pytest.mark.parametrize(("task", "name"), [("text_task", "SIGKILL"), ("choice_task", "SIGINT")])
def test_a_search_that_was_stopped_goes_on_to_the_same_result(
    task: str,
    name: str,
    tiny_folder: Path,
    experts: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [sys.executable, "-m", "tests.harness.stopped", str(tiny_folder), task, name, "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert not (tmp_path / "cache" / "adaptations").exists()
    if name == "SIGKILL":
        assert done.returncode == -signal.SIGKILL, done.stderr
    else:
        assert done.returncode == 130, done.stderr
        assert "Traceback" not in done.stderr
        told = "stopped while adapting; the base model is as it was, and the same command goes on from here"
        assert done.stderr.splitlines()[-1] == f"t2: tiny_choice: {told}"
    resumed = adapt(tiny_folder, task)
    assert "answers of an earlier run are known and not asked for again" in capsys.readouterr().err
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "fresh"))
    unbroken = adapt(tiny_folder, task)
    assert "of an earlier run" not in capsys.readouterr().err
    assert resumed.digest() == unbroken.digest()


def test_ctrl_c_leaves_the_weights_of_the_base(
    tiny_folder: Path, experts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = T2LM.create_from_arg_obj({"pretrained": str(tiny_folder), **SEARCH}, {"device": "cpu", "batch_size": 3})
    before = {name: value.clone() for name, value in lm.inner.model.state_dict().items()}
    forward, calls = type(lm.inner.model).forward, [0]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > 8:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(type(lm.inner.model), "forward", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        tiny.evaluate(lm, [tiny.choice_task()])
    assert "stopped while adapting" in caught.value.__notes__[0]
    assert all(torch.equal(value, before[name]) for name, value in lm.inner.model.state_dict().items())


def test_ctrl_c_while_answering_is_told_and_leaves_the_weights_of_the_base(
    tiny_folder: Path, experts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = {"pretrained": str(tiny_folder), "adapt": "expert", "experts": "alpha"}
    lm = T2LM.create_from_arg_obj(args, {"device": "cpu", "batch_size": 3})
    before = {name: value.clone() for name, value in lm.inner.model.state_dict().items()}

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(lm.inner, "_model_call", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        tiny.evaluate(lm, [tiny.choice_task()])
    assert caught.value.__notes__ == ["t2: stopped while answering; the base model is as it was"]
    assert all(torch.equal(value, before[name]) for name, value in lm.inner.model.state_dict().items())


def test_a_search_with_other_settings_takes_up_the_answers_and_one_with_a_time_limit_does_not(
    tiny_folder: Path, experts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = adapt(tiny_folder, "choice_task", generations=2)
    capsys.readouterr()
    longer = adapt(tiny_folder, "choice_task", generations=3)
    assert "answers of an earlier run are known" in capsys.readouterr().err
    assert longer.history[:2] == first.history
    for other in ({"shots": 5}, {"budget": "60s"}):
        adapt(tiny_folder, "choice_task", **other)
        assert "of an earlier run" not in capsys.readouterr().err
