"""The engine over vLLM, against the engine over transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from t2.adapters.engine import GenerateRequest, ScoreRequest
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.engine.vllm import VllmEngine
from t2.adapters.expert import Z
from t2.adapters.targets import layer_of
from t2.core.errors import ArgumentError, ModelError

LONG = " ".join(f"Box {i} holds {i * 7 % 13} red and {i * 5 % 11} blue balls." for i in range(30))
"""Longer than several blocks of vLLM's prefix cache."""
TEXTS = ("Hello, my name is", "Q: What is 12 + 7?\nA:", f"{LONG} So all boxes together hold")


def random_z(engine: TransformersEngine, seed: int, chosen: Callable[[str], bool], scale: float = 1.0) -> Z:
    """A random z of the last three layers' chosen matrices."""
    draw = torch.Generator().manual_seed(seed)
    ranks = {name: rank for name, rank in engine.ranks().items() if (layer_of(name) or 0) >= 27 and chosen(name)}
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


def test_likelihoods_are_those_of_transformers_under_every_mixture(
    engine: VllmEngine, other: TransformersEngine, mixtures: list[Z | None], prompts: list[tuple[int, ...]]
) -> None:
    requests = [ScoreRequest(prompt[:-3], prompt[-3:]) for _ in mixtures for prompt in prompts]
    rows = [row for row in range(len(mixtures)) for _ in prompts]
    ours, theirs = (side.score(requests, mixtures, rows) for side in (engine, other))
    for one, two in zip(ours, theirs, strict=True):
        assert one.loglikelihood == pytest.approx(two.loglikelihood, abs=1e-3)
        assert one.greedy == two.greedy
    assert abs(ours[2].loglikelihood - ours[5].loglikelihood) > 1e-2


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
