"""The engine over vLLM, against the engine over transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from t2.adapters.engine import GenerateRequest, ScoreRequest
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.engine.vllm import VllmEngine
from t2.adapters.expert import Z
from t2.adapters.targets import layer_of
from t2.core.errors import ArgumentError, ModelError

LONG = " ".join(f"Box {i} holds {i * 7 % 13} red and {i * 5 % 11} blue balls." for i in range(8))
"""Longer than two blocks of vLLM's prefix cache."""
TEXTS = ("Hello, my name is", "Q: What is 12 + 7?\nA:", f"{LONG} So all boxes together hold")


def random_z(engine: TransformersEngine, seed: int, chosen: Callable[[str], bool], scale: float = 1.0) -> Z:
    """A random z of the last three layers' chosen matrices."""
    draw = torch.Generator().manual_seed(seed)
    ranks = {name: rank for name, rank in engine.ranks().items() if (layer_of(name) or 0) >= 1 and chosen(name)}
    return {name: 1 + scale * torch.randn(rank, generator=draw) for name, rank in ranks.items()}


@pytest.fixture(scope="module")
def mixtures(other: TransformersEngine) -> list[Z | None]:
    """The base, all matrices, one of those that vLLM fuses, one of those that it does not, and the base again."""
    return [
        None,
        random_z(other, 0, lambda name: True),
        random_z(other, 1, lambda name: "q_proj" in name or "up_proj" in name),
        random_z(other, 2, lambda name: "v_proj" in name or "down_proj" in name),
        None,
    ]


@pytest.fixture(scope="module")
def prompts(other: TransformersEngine) -> list[tuple[int, ...]]:
    return [tuple(other.tokenizer(text)["input_ids"]) for text in TEXTS]


def test_it_is_the_same_base_with_the_same_matrices(engine: VllmEngine, other: TransformersEngine) -> None:
    assert engine.base == other.base
    assert engine.ranks() == other.ranks()
    assert engine.precision == "float32"


def test_tokens_are_those_of_transformers_under_every_mixture(
    engine: VllmEngine, other: TransformersEngine, mixtures: list[Z | None], prompts: list[tuple[int, ...]]
) -> None:
    requests = [GenerateRequest(prompt, 12, ("\n\n",), {"do_sample": False}) for _ in mixtures for prompt in prompts]
    rows = [row for row in range(len(mixtures)) for _ in prompts]
    found = engine.generate(requests, mixtures, rows)
    assert [answer.tokens for answer in found] == [a.tokens for a in other.generate(requests, mixtures, rows)]
    # Each mixture answers the long prompt, whose blocks vLLM keeps, in its own way.
    long = [found[row * len(prompts) + 2].tokens for row in range(len(mixtures))]
    assert len(set(long)) == 4
    assert long[0] == long[-1]


CONTINUATIONS: dict[str, tuple[tuple[int, ...], ...]] = {
    "one of several tokens": ((40, 41, 42),),
    "several of one token": ((40,), (41,), (42,), (43,)),
    "several with shared beginnings": ((40, 41), (40, 42), (40,), (43, 41), (43, 42), (40, 44)),
    "many of one token": tuple((i,) for i in range(4, 104)) * 2,
}


@pytest.mark.parametrize("kind", list(CONTINUATIONS))
def test_likelihoods_are_those_of_transformers_under_every_mixture(
    kind: str,
    engine: VllmEngine,
    other: TransformersEngine,
    mixtures: list[Z | None],
    prompts: list[tuple[int, ...]],
) -> None:
    asked = [(row, prompt, own) for own in CONTINUATIONS[kind] for row in range(5) for prompt in prompts]
    # The likeliest next token too, whose greedy flag is true.
    asked += [(0, prompt, engine.generate([GenerateRequest(prompt, 1)])[0].tokens) for prompt in prompts]
    requests, rows = [ScoreRequest(prompt, own) for _, prompt, own in asked], [row for row, _, _ in asked]
    ours, theirs = (side.score(requests, mixtures, rows) for side in (engine, other))
    for one, two in zip(ours, theirs, strict=True):
        assert one.loglikelihood == pytest.approx(two.loglikelihood, abs=1e-3)
        assert one.greedy == two.greedy
    assert ours[-1].greedy
    assert abs(ours[2].loglikelihood - ours[5].loglikelihood) > 1e-2


