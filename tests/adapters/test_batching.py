"""Which form runs a population, what memory allows, what happens when it runs out, and what an interruption leaves."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from t2.adapters.engine.base import Generated, GenerateRequest, Scored, ScoreRequest
from t2.adapters.engine.costs import Load, spanning
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z
from t2.core.errors import ModelError
from tests.adapters.checks import weights
from tests.adapters.conftest import make_model, make_tokenizer, random_z

PROMPTS = ["the cat", "a", "1 + 2 =", "stop the ab", "Zebra? no"]


def encode(text: str) -> tuple[int, ...]:
    return tuple(make_tokenizer().encode(text, add_special_tokens=False))


def fresh() -> TransformersEngine:
    return TransformersEngine(make_model("llama"), make_tokenizer(), "tiny-llama")


def population(engine: TransformersEngine, count: int) -> tuple[list[Z | None], list[GenerateRequest], list[int]]:
    """Mixtures of two experts, the base among them, each on all prompts."""
    one, two = random_z(engine, 1), random_z(engine, 2)
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(count, 2, generator=generator).tolist()
    mixtures: list[Z | None] = [None, *({n: a * one[n] + b * two[n] for n in one} for a, b in shares)]
    rows = [m for m in range(len(mixtures)) for _ in PROMPTS]
    return mixtures, [GenerateRequest(encode(prompt), 10, ("a",)) for prompt in PROMPTS] * len(mixtures), rows


@contextlib.contextmanager
def failing(engine: TransformersEngine, error: Callable[[int], BaseException | None]) -> Iterator[None]:
    """Context in which the model's embedding fails where ``error``, given the number of its tokens, says so."""

    def check(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found = error(args[0].numel())
        if found is not None:
            raise found

    handle = engine.model.get_input_embeddings().register_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


def test_both_forms_answer_a_population_alike() -> None:
    engine = fresh()
    mixtures, requests, rows = population(engine, 6)
    before = weights(engine)
    engine.form = "activation"
    expected = engine.generate(requests, mixtures, rows)
    engine.form = "weight"
    assert engine.generate(requests, mixtures, rows) == expected
    assert engine.forms.kept_bytes > 0
    assert len({answer.tokens for answer in expected}) > len(PROMPTS)
    assert weights(engine) == before


def test_both_forms_score_a_population_alike() -> None:
    engine = fresh()
    several, _, _ = population(engine, 6)
    requests = [ScoreRequest((5, 6, 7 + i % 4), (8 + i % 3, 9)) for i in range(48)]
    rows = [i % 7 for i in range(48)]
    before = weights(engine)
    engine.form = "activation"
    expected = engine.score(requests, several, rows)
    engine.form = "weight"
    found = engine.score(requests, several, rows)
    assert [one.greedy for one in found] == [one.greedy for one in expected]
    values = [one.loglikelihood for one in expected]
    assert [one.loglikelihood for one in found] == pytest.approx(values, abs=1e-3)
    assert len({round(value, 3) for value in values}) > 12
    assert weights(engine) == before


def test_the_form_that_costs_less_is_chosen() -> None:
    engine = fresh()
    mixtures = [random_z(engine, seed) for seed in range(4)]
    in_turn, in_one = [Load(8, 800, 40)] * 4, [Load(32, 3200, 40)]
    # The form with much less work is chosen.
    assert engine.costs.choose(mixtures, in_turn, [Load(32, 3200, 10**6)]) == "weight"
    assert engine.costs.choose(mixtures, [Load(8, 800, 10**6)] * 4, in_one) == "activation"
    assert engine.costs.choose([], in_turn, in_one) == "activation"


@pytest.mark.parametrize("form", [None, "weight"])
def test_answers_do_not_depend_on_a_clock_a_cache_earlier_work_or_free_memory(
    form: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(engine: TransformersEngine) -> tuple[list[Generated], list[Scored], list[str]]:
        mixtures, requests, rows = population(engine, 12)
        chosen: list[str] = []
        costs = type(engine.costs)

        def note(*args: Any) -> Any:
            chosen.append(costs.choose(engine.costs, *args))
            return chosen[-1]

        monkeypatch.setattr(engine.costs, "choose", note)
        found = engine.generate(requests, mixtures, rows)
        asked = [ScoreRequest(request.context, (8, 9)) for request in requests]
        return found, engine.score(asked, mixtures, rows), chosen

    def half() -> TransformersEngine:
        engine = TransformersEngine(make_model("llama", dtype=torch.bfloat16), make_tokenizer(), "tiny-llama")
        engine.form = form
        return engine

    def hours() -> float:
        return 3600.0 * next(ticks)

    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "empty"))
    engine = half()
    first = run(engine)
    assert run(engine) == first  # repeated
    assert run(half()) == first  # with the caches of the first run
    assert not (tmp_path / "empty" / "costs").exists()
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "another"))
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", hours)
    monkeypatch.setattr("t2.adapters.engine.weights.free_bytes", lambda device: 10**8)
    monkeypatch.setattr("t2.adapters.engine.batching.free_bytes", lambda device: 10**8)
    assert run(half()) == first


