"""What must hold for every family of models: which matrices are adapted, and that both forms are the mathematics."""

from __future__ import annotations

import pytest
import torch

from t2.adapters.engine.base import GenerateRequest, ScoreRequest
from t2.adapters.engine.likelihood import Branches, LikelihoodModel
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.targets import find_targets
from t2.core.errors import ModelError
from tests.adapters.checks import TOLERANCE, check_forms_agree, dense_weights, logits, weights
from tests.adapters.conftest import make_model, make_tokenizer, random_z
from tests.adapters.families import FAMILIES, matrices

PROMPTS = ["the cat sat", "a", "1 + 2 =", "stop the ab"]
CHOICES = ["the end", " x", "ab", "stop"]


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request: pytest.FixtureRequest) -> TransformersEngine:
    """An engine over a tiny model of each family."""
    return TransformersEngine(make_model(request.param), make_tokenizer(), request.param, moe="skip")


def encode(text: str) -> tuple[int, ...]:
    return tuple(make_tokenizer().encode(text, add_special_tokens=False))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_matrices_of_a_family(name: str) -> None:
    family, model = FAMILIES[name], make_model(name, layers=3)
    whole = find_targets(model, moe="skip")
    assert {name: target.shape for name, target in whole.items()} == matrices(family, ("attn", "mlp"), (0, 1, 2))
    mlp = find_targets(model, "mlp", [0, 2], moe="skip")
    assert {name: target.shape for name, target in mlp.items()} == matrices(family, ("mlp",), (0, 2))
    assert list(find_targets(model, "attn", [1], moe="skip")) == list(matrices(family, ("attn",), (1,)))
    for name, target in whole.items():
        assert target.rank == min(target.matrix.shape)
        assert target.matrix.shape == target.shape
        assert (target.name, str(target.layer)) == (name, name.removeprefix(family.prefix).split(".")[1])
        # A view: what is read is what the model computes with.
        assert target.matrix.data_ptr() == target.parameter.data_ptr()
        x = torch.randn(5, target.shape[1], generator=torch.Generator().manual_seed(0))
        bias = target.module.bias
        assert isinstance(bias, torch.Tensor)
        assert bool(bias.any())
        assert torch.allclose(target.module(x), x @ target.matrix.T + bias, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.moe])
def test_mixtures_of_experts_are_refused_unless_their_experts_are_skipped(name: str) -> None:
    model = make_model(name)
    with pytest.raises(ModelError, match=r"has mixture-of-experts layers \(model\.layers\.0\.mlp\.experts\), which t2"):
        TransformersEngine(model, make_tokenizer(), name)
    adapted = {id(target.parameter) for target in find_targets(model, moe="skip").values()}
    routers = [module for path, module in model.named_modules() if path.endswith((".gate", "_gate", ".experts"))]
    assert routers
    assert not adapted & {id(parameter) for module in routers for parameter in module.parameters()}


def test_both_forms_are_the_scaled_decomposition(engine: TransformersEngine) -> None:
    z, tokens = random_z(engine, 1), encode("the stop 12")
    dense = torch.func.functional_call(engine.model, dense_weights(engine, z), (torch.tensor([tokens]),))
    before, base = weights(engine), logits(engine, tokens)
    with engine.applied(z):
        by_weight = logits(engine, tokens)
        assert weights(engine) != before
    assert weights(engine) == before
    with engine.activation([z]):
        by_activation = logits(engine, tokens)
    assert torch.allclose(by_weight, dense.logits[0], atol=1e-3)
    assert torch.allclose(by_activation, dense.logits[0], atol=1e-3)
    assert not torch.allclose(base, dense.logits[0], atol=0.1)
    assert torch.equal(logits(engine, tokens), base)


def test_ones_are_the_base_bit_for_bit(engine: TransformersEngine) -> None:
    ones = {name: torch.ones(rank) for name, rank in engine.ranks().items()}
    tokens = encode("the end")
    base = logits(engine, tokens)
    for context in (engine.applied(ones), engine.activation([ones]), engine.applied(None), engine.activation([None])):
        with context:
            assert torch.equal(logits(engine, tokens), base)


def test_a_mixed_batch_answers_as_one_run_per_mixture(engine: TransformersEngine) -> None:
    mixtures, rows = [random_z(engine, 1), None], [0, 1, 1, 0]
    generates = [GenerateRequest(encode(prompt), 10) for prompt in PROMPTS]
    scores = [ScoreRequest(encode(prompt), encode(choice)) for prompt, choice in zip(PROMPTS, CHOICES, strict=True)]
    answers = check_forms_agree(engine, mixtures, rows, generates, scores)
    base = engine.generate(generates)
    assert [answer == own for answer, own in zip(answers, base, strict=True)] == [bool(row) for row in rows]


def test_contexts_are_packed_where_the_model_obeys_the_mask_and_likelihoods_are_those_of_single_rows(
    engine: TransformersEngine,
) -> None:
    model = LikelihoodModel(engine.model)
    branches = [Branches(encode(prompt), tuple(encode(choice) for choice in CHOICES)) for prompt in PROMPTS]
    # The windows are longer than these texts.
    assert (model.layout(branches) == "packed") == FAMILIES[engine.base.id].packs
    with torch.no_grad():
        found = model.run(branches).loglikelihoods()
    expected = []
    for item in branches:
        for continuation in item.continuations:
            out = torch.log_softmax(logits(engine, (*item.context, *continuation)), -1)[len(item.context) - 1 : -1]
            expected.append(out.gather(1, torch.tensor(continuation).unsqueeze(1)).sum())
    assert torch.allclose(found, torch.stack(expected), atol=TOLERANCE)


def test_gradients_of_z_are_those_through_the_dense_weights(engine: TransformersEngine) -> None:
    context, continuations = encode("the cat "), (encode("stop ab"), encode("y12"))
    z = {name: vector.requires_grad_() for name, vector in random_z(engine, 5, 0.2).items()}
    with engine.activation([z]):
        loglikelihoods = LikelihoodModel(engine.model).run([Branches(context, continuations)]).loglikelihoods()
    gradients = torch.autograd.grad(loglikelihoods[0] - 2 * loglikelihoods[1], list(z.values()))

    leaves = {name: vector.detach().clone().requires_grad_() for name, vector in z.items()}
    dense = {}
    for name, vector in leaves.items():
        target, basis = engine.targets[name], engine.bases([name])[name]
        w, q = target.matrix, basis.q
        u, vt = (q, (q.T @ w) / basis.sigma[:, None]) if basis.side == "out" else ((w @ q) / basis.sigma, q.T)
        adapted = (u * (basis.sigma * vector)) @ vt
        dense[name] = adapted.T if target.transposed else adapted

    def loglikelihood(continuation: tuple[int, ...]) -> torch.Tensor:
        tokens = torch.tensor([[*context, *continuation]])
        out = torch.func.functional_call(engine.model, dense, (tokens,)).logits[0, len(context) - 1 : -1]
        return torch.log_softmax(out, -1).gather(1, torch.tensor(continuation).unsqueeze(1)).sum()

    objective = loglikelihood(continuations[0]) - 2 * loglikelihood(continuations[1])
    expected = torch.autograd.grad(objective, list(leaves.values()))
    for name, ours, theirs in zip(z, gradients, expected, strict=True):
        assert float(theirs.abs().max()) > 0, name
        assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max())), name
