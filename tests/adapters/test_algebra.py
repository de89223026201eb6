"""The mathematics: one-sided form, mixing, leading components, the nuclear norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from t2.adapters.basis import Basis, build_basis
from t2.adapters.expert import Z, keep_leading, mix, rescale_nuclear
from t2.core.errors import ArgumentError

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))
SEEDS = st.integers(0, 2**31)
ALPHA = st.floats(-2, 2, allow_nan=False)


def representable(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """A random matrix of values that bfloat16 has, in float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def vector(length: int, seed: int) -> torch.Tensor:
    return 1 + 0.5 * torch.randn(length, generator=torch.Generator().manual_seed(seed))


def dense(w: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """U·diag(σ⊙z)·Vᵀ by a full decomposition in float64."""
    u, sigma, vt = torch.linalg.svd(w.double(), full_matrices=False)
    return (u * (sigma * z.double())) @ vt


def one_sided(w: torch.Tensor, basis: Basis, z: torch.Tensor) -> torch.Tensor:
    """W + Q·diag(z−1)·QᵀW, or its input-side twin, in float64."""
    q, shift = basis.q.double(), z.double() - 1
    w = w.double()
    return w + (q * shift) @ (q.T @ w) if basis.side == "out" else w + ((w @ q) * shift) @ q.T


def separated(w: torch.Tensor) -> bool:
    """Singular values apart enough that U and V are determined, and away from zero, which the Gram matrix squares."""
    sigma = torch.linalg.svdvals(w.double())
    gaps = sigma[:-1] - sigma[1:]
    return bool(sigma[-1] > 1e-2 * sigma[0]) and bool((gaps > 1e-2 * sigma[0]).all())


@given(SHAPES, SEEDS)
def test_the_basis_is_that_of_the_singular_value_decomposition(shape: tuple[int, int], seed: int) -> None:
    w = representable(shape, seed)
    basis = build_basis(w)
    assert basis.side == ("out" if shape[0] <= shape[1] else "in")
    assert basis.rank == min(shape)
    assert torch.allclose(basis.q.T @ basis.q, torch.eye(basis.rank), atol=1e-5)
    # The Gram matrix squares σ: in float64 half of the digits remain for the smallest.
    assert torch.allclose(basis.sigma, torch.linalg.svdvals(w.double()).float(), atol=1e-5)
    assert bool((basis.sigma[:-1] >= basis.sigma[1:]).all())


@given(SHAPES, SEEDS)
def test_the_one_sided_form_is_the_scaled_decomposition(shape: tuple[int, int], seed: int) -> None:
    w = representable(shape, seed)
    assume(separated(w))
    z = vector(min(shape), seed + 1)
    assert torch.allclose(one_sided(w, build_basis(w), z), dense(w, z), atol=1e-4)


@given(SHAPES, SEEDS)
def test_the_base_is_exact_at_one(shape: tuple[int, int], seed: int) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(min(shape))
    assert torch.equal(one_sided(w, build_basis(w), ones).float(), w)


@given(SHAPES, SEEDS)
def test_the_basis_does_not_depend_on_the_precision_of_a_copy(shape: tuple[int, int], seed: int) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    full, half = build_basis(w), build_basis(w.bfloat16())
    assert torch.equal(full.q, half.q)
    assert torch.equal(full.sigma, half.sigma)


@given(SHAPES, SEEDS, st.lists(ALPHA, min_size=1, max_size=4))
def test_adapted_weights_are_linear_in_the_mixture(shape: tuple[int, int], seed: int, alpha: list[float]) -> None:
    w = representable(shape, seed)
    basis = build_basis(w)
    experts = [{"a": vector(min(shape), seed + k)} for k in range(len(alpha))]
    zero = one_sided(w, basis, torch.zeros(min(shape)))
    for space, expected in (
        ("paper", zero + sum((a * (one_sided(w, basis, z["a"]) - zero) for a, z in pairs(alpha, experts)), w * 0)),
        ("delta", w + sum((a * (one_sided(w, basis, z["a"]) - w) for a, z in pairs(alpha, experts)), w * 0)),
    ):
        mixed = mix(experts, alpha, space)  # type: ignore[arg-type]
        assert torch.allclose(one_sided(w, basis, mixed["a"]), expected, atol=1e-4)


def pairs(alpha: list[float], experts: list[Z]) -> list[tuple[float, Z]]:
    return list(zip(alpha, experts, strict=True))


def test_the_two_spaces_differ_by_their_origin() -> None:
    experts = [{"a": torch.tensor([2.0, 0.5])}, {"a": torch.tensor([1.0, 3.0])}]
    assert mix(experts, [0.5, 0.25])["a"].tolist() == [1.25, 1.0]
    assert mix(experts, [0.5, 0.25], "delta")["a"].tolist() == [1.5, 1.25]
    assert mix(experts, [0.0, 0.0])["a"].tolist() == [0.0, 0.0]
    assert mix(experts, [0.0, 0.0], "delta")["a"].tolist() == [1.0, 1.0]


@given(st.lists(st.floats(0.1, 2), min_size=1, max_size=4), SEEDS)
def test_the_spaces_agree_where_coefficients_sum_to_one(alpha: list[float], seed: int) -> None:
    experts = [{"a": vector(5, seed + k)} for k in range(len(alpha))]
    paper = mix(experts, alpha, "paper", "sum")["a"]
    assert torch.allclose(paper, mix(experts, alpha, "delta", "sum")["a"], atol=1e-5)
    assert torch.allclose(paper, mix(experts, [a / sum(alpha) for a in alpha])["a"], atol=1e-5)


@pytest.mark.parametrize("space", ["paper", "delta"])
def test_one_expert_alone_is_itself(space: Any) -> None:
    z = {"a": vector(4, 0), "b": vector(3, 1)}
    mixed = mix([{"a": vector(4, 2)}, z], [0, 1], space)
    assert torch.equal(mixed["a"], z["a"])
    assert torch.equal(mixed["b"], z["b"])


def test_a_matrix_that_an_expert_lacks_counts_as_the_base() -> None:
    experts = [{"a": torch.tensor([3.0])}, {"b": torch.tensor([5.0])}]
    assert mix(experts, [0.5, 0.5]) == {"a": torch.tensor([2.0]), "b": torch.tensor([3.0])}
    assert mix(experts, [0.5, 0.5], "delta") == {"a": torch.tensor([2.0]), "b": torch.tensor([3.0])}


def test_coefficients_must_fit() -> None:
    z = {"a": torch.ones(2)}
    with pytest.raises(ArgumentError, match="alpha has 1 coefficients for 2 experts"):
        mix([z, z], [1.0])
    with pytest.raises(ArgumentError, match="alpha sums to zero, which normalise=sum cannot divide by"):
        mix([z, z], [1.0, -1.0], normalise="sum")


@given(SHAPES, SEEDS)
def test_rescaling_keeps_the_nuclear_norm(shape: tuple[int, int], seed: int) -> None:
    w = representable(shape, seed)
    assume(separated(w))
    basis = build_basis(w)
    z = {"a": vector(min(shape), seed + 1).abs() + 0.1}
    scaled = rescale_nuclear(z, {"a": basis})["a"]
    adapted = one_sided(w, basis, scaled)
    assert torch.linalg.svdvals(adapted).sum() == pytest.approx(float(basis.sigma.sum()), rel=1e-4)
    ratio = scaled / z["a"]
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio))


def test_rescaling_needs_a_norm_and_leaves_a_zero_matrix_alone() -> None:
    basis = build_basis(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    for z in (torch.zeros(2), torch.tensor([1.0, -2.0])):
        with pytest.raises(ArgumentError, match="takes w to norm zero, which rescale=nuclear cannot divide by"):
            rescale_nuclear({"w": z}, {"w": basis})
    assert rescale_nuclear({"w": torch.ones(2)}, {"w": build_basis(torch.zeros(2, 2))})["w"].tolist() == [1, 1]


@given(st.integers(0, 8))
def test_a_rank_keeps_the_tail_at_one(rank: int) -> None:
    z = {"a": vector(5, 0), "b": vector(8, 1)}
    kept = keep_leading(z, rank)
    for name, original in z.items():
        assert torch.equal(kept[name][:rank], original[:rank])
        assert torch.equal(kept[name][rank:], torch.ones(max(0, len(original) - rank)))