def test_few_mixtures_span_a_population() -> None:
    engine = fresh()
    mixtures, _, _ = population(engine, 8)
    span = spanning(mixtures)
    assert len(span) == 2
    assert [id(z) for z in spanning(mixtures)] == [id(z) for z in span]
    others: list[Z | None] = [random_z(engine, seed) for seed in range(10, 16)]
    assert spanning(others) == []
    assert spanning([None]) == []


def test_out_of_memory_halves_the_batch_and_goes_on() -> None:
    engine = fresh()
    mixtures, requests, rows = population(engine, 3)
    expected = engine.generate(requests, mixtures, rows)
    # More than 3 rows of the longest prompt, 9 tokens.
    with failing(engine, lambda tokens: torch.OutOfMemoryError("CUDA out of memory") if tokens > 33 else None):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert engine.generate(requests, mixtures, rows) == expected
        assert [str(warning.message).split(": ")[1] for warning in told] == [
            f"out of memory with {rows} rows, going on with {rows // 2}" for rows in (20, 10, 5)
        ]
        assert engine.batch_size == 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert engine.generate(requests, mixtures, rows) == expected


def test_scores_too_are_computed_in_halves() -> None:
    engine = fresh()
    asked = [ScoreRequest(encode(prompt) * 8, encode(choice)) for prompt in PROMPTS for choice in ("ab", "stop")]
    mixtures: list[Z | None] = [None, random_z(engine, 1)]
    rows = [i // 2 % 2 for i in range(len(asked))]
    expected = engine.score(asked, mixtures, rows)
    message = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    with (
        failing(engine, lambda tokens: RuntimeError(message) if tokens > 200 else None),
        pytest.warns(UserWarning, match="out of memory with 5 rows, going on with 2"),
    ):
        found = engine.score(asked, mixtures, rows)
    for one, other in zip(found, expected, strict=True):
        assert one.loglikelihood == pytest.approx(other.loglikelihood, abs=1e-3)


@pytest.mark.filterwarnings("ignore:.*out of memory with")
def test_one_request_too_large_for_memory_is_one_line() -> None:
    engine = fresh()
    with (
        failing(engine, lambda _: torch.OutOfMemoryError("out of memory")),
        pytest.raises(ModelError, match=r"prompts of 2 tokens and answers of 5 does not fit into the memory of cpu"),
    ):
        engine.generate([GenerateRequest(encode("ab") * 2, 5)] * 3)
    with failing(engine, lambda _: RuntimeError("shapes differ")), pytest.raises(RuntimeError, match="shapes differ"):
        engine.generate([GenerateRequest(encode("ab"), 5)] * 3)


@pytest.mark.parametrize("form", ["weight", "activation"])
def test_an_interruption_leaves_no_hooks_and_the_base_weights(form: str) -> None:
    engine = fresh()
    mixtures, requests, rows = population(engine, 4)
    expected, before = engine.generate(requests), weights(engine)
    engine.form = "weight" if form == "weight" else "activation"
    steps: list[int] = []

    def interrupt(tokens: int) -> BaseException | None:
        steps.append(tokens)
        return KeyboardInterrupt() if len(steps) == 8 else None

    with failing(engine, interrupt), pytest.raises(KeyboardInterrupt):
        engine.generate(requests, mixtures, rows)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in engine.model.modules())
    assert weights(engine) == before
    assert engine.generate(requests) == expected


def test_batches_are_bounded_by_the_memory_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fresh()
    assert engine.budget.rows(100) == 32
    assert TransformersEngine(engine.model, make_tokenizer(), "tiny", batch_size=3).budget.rows(100) == 3
    monkeypatch.setattr("t2.adapters.engine.batching.total_bytes", lambda device: 10**8)
    small = fresh().budget
    assert 1 < small.rows(1000) < 32
    assert small.rows(10**8) == 1


def test_less_free_memory_than_a_batch_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fresh()
    mixtures, requests, rows = population(engine, 1)
    expected = engine.generate(requests, mixtures, rows)
    monkeypatch.setattr("t2.adapters.engine.batching.free_bytes", lambda device: 10**5)
    with pytest.warns(UserWarning, match=r"need more memory than is free on cpu, going on with \d+; in low precision"):
        assert engine.generate(requests, mixtures, rows) == expected
