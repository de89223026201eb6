"""Changing the mixture in weight form: what is kept, mixtures of known experts as weighted sums, and the base after."""

from __future__ import annotations

import pytest
import torch

from t2.adapters.engine import weights as weight_form
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z, mix
from tests.adapters.checks import dense_weights, weights
from tests.adapters.conftest import ARCHITECTURES, make_model, make_tokenizer, random_z


def build(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> TransformersEngine:
    return TransformersEngine(make_model(architecture, dtype=dtype), make_tokenizer(), f"tiny-{architecture}")


def inside(engine: TransformersEngine, z: Z) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Copies of the adapted weights, and where they lie."""
    with engine.applied(z):
        parameters = {name: engine.targets[name].parameter.data for name in z}
        return {n: p.clone() for n, p in parameters.items()}, {n: p.data_ptr() for n, p in parameters.items()}


def mixtures(experts: list[Z]) -> list[Z]:
    alphas = [[1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [1.4, -0.6, 0.9], [0.0, 0.5, 0.0], [-0.3, 2.0, 0.1]]
    spaces = ["paper", "delta", "paper", "delta", "paper"]
    return [mix(experts, alpha, space, "none") for alpha, space in zip(alphas, spaces, strict=True)]  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mixture_of_known_experts_is_what_its_z_gives(architecture: str) -> None:
    engine = build(architecture)
    experts = [random_z(engine, seed) for seed in range(3)]
    before, work = weights(engine), mixtures(experts)
    # One α per layer is a mixture of them too, and so is one times a factor.
    work.append({name: work[1][name] if ".0." in name else work[2][name] for name in work[0]})
    work.append({name: 1.7 * vector for name, vector in work[1].items()})
    with engine.switching(experts, work):
        for z in work:
            found, _ = inside(engine, z)
            for name, exact in dense_weights(engine, z).items():
                assert torch.allclose(found[name], exact, atol=1e-5), name
            assert weights(engine) == before
    assert weights(engine) == before


def test_in_bfloat16_the_sum_is_rounded_once() -> None:
    engine = build(dtype=torch.bfloat16)
    experts = [random_z(engine, seed) for seed in range(3)]
    work = mixtures(experts)
    with engine.switching(experts, work):
        found, _ = inside(engine, work[2])
    for name, exact in dense_weights(engine, work[2]).items():
        ulp = torch.finfo(torch.bfloat16).eps * exact.abs().clamp_min(1e-3)
        assert found[name].dtype == torch.bfloat16
        assert bool(((found[name].float() - exact).abs() <= 0.5 * ulp + 1e-4).all()), name


def test_what_was_applied_before_does_not_change_what_a_z_gives() -> None:
    engine, fresh = build(), build()
    experts = [random_z(engine, seed) for seed in range(3)]
    work = mixtures(experts)
    with engine.switching(experts, work):
        for z in work:
            inside(engine, z)
    for _ in range(3):  # computed, kept, found again
        assert all(torch.equal(inside(fresh, work[1])[0][n], w) for n, w in inside(engine, work[1])[0].items())


def test_a_mixture_that_comes_back_is_not_computed_again() -> None:
    engine = build()
    one, two = random_z(engine, 1), random_z(engine, 2)
    first, _ = inside(engine, one)
    _, second = inside(engine, one)
    inside(engine, two)
    again, third = inside(engine, one)
    assert third == second
    assert all(torch.equal(again[name], weight) for name, weight in first.items())
    engine.forms.release()
    assert engine.forms.kept_bytes == 0


def test_weights_that_were_moved_are_not_taken_for_those_that_were_adapted() -> None:
    engine = build()
    z = random_z(engine, 1)
    first, _ = inside(engine, z)
    inside(engine, z)
    for target in engine.targets.values():
        target.parameter.data = target.parameter.data * 2
    doubled, _ = inside(engine, z)
    for name, weight in first.items():
        assert torch.allclose(doubled[name], 2 * weight, atol=1e-5)


def test_what_is_kept_stays_within_its_share_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build()
    zs = [random_z(engine, seed) for seed in range(4)]
    size = sum(target.parameter.nbytes for target in engine.targets.values())
    room = [2.5 * size / weight_form.SHARE]
    monkeypatch.setattr(weight_form, "free_bytes", lambda device: room[0] - engine.forms.kept_bytes)
    for z in [*zs, *zs]:
        inside(engine, z)
    assert engine.forms.kept_bytes == 2 * size
    monkeypatch.setattr(weight_form, "total_bytes", lambda device: 0.5 * size / weight_form.SHARE)
    experts, (first, *_) = zs[:3], mixtures(zs[:3])
    with engine.switching(experts, mixtures(experts)):  # no room for directions: computed as outside
        found, _ = inside(engine, first)
    assert all(torch.allclose(found[n], w, atol=1e-5) for n, w in dense_weights(engine, first).items())


def test_a_z_that_is_no_mixture_of_them_and_a_nested_one_are_computed_from_z() -> None:
    engine = build()
    experts = [random_z(engine, seed) for seed in range(3)]
    work, other = mixtures(experts), random_z(engine, 9)
    with engine.switching(experts, work):
        found, _ = inside(engine, other)
        with engine.applied(work[0]):
            nested, _ = inside(engine, work[1])
        alone, _ = inside(engine, work[1])
    assert all(torch.allclose(found[n], w, atol=1e-5) for n, w in dense_weights(engine, other).items())
    assert any(not torch.allclose(nested[name], alone[name], atol=1e-3) for name in alone)
