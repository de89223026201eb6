"""θ and z: the formulas, their gradients, and what stays at 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from t2.training.config import TrainConfig, make_config
from t2.training.parameters import Parameters

RANKS = {"a": 3, "b": 5}
SIGMA = {"a": torch.tensor([3.0, 2.0, 0.5]), "b": torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])}
THETA = torch.linspace(-0.8, 0.9, 8)


def config(**values: Any) -> TrainConfig:
    return make_config(task="t", name="n", **values)


def written(theta: torch.Tensor, given: TrainConfig) -> dict[str, torch.Tensor]:
    """The formulas of docs/training.md, in float64."""
    found, at = {}, 0
    for name, rank in RANKS.items():
        k = min(given.rank or rank, rank)
        part, at = theta[at : at + k].double(), at + k
        z = 1 + part if given.parametrisation == "direct" else given.max_mult / (1 + torch.exp(-given.init_mean - part))
        if given.rescale == "nuclear" or (given.rescale == "auto" and given.parametrisation == "sigmoid"):
            sigma = SIGMA[name][:k].double()
            z = z * sigma.sum() / (sigma * z).sum()
        found[name] = torch.cat([z, torch.ones(rank - k, dtype=torch.float64)])
    return found


FORMS: list[dict[str, Any]] = [
    {},
    {"rank": 2},
    {"rescale": "nuclear"},
    {"parametrisation": "sigmoid"},
    {"parametrisation": "sigmoid", "max_mult": 2.0, "init_mean": 0.0, "rescale": "none"},
    {"parametrisation": "sigmoid", "rank": 2},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_z_and_its_gradient_are_those_of_the_written_formula(form: dict[str, Any]) -> None:
    given = config(**form)
    parameters = Parameters(given, RANKS, SIGMA)
    theta = THETA[: parameters.count]
    z = {name: vector.requires_grad_() for name, vector in parameters.z(theta).items()}
    leaf = theta.double().requires_grad_()
    exact = written(leaf, given)
    weights = {name: torch.arange(1.0, rank + 1) for name, rank in RANKS.items()}
    for name, vector in z.items():
        torch.testing.assert_close(vector.detach().double(), exact[name].detach(), rtol=1e-6, atol=1e-6)
        (vector * weights[name]).sum().backward()
    torch.stack([(exact[name] * weights[name]).sum() for name in RANKS]).sum().backward()
    torch.testing.assert_close(parameters.gradient(theta, z).double(), leaf.grad, rtol=1e-5, atol=1e-5)


def test_a_matrix_without_gradient_counts_as_zero() -> None:
    parameters = Parameters(config(parametrisation="sigmoid"), RANKS, SIGMA)
    z = {name: vector.requires_grad_() for name, vector in parameters.z(THETA).items()}
    z["b"].sum().backward()
    found = parameters.gradient(THETA, z)
    assert bool((found[:3] == 0).all())
    assert bool((found[3:] != 0).any())


def test_training_begins_at_the_base_or_where_the_public_code_does() -> None:
    direct = Parameters(config(), RANKS)
    assert all(bool((vector == 1).all()) for vector in direct.z(direct.initial()).values())
    wide = {"a": 4000}
    sigmoid = Parameters(config(parametrisation="sigmoid", rescale="none"), wide)
    p = torch.logit(sigmoid.z(sigmoid.initial())["a"])
    assert float(p.mean()) == pytest.approx(0.1, abs=1e-3)
    assert float(p.std()) == pytest.approx(0.01, rel=0.05)
    again, other = (Parameters(config(parametrisation="sigmoid", seed=seed), RANKS, SIGMA) for seed in (0, 1))
    first = Parameters(config(parametrisation="sigmoid"), RANKS, SIGMA).initial()
    assert torch.equal(first, again.initial())
    assert not torch.equal(first, other.initial())


def test_rescaled_one_p_is_the_base_and_any_p_keeps_the_nuclear_norm() -> None:
    parameters = Parameters(config(parametrisation="sigmoid"), RANKS, SIGMA)
    for vector in parameters.z(torch.zeros(8)).values():
        torch.testing.assert_close(vector, torch.ones_like(vector))
    for name, vector in parameters.z(THETA).items():
        assert float((SIGMA[name] * vector).sum()) == pytest.approx(float(SIGMA[name].sum()))


def test_a_matrix_of_zeros_is_not_rescaled() -> None:
    parameters = Parameters(config(rescale="nuclear"), {"a": 2}, {"a": torch.zeros(2)})
    assert parameters.z(torch.tensor([0.5, -0.5]))["a"].tolist() == [1.5, 0.5]
