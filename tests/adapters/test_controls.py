"""Control experts keep the numbers of an expert and take away their places."""

from __future__ import annotations

import torch

from t2.adapters.controls import CONTROLS, control_expert
from t2.adapters.expert import Expert
from t2.core.manifest import BaseModelRef, Manifest

BASE = BaseModelRef(id="tiny", fingerprint="0" * 64)


def expert(name: str = "one", digest: str = "d1") -> Expert:
    """Two matrices with the same numbers, so that only their permutations can differ."""
    numbers = torch.linspace(-1, 4, 64)
    z = {"up": numbers.clone(), "down": numbers.clone(), "short": torch.tensor([2.0])}
    return Expert(Manifest(name=name, base=BASE, targets={k: len(v) for k, v in z.items()}), z, digest)


def test_without_a_control_an_expert_is_itself() -> None:
    one = expert()
    assert CONTROLS == ("none", "shuffle", "random")
    assert control_expert(one, "none", 3) is one


def test_a_shuffle_keeps_the_numbers_of_each_matrix() -> None:
    source = expert()
    shuffled = control_expert(source, "shuffle", 0)
    for name, vector in source.z.items():
        assert torch.equal(shuffled.z[name].sort().values, vector.sort().values)
    assert not torch.equal(shuffled.z["up"], source.z["up"])
    assert (shuffled.manifest, shuffled.digest) == (source.manifest, source.digest)
    assert torch.equal(source.z["up"], expert().z["up"])


def test_every_matrix_expert_and_seed_has_its_own_permutation() -> None:
    first = control_expert(expert(), "shuffle", 0)
    vectors = [
        first.z["up"],
        first.z["down"],
        control_expert(expert(digest="d2"), "shuffle", 0).z["up"],
        control_expert(expert(), "shuffle", 1).z["up"],
    ]
    assert len({tuple(vector.tolist()) for vector in vectors}) == len(vectors)


def test_a_control_is_repeatable_and_does_not_depend_on_the_name() -> None:
    for control in ("shuffle", "random"):
        one, other = (control_expert(expert(name), control, 5) for name in ("a", "b"))
        assert all(torch.equal(one.z[name], other.z[name]) for name in one.z)


def test_random_numbers_have_the_moments_of_the_expert() -> None:
    z = {"up": 3 + 0.1 * torch.randn(40_000, generator=torch.Generator().manual_seed(0)), "flat": torch.full((9,), 1.5)}
    source = Expert(Manifest(name="x", base=BASE, targets={"up": 40_000, "flat": 9}), z, "d")
    drawn = control_expert(source, "random", 0)
    assert abs(float(drawn.z["up"].mean()) - 3) < 0.003
    assert abs(float(drawn.z["up"].std()) - 0.1) < 0.003
    assert torch.equal(drawn.z["flat"], z["flat"])
    assert not torch.equal(drawn.z["up"], control_expert(source, "random", 1).z["up"])
    assert abs(float(torch.corrcoef(torch.stack([drawn.z["up"], z["up"]]))[0, 1])) < 0.03