@pytest.mark.parametrize("kind", ["one of several tokens", "several of one token"])
def test_a_mixture_is_asked_once_and_each_context_of_labels_is_read_once(
    kind: str,
    engine: VllmEngine,
    mixtures: list[Z | None],
    prompts: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, generate = [], engine.llm.generate

    def counted(asked: list[Any], *args: Any, **kwargs: Any) -> Any:
        calls.append(len(asked))
        return generate(asked, *args, **kwargs)

    monkeypatch.setattr(engine.llm, "generate", counted)
    asked = [(row, prompt, own) for own in CONTINUATIONS[kind] for prompt in prompts for row in (0, 1, 2)]
    switches = engine.switches
    engine.score([ScoreRequest(prompt, own) for _, prompt, own in asked], mixtures, [row for row, _, _ in asked])
    assert calls == [len(prompts)] * 3
    assert engine.switches - switches == 3  # to the two mixtures, and back


def test_while_switching_the_weights_go_straight_on_and_the_base_comes_back_when_asked_for(
    engine: VllmEngine, mixtures: list[Z | None], prompts: list[tuple[int, ...]]
) -> None:
    base, first, second = engine.probe(prompts[0], mixtures[:3])
    switches = engine.switches
    with engine.switching([], mixtures):
        for z, expected in zip(mixtures[1:3], (first, second), strict=True):
            with engine.applied(z):
                assert torch.equal(engine.probe(prompts[0])[0], expected)
        assert engine.switches - switches == 2
        assert torch.equal(engine.probe(prompts[0])[0], base)
        with engine.applied(mixtures[1]):
            with engine.applied(mixtures[2]):
                pass
            # Who asks vLLM past the engine meets the mixture that is applied.
            assert engine.switches - switches == 6
            assert torch.equal(engine.probe(prompts[0])[0], first)
    assert torch.equal(engine.probe(prompts[0])[0], base)
    assert engine.switches - switches == 7


def test_ctrl_c_leaves_the_base_and_nothing_half_done(
    engine: VllmEngine, mixtures: list[Z | None], prompts: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = engine.probe(prompts[2])[0]
    requests = [GenerateRequest(prompt, 12) for prompt in prompts]
    answers = engine.generate(requests)
    steps, step = [0], engine.llm.llm_engine.step

    def interrupted() -> Any:
        steps[0] += 1
        if steps[0] == 5:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine.llm.llm_engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt), engine.applied(mixtures[1]):
        engine.generate(requests, mixtures, [2] * len(requests))
    assert torch.equal(engine.probe(prompts[2])[0], before)
    assert engine.generate(requests) == answers


def test_the_base_comes_back_exactly_also_after_an_error(
    engine: VllmEngine, mixtures: list[Z | None], prompts: list[tuple[int, ...]]
) -> None:
    before = engine.probe(prompts[2])[0]
    with engine.applied(mixtures[1]):
        first = engine.probe(prompts[2])[0]
        with engine.applied(mixtures[2]):
            assert not torch.equal(engine.probe(prompts[2])[0], first)
        assert torch.equal(engine.probe(prompts[2])[0], first)
    assert not torch.equal(before, first)
    assert torch.equal(engine.probe(prompts[2])[0], before)
    with pytest.raises(KeyError), engine.applied(mixtures[3]):
        raise KeyError
    assert torch.equal(engine.probe(prompts[2])[0], before)
    outside, inside, again = engine.probe(prompts[2], [None, mixtures[1], None])
    assert torch.equal(outside, before)
    assert torch.equal(inside, first)
    assert torch.equal(again, before)


def test_a_sampled_answer_depends_on_its_seed_alone(engine: VllmEngine, prompts: list[tuple[int, ...]]) -> None:
    request = GenerateRequest(prompts[0], 12, (), {"do_sample": True, "temperature": 1.5}, seed=5)
    company = [GenerateRequest(prompt, 12, (), {"do_sample": True}) for prompt in prompts]
    alone = engine.generate([request], seed=1)[0]
    assert engine.generate([*company, request], seed=2)[-1] == alone
    free = [GenerateRequest(prompts[0], 12, (), {"temperature": 1.5})]
    assert engine.generate(free, seed=3) == engine.generate(free, seed=3)
    assert len({engine.generate(free, seed=seed)[0].tokens for seed in range(4)}) > 1


def test_an_answer_ends_before_its_stop_text_and_keeps_that_text_s_tokens(
    engine: VllmEngine, other: TransformersEngine, prompts: list[tuple[int, ...]]
) -> None:
    whole = engine.generate([GenerateRequest(prompts[0], 12)])[0]
    assert whole.text is not None
    stop = whole.text[4:8]
    cut = engine.generate([GenerateRequest(prompts[0], 12, (stop,))])[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.tokens == other.generate([GenerateRequest(prompts[0], 12, (stop,))])[0].tokens


def test_what_vllm_refuses_is_told_in_one_line(engine: VllmEngine, prompts: list[tuple[int, ...]]) -> None:
    with pytest.raises(ArgumentError, match="vLLM refuses to generate with num_beams=4"):
        engine.generate([GenerateRequest(prompts[0], 4, (), {"num_beams": 4})])
    with pytest.raises(ModelError, match="vLLM cannot answer"):
        engine.generate([GenerateRequest(prompts[0] * 500, 4)])
    with (
        pytest.raises(ModelError, match="has no adaptable matrix lm_head"),
        engine.applied({"lm_head": torch.zeros(2)}),
    ):
        pass
    assert engine.generate([GenerateRequest(prompts[0], 4)])
