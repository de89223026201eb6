"""The transformers engine on tiny models: forms, rows, stops, sampling, scoring, gradients, and the base afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from t2.adapters.engine.base import GenerateRequest, ScoreRequest
from t2.adapters.engine.likelihood import Branches, LikelihoodModel
from t2.adapters.engine.transformers import TransformersEngine
from t2.core.errors import ModelError
from tests.adapters.checks import TOLERANCE, dense_weights, logits, weights
from tests.adapters.conftest import ARCHITECTURES, make_model, make_tokenizer, random_z

PROMPTS = ["the cat", "a", "1 + 2 =", "stop the ab", "Zebra? no", "0123456789", "q"]
CHOICES = ["the end", " x", "ab", "stop", "y"]


def encode(text: str) -> tuple[int, ...]:
    return tuple(make_tokenizer().encode(text, add_special_tokens=False))


def decode(tokens: tuple[int, ...]) -> str:
    return str(make_tokenizer().decode(list(tokens)))


def generates(max_new_tokens: int = 12, **kwargs: Any) -> list[GenerateRequest]:
    return [GenerateRequest(encode(prompt), max_new_tokens, **kwargs) for prompt in PROMPTS]


def scores() -> list[ScoreRequest]:
    return [ScoreRequest(encode(prompt), encode(choice)) for prompt in PROMPTS for choice in CHOICES]


def test_batches_do_not_change_answers(engine: TransformersEngine) -> None:
    mixtures, rows = [random_z(engine, 1), None], [i % 2 for i in range(len(PROMPTS))]
    alone = [engine.generate([request], mixtures, [row])[0] for request, row in zip(generates(), rows, strict=True)]
    assert engine.generate(generates(), mixtures, rows) == alone


@pytest.mark.parametrize("form", ["applied", "activation"])
def test_the_base_comes_back_bit_for_bit_also_after_an_error(form: str, engine: TransformersEngine) -> None:
    z, tokens = random_z(engine, 3), encode("the end")
    digest, before = weights(engine), logits(engine, tokens)
    storage = [parameter.data_ptr() for parameter in engine.model.parameters()]

    def run(fail: bool) -> torch.Tensor:
        with engine.applied(z) if form == "applied" else engine.activation([z]):
            inside = logits(engine, tokens)
            if fail:
                raise ZeroDivisionError
            return inside

    assert not torch.allclose(run(False), before)
    with pytest.raises(ZeroDivisionError):
        run(True)
    assert weights(engine) == digest
    assert [parameter.data_ptr() for parameter in engine.model.parameters()] == storage
    assert torch.equal(logits(engine, tokens), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ones_are_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    for architecture in ARCHITECTURES:
        engine = TransformersEngine(make_model(architecture, dtype=dtype), make_tokenizer(), "tiny")
        ones = {name: torch.ones(rank) for name, rank in engine.ranks().items()}
        tokens, before = encode("the end"), weights(engine)
        base = logits(engine, tokens)
        for context in (
            engine.applied(ones),
            engine.activation([ones]),
            engine.applied(None),
            engine.activation([None]),
        ):
            with context:
                assert torch.equal(logits(engine, tokens), base)
                assert weights(engine) == before
        # One matrix that moves leaves every other as it is.
        name = next(iter(ones))
        storage = {key: parameter.data_ptr() for key, parameter in engine.model.named_parameters()}
        with engine.applied({**ones, name: 2 * ones[name]}):
            now = {key: parameter.data_ptr() for key, parameter in engine.model.named_parameters()}
        assert [key for key in storage if storage[key] != now[key]] == [name]


def test_bfloat16_is_rounded_once(engine: TransformersEngine) -> None:
    architecture = engine.base.id.removeprefix("tiny-")
    half = TransformersEngine(make_model(architecture, dtype=torch.bfloat16), make_tokenizer(), "half")
    z = random_z(half, 4)
    dense = dense_weights(engine, z)
    with half.applied(z):
        for name, exact in dense.items():
            weight = half.targets[name].parameter
            assert weight.dtype == torch.bfloat16
            ulp = torch.finfo(torch.bfloat16).eps * exact.abs().clamp_min(1e-3)
            assert bool(((weight.float() - exact).abs() <= 0.5 * ulp + 1e-4).all()), name


def test_mixtures_nest_as_contexts_do(llama: TransformersEngine) -> None:
    one, two, tokens = random_z(llama, 1), random_z(llama, 2), encode("ab")
    before = weights(llama)
    with llama.applied(one):
        outer = logits(llama, tokens)
        with llama.applied(None):
            assert torch.equal(logits(llama, tokens), outer)
        with llama.applied({name: vector for name, vector in two.items() if ".1." in name}):
            assert not torch.equal(logits(llama, tokens), outer)
        assert torch.equal(logits(llama, tokens), outer)
    assert weights(llama) == before


def force(*answers: str) -> dict[str, Any]:
    """Arguments that make row i answer the i-th text character by character, whatever the model prefers."""
    spelled = [[make_tokenizer().convert_tokens_to_ids(token) for token in answer.split("|")] for answer in answers]

    class Spell(transformers.LogitsProcessor):
        def __init__(self) -> None:
            self.step = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            forced = torch.full_like(scores, -torch.inf)
            for row, tokens in enumerate(spelled):
                forced[row, tokens[self.step % len(tokens)]] = 0
            self.step += 1
            return forced

    return {"logits_processor": transformers.LogitsProcessorList([Spell()])}


def answers_of(llama: TransformersEngine, stop: tuple[str, ...], *forced: str, most: int = 8) -> list[str]:
    # One object for all requests: requests of other arguments would be another batch.
    kwargs = force(*forced)
    # Of one length, so that the batch keeps their order.
    requests = [GenerateRequest(encode(f"p{row}"), most, stop, kwargs) for row in range(len(forced))]
    return [decode(answer.tokens) for answer in llama.generate(requests)]


def test_each_row_ends_at_its_own_stop_text(llama: TransformersEngine) -> None:
    assert answers_of(llama, ("!", "ab"), "x|y|!|z", "x|a|b|q|r|s", "1|2|3") == ["xy!", "xab", "12312312"]
    assert answers_of(llama, (), "x|y|!|z", "1|2|3") == ["xy!zxy!z", "12312312"]
    assert answers_of(llama, ("",), "x|!", "1|2") == ["x!x!x!x!", "12121212"]


def test_a_stop_text_is_seen_however_it_is_spelled(llama: TransformersEngine) -> None:
    assert len(encode("stop")) == 1
    assert answers_of(llama, ("stop",), "x|s|t|o|p|y", "x|stop|y", "s|t|o|x") == ["xstop", "xstop", "stoxstox"]
    assert answers_of(llama, ("top!",), "x|stop|!|y", "t|o|p|!|y") == ["xstop!", "top!"]


def test_each_row_ends_at_its_own_end_of_sequence(llama: TransformersEngine) -> None:
    assert answers_of(llama, (), "x|y|</s>|z", "1|2|3", "</s>|a") == ["xy</s>", "12312312", "</s>"]
    assert answers_of(llama, ("!",), "x|</s>|y|!", "1|!|</s>") == ["x</s>", "1!"]


def test_the_prompt_is_no_part_of_the_answer(llama: TransformersEngine) -> None:
    requests = [GenerateRequest(encode("stop"), 3, ("stop",), force("x"))]
    assert [decode(answer.tokens) for answer in llama.generate(requests)] == ["xxx"]


def test_requests_of_different_limits_are_answered_in_their_order(engine: TransformersEngine) -> None:
    requests = [GenerateRequest(encode(prompt), 1 + i % 3) for i, prompt in enumerate(PROMPTS)]
    answers = engine.generate(requests)
    longest = engine.generate(generates(3))
    assert [answer.tokens for answer in answers] == [
        whole.tokens[: request.max_new_tokens] for whole, request in zip(longest, requests, strict=True)
    ]
    assert engine.generate([]) == []
    assert engine.score([]) == []


def test_sampling_is_seeded_and_leaves_the_global_generator_alone(engine: TransformersEngine) -> None:
    sampled = generates(kwargs={"do_sample": True, "temperature": 1.5})
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    first = engine.generate(sampled, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert engine.generate(sampled, seed=1) == first
    assert engine.generate(sampled, seed=2) != first
    assert engine.generate(generates()) != first
    assert engine.generate(generates(), seed=1) == engine.generate(generates(), seed=2)


def test_scores_are_those_of_one_request_alone(engine: TransformersEngine) -> None:
    """Requests share their context's computation; nothing of that may show."""
    mixtures = [random_z(engine, 1), None]
    rows = [i % 2 for i in range(len(scores()))]
    for request, row, got in zip(scores(), rows, engine.score(scores(), mixtures, rows), strict=True):
        tokens = (*request.context, *request.continuation)
        with engine.applied(mixtures[row]):
            out = logits(engine, tokens)[len(request.context) - 1 : -1]
        wanted = torch.tensor(request.continuation)
        expected = torch.log_softmax(out, -1).gather(1, wanted.unsqueeze(1)).sum()
        assert abs(got.loglikelihood - float(expected)) < TOLERANCE
        assert got.greedy == bool((out.argmax(-1) == wanted).all())


