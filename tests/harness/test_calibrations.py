"""Answers about held-out prompts outlive the run, and change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from t2.adapters.engine.transformers import TransformersEngine
from t2.core.settings import cache_dir
from t2.harness.model import T2LM
from tests.harness import tiny


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of questions that the engine is asked, call by call."""
    counts: list[int] = []
    for name in ("score", "generate"):
        own = getattr(TransformersEngine, name)

        def counting(self: Any, requests: Any, *args: Any, own: Any = own, **kwargs: Any) -> Any:
            counts.append(len(requests))
            return own(self, requests, *args, **kwargs)

        monkeypatch.setattr(TransformersEngine, name, counting)
    return counts


def make(folder: Path, **args: Any) -> T2LM:
    return T2LM.create_from_arg_obj({"pretrained": str(folder), **args}, {"device": "cpu", "batch_size": 3})


@pytest.mark.parametrize(("dispatch", "once"), [("likelihood", 4 * (1 + 80)), ("generate", 80)])
def test_a_second_run_asks_about_its_own_prompts_alone(
    dispatch: str, once: int, tiny_folder: Path, experts: str, asked: list[int]
) -> None:
    digests = []
    for fallback in ("mixture", "mixture", "base"):
        other = {"fallback": fallback} if dispatch == "likelihood" else {}
        lm = make(tiny_folder, adapt="prompt", dispatch=dispatch, **other)
        for path in (cache_dir() / "adaptations").glob("*"):
            path.unlink()
        tiny.evaluate(lm, [tiny.choice_task()])
        digests.append(lm.records[0].digest())
    assert asked[0] == once
    assert asked[1] == asked[2] == asked[3]
    assert len(asked) == 4
    assert digests[0] == digests[1]


def test_a_damaged_file_is_asked_for_again(tiny_folder: Path, experts: str, asked: list[int]) -> None:
    for damage in (b"{", b"[1]", b'[["", "x", "y"]]'):
        tiny.evaluate(make(tiny_folder, adapt="prompt"), [tiny.choice_task()])
        for path in (cache_dir() / "adaptations").glob("*"):
            path.unlink()
        (path,) = (cache_dir() / "calibrations").glob("*")
        path.write_bytes(damage)
    tiny.evaluate(make(tiny_folder, adapt="prompt"), [tiny.choice_task()])
    assert asked[::2] == [4 * 81] * 4
