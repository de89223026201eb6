"""Experts taken to models of another depth and width: what must hold of the numbers, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Expert, Z
from t2.adapters.transfer import resample, resample_vector, resample_z, role_of
from t2.core.errors import ExpertMismatchError
from t2.core.manifest import BaseModelRef, Manifest
from tests.adapters.conftest import expert_of, random_z

RANKS = st.integers(1, 40)
SEEDS = st.integers(0, 2**32 - 1)


def drawn(rank: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 3, rank)).float()


def ranks_of(layers: int, rank: int, *roles: str) -> dict[str, int]:
    return {f"model.layers.{layer}.{role}": rank for layer in range(layers) for role in roles}


def z_of(layers: int, rank: int, seed: int, *roles: str) -> Z:
    return {name: drawn(rank, seed + i) for i, name in enumerate(ranks_of(layers, rank, *roles))}


@settings(max_examples=60, deadline=None)
@given(RANKS, RANKS, SEEDS)
def test_a_vector_keeps_its_ends_its_range_and_its_order(rank: int, wanted: int, seed: int) -> None:
    z = drawn(rank, seed)
    taken = resample_vector(z, wanted)
    assert taken.shape == (wanted,)
    assert taken.dtype == torch.float32
    assert z.min() <= taken.min()
    assert taken.max() <= z.max()
    if min(rank, wanted) > 1:
        assert (taken[0], taken[-1]) == (z[0], z[-1])
    falling = resample_vector(z.sort(descending=True).values, wanted)
    assert bool((falling[1:] <= falling[:-1]).all())
    assert torch.equal(resample_vector(torch.full((rank,), 0.7), wanted), torch.full((wanted,), 0.7))


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 40), st.integers(0, 60), SEEDS)
def test_a_wider_model_and_back_is_within_what_interpolation_costs(rank: int, more: int, seed: int) -> None:
    z = drawn(rank, seed)
    back = resample_vector(resample_vector(z, rank + more), rank)
    bound = (z[:-2] - 2 * z[1:-1] + z[2:]).abs() / 4 * (rank - 1) / (rank + more - 1)
    assert bool(((back - z)[1:-1].abs() <= bound + 1e-6).all())
    exact = resample_vector(resample_vector(z, 2 * rank - 1), rank)
    assert torch.allclose(exact, z, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), RANKS, RANKS, SEEDS)
def test_z_is_one_where_it_was_one_and_itself_where_shapes_agree(
    layers: int, wanted: int, rank: int, other: int, seed: int
) -> None:
    z = z_of(layers, rank, seed, "mlp.up.weight", "attn.q.weight")
    same = resample_z(z, ranks_of(layers, rank, "mlp.up.weight", "attn.q.weight"))
    assert same.keys() == z.keys()
    assert all(torch.equal(same[name], z[name]) for name in z)
    ranks = ranks_of(wanted, other, "mlp.up.weight")
    ones = resample_z({name: torch.ones(rank) for name in z}, ranks)
    assert ones.keys() == ranks.keys()
    assert all(torch.equal(vector, torch.ones(other)) for vector in ones.values())


def test_layers_lie_between_their_neighbours() -> None:
    z = {f"model.layers.{layer}.mlp.up.weight": torch.full((4,), float(layer)) for layer in range(5)}
    deeper = resample_z(z, ranks_of(9, 7, "mlp.up.weight"))
    assert [vector[3].item() for vector in deeper.values()] == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]
    assert [v[0].item() for v in resample_z(z, ranks_of(3, 4, "mlp.up.weight")).values()] == [0, 2, 4]
    assert [v[0].item() for v in resample_z(z, ranks_of(1, 4, "mlp.up.weight")).values()] == [2]
    # A layer without the matrix has z = 1 there.
    del z["model.layers.2.mlp.up.weight"]
    assert [v[0].item() for v in resample_z(z, ranks_of(9, 4, "mlp.up.weight")).values()] == [
        *(0, 0.5, 1, 1),
        *(2, 3, 3.5, 4),
    ]


def test_roles_are_what_follows_the_layer() -> None:
    assert role_of("model.layers.11.mlp.experts.0.up_proj.weight") == (11, "mlp.experts.0.up_proj.weight")
    assert role_of("transformer.h.0.attn.c_attn.weight") == role_of("gpt.blocks.0.attn.c_attn.weight")


def test_roles_of_one_model_only_are_left_out_and_told(llama: TransformersEngine) -> None:
    own = BaseModelRef(id="other", fingerprint="a" * 64)
    z = {
        f"model.layers.{layer}.{role}": drawn(9, layer) for layer in range(3) for role in ("mlp.up_proj.weight", "x.w")
    }
    expert = Expert(Manifest(name="e", base=own, targets=dict.fromkeys(z, 9)), z, "d" * 64)
    taken = resample(expert, llama.base, llama.ranks())
    assert {role_of(name)[1] for name in taken.z} == {"mlp.up_proj.weight"}
    assert all(len(vector) == llama.ranks()[name] for name, vector in taken.z.items())
    assert taken.transferred is not None
    assert (taken.transferred.base, taken.transferred.left_out) == (own, ("x.w",))
    assert taken.transferred.matrices == len(taken.z) == 2
    assert taken.digest == expert.digest


def test_an_expert_of_this_base_stays_as_it_is(llama: TransformersEngine) -> None:
    expert = expert_of(llama, "own", random_z(llama, 0))
    assert resample(expert, llama.base, llama.ranks()) is expert


@pytest.mark.parametrize(
    ("z", "training", "line"),
    [
        ({"h.0.c_fc.weight": torch.ones(4)}, {}, "scales c_fc.weight of other, of which tiny-llama has none"),
        (
            {"h.0.mlp.up_proj.weight": torch.ones(4)},
            {"layers": "0-3"},
            "moves some layers only of other, and its file does not say how many that has",
        ),
        ({"h.0.mlp.up_proj.weight": torch.ones(4)}, {"settings": {"layers": [0, 1]}}, "moves some layers only"),
    ],
)
def test_what_cannot_be_placed_is_refused(
    z: Z, training: dict[str, object], line: str, llama: TransformersEngine
) -> None:
    manifest = Manifest(
        name="e",
        base=BaseModelRef(id="other", fingerprint="a" * 64),
        targets={name: len(vector) for name, vector in z.items()},
        training=training,
    )
    expert = Expert(manifest, z, "d" * 64)
    with pytest.raises(ExpertMismatchError, match=line):
        resample(expert, llama.base, llama.ranks())
    own = dataclasses.replace(expert, manifest=manifest.model_copy(update={"base": llama.base}))
    assert resample(own, llama.base, llama.ranks()) is own