def test_a_greedy_continuation_is_recognised(engine: TransformersEngine) -> None:
    z = random_z(engine, 1)
    (answer,) = engine.generate(generates(5)[:1], [z])
    (scored,) = engine.score([ScoreRequest(encode(PROMPTS[0]), answer.tokens)], [z])
    (other,) = engine.score([ScoreRequest(encode(PROMPTS[0]), answer.tokens)])
    assert scored.greedy
    assert not other.greedy
    assert scored.loglikelihood > other.loglikelihood


def test_log_probabilities_of_tokens_sum_to_the_score(engine: TransformersEngine) -> None:
    z = random_z(engine, 1)
    continuations = tuple(encode(choice) for choice in CHOICES)
    with torch.no_grad(), engine.activation([z]):
        spans = LikelihoodModel(engine.model).run([Branches(encode(prompt), continuations) for prompt in PROMPTS])
    scored = engine.score(scores(), [z])
    assert spans.token_logprobs().shape == (sum(map(len, continuations)) * len(PROMPTS),)
    assert torch.allclose(spans.loglikelihoods(), torch.tensor([s.loglikelihood for s in scored]), atol=TOLERANCE)
    assert spans.greedy() == [s.greedy for s in scored]


def test_no_gradient_is_kept_for_the_weights(engine: TransformersEngine) -> None:
    assert not any(parameter.requires_grad for parameter in engine.model.parameters())
    assert not engine.model.training


