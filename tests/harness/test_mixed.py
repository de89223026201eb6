"""Pass 2 of a dispatch in one batch whose rows have mixtures of their own: lm-eval's tokens, where it is worth it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from t2.adapters.engine.base import GenerateRequest
from t2.adapters.engine.costs import Load
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.strategies import Choice, Job, Plan
from t2.adapters.strategies.prompt import PromptStrategy
from t2.core.errors import ExpertError
from t2.harness.model import T2LM
from tests.harness import tiny

LONG: dict[str, Any] = {"until": ["e", "\n"], "max_gen_toks": 24, "do_sample": False}


def make(folder: Path, **args: Any) -> T2LM:
    given = {"pretrained": str(folder), "adapt": "prompt", **args}
    return T2LM.create_from_arg_obj(given, {"device": "cpu", "batch_size": 3})


@pytest.fixture(autouse=True)
def sent_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts go to the base and to each expert in turn: the tiny model itself hardly tells domains apart."""

    def plan(self: PromptStrategy, job: Job) -> Plan:
        choices = (Choice(), *(Choice({expert.name: 1.0}, expert.z) for expert in job.experts))
        return Plan(choices, tuple(i % len(choices) for i in range(len(job.prompts))), "in turn")

    monkeypatch.setattr(PromptStrategy, "plan", plan)


def tasks() -> list[Any]:
    """Two that generate, with other stop texts and lengths, and one of likelihoods."""
    return [tiny.text_task(), tiny.text_task("longer", generation_kwargs=LONG), tiny.choice_task()]


def watched(lm: T2LM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the calls that lm-eval's own model gets to generate."""
    calls: list[int] = []
    original = lm.inner.generate_until

    def count(requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        calls.append(len(requests))
        return original(requests, disable_tqdm)

    monkeypatch.setattr(lm.inner, "generate_until", count)
    return calls


def engine_of(lm: T2LM) -> TransformersEngine:
    assert lm._runtime is not None
    engine = lm._runtime.engine
    assert isinstance(engine, TransformersEngine)
    return engine


def test_the_answers_are_those_of_lm_eval_one_mixture_after_another(
    tiny_folder: Path, experts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_rows, in_turn = make(tiny_folder, experts=experts), make(tiny_folder, experts=experts, mixed="never")
    calls = watched(in_rows, monkeypatch), watched(in_turn, monkeypatch)
    found, expected = tiny.evaluate(in_rows, tasks()), tiny.evaluate(in_turn, tasks())
    assert len(in_rows.records[0].mixtures) == 4
    for name in ("tiny_text", "longer", "tiny_choice"):
        assert tiny.answers(found, name) == tiny.answers(expected, name)
    assert found["results"] == expected["results"]
    assert calls[0] == []
    assert sum(calls[1]) == 24
    assert calls[1] == [6, 6, 6, 6]
    assert in_rows.records[0].mixtures == in_turn.records[0].mixtures
    alone = tiny.evaluate(make(tiny_folder, adapt=None), tasks())
    for name in ("tiny_text", "longer"):
        pairs = zip(tiny.answers(found, name), tiny.answers(alone, name), strict=True)
        same = [one[3] == other[3] for one, other in pairs]
        # The base's own rows are every fourth.
        assert all(same[::4])
        assert sum(same) < 8
    assert all(record.timing.pass2 > 0 for record in in_rows.records)


def test_the_engines_costs_decide(tiny_folder: Path, experts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"pretrained": str(tiny_folder), "adapt": "prompt", "experts": experts}
    lm = T2LM.create_from_arg_obj(given, {"device": "cpu", "batch_size": 2})
    calls = watched(lm, monkeypatch)
    asked: list[tuple[int, Sequence[Load], Sequence[Load]]] = []

    def choose(mixtures: Sequence[Any], in_turn: Sequence[Load], in_one: Sequence[Load]) -> str:
        asked.append((len(mixtures), in_turn, in_one))
        return "weight"

    monkeypatch.setattr(engine_of(lm).costs, "choose", choose)
    tiny.evaluate(lm, [tiny.text_task()])
    assert sum(calls) == 12
    mixtures, in_turn, in_one = asked[-1]
    # lm-eval's model takes at most two at a time here, the engine all at once.
    assert mixtures == 3
    assert [load.rows for load in in_turn] == [2, 1] * 4
    assert [load.rows for load in in_one] == [12]


@pytest.mark.parametrize(("mixed", "in_rows"), [("exact", False), ("always", True)])
def test_where_rounding_tells_them_apart_it_must_be_asked_for(
    mixed: str, in_rows: bool, tiny_folder: Path, experts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make(tiny_folder, experts=experts, mixed=mixed, dtype="bfloat16")
    calls = watched(lm, monkeypatch)
    tiny.evaluate(lm, [tiny.text_task()])
    assert (sum(calls) == 0) == in_rows


def test_samples_come_from_lm_evals_own_model(tiny_folder: Path, experts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make(tiny_folder, experts=experts, mixed="always")
    calls = watched(lm, monkeypatch)
    drawn = {**LONG, "do_sample": True, "temperature": 1.0}
    tiny.evaluate(lm, [tiny.text_task(generation_kwargs=drawn)])
    assert sum(calls) == 12


def test_they_are_in_lm_evals_cache(tiny_folder: Path, experts: str, tmp_path: Path) -> None:
    path = str(tmp_path / "answers")
    first = tiny.evaluate(make(tiny_folder, experts=experts), [tiny.text_task()], use_cache=path)
    lm = make(tiny_folder, experts=experts)
    lm.generate_until = lambda requests: pytest.fail("not from the cache")  # type: ignore[method-assign]
    again = tiny.evaluate(lm, [tiny.text_task()], use_cache=path)
    assert tiny.answers(again, "tiny_text") == tiny.answers(first, "tiny_text")


def test_a_mixture_that_changes_nothing_is_an_error(
    tiny_folder: Path, experts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make(tiny_folder, experts=experts)
    assert lm._runtime is not None
    answered = engine_of(lm).generate
    silent: Any = []

    def generate(requests: Sequence[GenerateRequest], *args: Any, **kwargs: Any) -> Any:
        silent.append(engine_of(lm).forms)
        monkeypatch.setattr("t2.adapters.engine.forms.shifted", lambda y, shift, q, bias: y)
        return answered(requests, *args, **kwargs)

    monkeypatch.setattr(engine_of(lm), "generate", generate)
    with pytest.raises(ExpertError, match=r"the mixture .* leaves the logits of a probe text unchanged"):
        tiny.evaluate(lm, [tiny.text_task()])
    assert silent


@pytest.mark.parametrize("mixed", ["always", "never"])
def test_in_bfloat16_the_answers_depend_on_no_cache_and_no_clock(
    mixed: str, tiny_folder: Path, experts: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(cache: str) -> dict[str, Any]:
        monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / cache))
        lm = make(tiny_folder, experts=experts, mixed=mixed, dtype="bfloat16")
        found = tiny.evaluate(lm, tasks())
        return {name: tiny.answers(found, name) for name in ("tiny_text", "longer", "tiny_choice")}

    first = run("one")
    assert run("one") == first  # with the caches of the first run
    clock = itertools.count(step=1000.0)
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert run("two") == first
    assert not list(tmp_path.glob("*/costs"))
