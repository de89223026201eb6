"""Experts between two checkpoints: found where there is one, refused with a number where there is none."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch

from t2.adapters.convert.pair import check_settings, extract, fit
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z
from t2.core.errors import ExpertMismatchError, ModelError
from tests.adapters.conftest import make_model, make_tokenizer, random_z


@pytest.fixture(scope="module")
def base() -> TransformersEngine:
    """A model of random float32 weights, as trained ones are: bfloat16 does not hold them."""
    model = make_model("llama", seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * (torch.rand_like(parameter) - 0.5))
    return TransformersEngine(model, make_tokenizer(), "tiny-llama")


State = dict[str, torch.Tensor]


def merged(engine: TransformersEngine, z: Z, dtype: torch.dtype = torch.float32) -> State:
    """The state dict of base + expert as a checkpoint of some dtype holds it."""
    with engine.applied(z):
        return {name: value.to(dtype).clone() for name, value in engine.model.state_dict().items()}


def refused(engine: TransformersEngine, tuned: State) -> str:
    with pytest.raises(ExpertMismatchError) as caught:
        extract(engine, tuned, "tuned")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_merge_gives_its_expert_back(engine: TransformersEngine) -> None:
    z = random_z(engine, seed=1)
    found = extract(engine, merged(engine, z), "tuned")
    assert list(found.z) == list(engine.targets)
    assert found.relative < 1e-5
    for name, vector in z.items():
        sigma = engine.bases([name])[name].sigma
        told = sigma > 1e-3 * sigma.max()
        torch.testing.assert_close(found.z[name][told], vector[told], rtol=0, atol=1e-4)


def test_the_optimum_is_u_w_v_over_sigma(llama: TransformersEngine) -> None:
    """zᵢ = uᵢᵀ·T·vᵢ/σᵢ minimises ‖T − U·diag(σz)·Vᵀ‖, whatever T is."""
    name = next(iter(llama.targets))
    w = llama.targets[name].matrix
    tuned = w + 0.1 * torch.randn(w.shape, generator=torch.Generator().manual_seed(0))
    u, sigma, vt = torch.linalg.svd(w.double(), full_matrices=False)
    wanted = ((u.T @ tuned.double() @ vt.T).diagonal() / sigma).float()
    found = fit(llama, name, tuned)
    torch.testing.assert_close(found.z, wanted, rtol=1e-3, atol=1e-3)
    residual = tuned.double() - u @ torch.diag(sigma * wanted.double()) @ vt
    assert found.residual == pytest.approx(float(residual.norm()), rel=1e-4)
    assert found.change == pytest.approx(float((tuned - w).norm()), rel=1e-6)


def test_a_merge_rounded_to_bfloat16_still_passes(base: TransformersEngine) -> None:
    z = random_z(base, seed=2, scale=0.02)
    found = extract(base, merged(base, z, torch.bfloat16), "tuned")
    assert 0.02 < found.relative < 0.5, "rounding is to be seen, or the test shows nothing"
    assert found.unknown < 0.1 * found.components
    for name, vector in z.items():
        sigma = base.bases([name])[name].sigma
        told = sigma > 0.1 * sigma.max()
        torch.testing.assert_close(found.z[name][told], vector[told], rtol=0, atol=0.02)


def test_matrices_that_did_not_move_are_left_out(base: TransformersEngine) -> None:
    names = list(base.targets)[:3]
    z = {name: vector for name, vector in random_z(base, seed=5).items() if name in names}
    for dtype in (torch.float32, torch.bfloat16):
        assert sorted(extract(base, merged(base, z, dtype), "tuned").z) == sorted(names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_rank_change_is_refused_with_its_share(base: TransformersEngine, dtype: torch.dtype) -> None:
    tuned = merged(base, random_z(base, seed=2, scale=0.1), dtype)
    name = list(base.targets)[4]
    generator = torch.Generator().manual_seed(0)
    m, n = tuned[name].shape
    low = torch.randn(m, 2, generator=generator) @ torch.randn(2, n, generator=generator)
    tuned[name] = (tuned[name].float() + 0.02 * low).to(dtype)
    message = refused(base, tuned)
    assert f"worst {name} with" in message
    assert "1 of 14 matrices" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.002, 0.02, 0.2])
def test_a_dense_fine_tune_is_refused(base: TransformersEngine, dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    tuned = merged(base, {}, torch.float32)
    for name in base.targets:
        noise = torch.randn(tuned[name].shape, generator=generator)
        tuned[name] = (tuned[name] + size * tuned[name].std() * noise).to(dtype)
    message = refused(base, tuned)
    if size == 0.2:
        assert float(re.search(r"values: ([\d.]+)% of", message)[1]) > 90  # type: ignore[index]


def test_the_residual_is_that_of_the_definition(llama: TransformersEngine) -> None:
    """‖W' − U·diag(σz)·Vᵀ‖ / ‖W' − W‖ of an expert and a planted change of known norm, orthogonal to all of them."""
    name = next(iter(llama.targets))
    z = {name: random_z(llama, seed=7)[name]}
    tuned = merged(llama, z)
    w = llama.targets[name].matrix
    u, _, vt = torch.linalg.svd(w, full_matrices=False)
    expert = float((tuned[name] - w).norm())
    tuned[name] = tuned[name] + expert * torch.outer(u[:, 0], vt[1])
    assert fit(llama, name, tuned[name]).relative == pytest.approx(2**-0.5, abs=1e-3)
    assert "70.7%" in refused(llama, tuned)


@pytest.mark.parametrize("what", ["norm", "embed_tokens", "bias"])
def test_a_change_of_anything_else_is_refused(llama: TransformersEngine, what: str) -> None:
    tuned = merged(llama, random_z(llama, seed=1))
    name = next(name for name in tuned if what in name)
    tuned[name] = tuned[name] * 1.01 + 0.01
    assert name in refused(llama, tuned)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps=0.001"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "rope_parameters="),
        ({"hidden_act": "gelu"}, "hidden_act=gelu, not silu"),
    ],
)
def test_a_change_that_only_the_configuration_tells_is_refused(
    llama: TransformersEngine, change: dict[str, Any], says: str
) -> None:
    config = copy.deepcopy(llama.model.config)
    config.rms_norm_eps *= 1 + 1e-8
    config.use_cache = not config.use_cache
    check_settings(llama, config, "tuned")
    config.update(change)
    with pytest.raises(ExpertMismatchError, match=says):
        check_settings(llama, config, "tuned")


def test_a_quantised_tuned_model_is_told(llama: TransformersEngine) -> None:
    tuned = {**merged(llama, {}), "model.layers.0.mlp.up_proj.weight.absmax": torch.zeros(3)}
    with pytest.raises(ModelError, match="tuned is quantised"):
        extract(llama, tuned, "tuned")


@pytest.mark.parametrize("what", ["norm", "up_proj"])
def test_values_that_are_not_finite_are_no_change_of_anything(llama: TransformersEngine, what: str) -> None:
    tuned = merged(llama, random_z(llama, seed=1))
    name = next(name for name in tuned if what in name)
    tuned[name] = torch.full_like(tuned[name], float("nan"))
    assert f"{name} of tuned holds values that are not finite" in refused(llama, tuned)


def test_the_same_weights_hold_no_expert(base: TransformersEngine) -> None:
    assert "no expert between them" in refused(base, merged(base, {}))
    assert "up to rounding" in refused(base, merged(base, {}, torch.bfloat16))


def test_an_expert_that_drowns_in_rounding_is_not_made_up(base: TransformersEngine) -> None:
    tuned = merged(base, random_z(base, seed=2, scale=0.001), torch.bfloat16)
    assert "round" in refused(base, tuned)


def test_other_architectures_and_shapes_are_refused(llama: TransformersEngine) -> None:
    assert "one architecture" in refused(llama, dict(make_model("gpt2").state_dict()))
    tuned = merged(llama, random_z(llama, seed=1))
    tuned["model.embed_tokens.weight"] = tuned["model.embed_tokens.weight"][:-1]
    assert "model.embed_tokens.weight has shape" in refused(llama, tuned)


def test_components_without_a_singular_value_stay_one_and_are_counted() -> None:
    model = make_model("llama", seed=4)
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        weight = dict(model.named_parameters())[name]
        # bfloat16 holds the product of small integers exactly, so the matrix has rank 5 and no more.
        generator = torch.Generator().manual_seed(0)
        low = torch.randint(-3, 4, (48, 5), generator=generator) @ torch.randint(-3, 4, (5, 32), generator=generator)
        weight.copy_(low / 8)
    engine = TransformersEngine(model, make_tokenizer(), "rank-five")
    z = {name: torch.full((32,), 1.5)}
    found = extract(engine, merged(engine, z), "tuned")
    assert found.unknown == 27
    torch.testing.assert_close(found.z[name][:5], torch.full((5,), 1.5), rtol=0, atol=1e-4)
    assert torch.equal(found.z[name][5:], torch.ones(27))