def test_a_matrix_that_the_model_lacks_is_told(llama: TransformersEngine) -> None:
    z = {"model.layers.7.mlp.up_proj.weight": torch.zeros(32)}
    for context in (llama.applied(z), llama.activation([z])):
        with pytest.raises(ModelError, match=r"tiny-llama has no adaptable matrix model\.layers\.7"), context:
            pass


def test_rows_must_fit_the_batch(llama: TransformersEngine) -> None:
    mixtures = [random_z(llama, 1), None]
    with (
        llama.activation(mixtures, torch.tensor([0, 1, 0])),
        pytest.raises(ModelError, match="sees 2 rows in a batch of 3; this layer mixes rows"),
    ):
        llama.model(torch.tensor([encode("ab"), encode("ab")]))
    with pytest.raises(ValueError, match="2 mixtures need rows"), llama.activation(mixtures):
        pass


def test_prompts_that_begin_alike_score_as_alone_under_mixtures_of_their_own(engine: TransformersEngine) -> None:
    begin = "abcdefghijklmnopqrstuvwxyz "
    asked = [ScoreRequest(encode(begin + prompt), encode(choice)) for prompt in PROMPTS for choice in CHOICES]
    mixtures = [random_z(engine, 1), None, random_z(engine, 2)]
    rows = [i // len(CHOICES) % 3 for i in range(len(asked))]
    together = engine.score(asked, mixtures, rows)
    items = [Branches(encode(begin + prompt), tuple(map(encode, CHOICES))) for prompt in PROMPTS]
    assert engine.likelihood.reuses(items, len(encode(begin)))
    for request, row, found in zip(asked, rows, together, strict=True):
        alone = engine.score([request], mixtures, [row])[0]
        assert found.loglikelihood == pytest.approx(alone.loglikelihood, abs=1e-3)
        assert found.greedy == alone.greedy
