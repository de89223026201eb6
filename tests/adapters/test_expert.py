"""Experts on disk, and the check that one belongs to a model."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Expert, check_expert, load_expert, save_expert
from t2.core.errors import ExpertFileError, ExpertMismatchError
from t2.core.manifest import BaseModelRef
from tests.adapters.conftest import expert_of, random_z


def test_an_expert_comes_back_as_it_was(engine: TransformersEngine, tmp_path: Path) -> None:
    z = random_z(engine, 0)
    expert = expert_of(engine, "one", z, "math")
    digest = save_expert(tmp_path / "one.safetensors", expert.manifest, z)
    loaded = load_expert(tmp_path / "one.safetensors")
    assert digest == loaded.digest == hashlib.sha256((tmp_path / "one.safetensors").read_bytes()).hexdigest()
    assert (loaded.name, loaded.domain, loaded.manifest) == ("one", "math", expert.manifest)
    assert loaded.z.keys() == z.keys()
    assert all(torch.equal(loaded.z[name], z[name]) for name in z)
    check_expert(loaded, engine.base, engine.ranks())


def test_the_digest_is_that_of_the_content(llama: TransformersEngine, tmp_path: Path) -> None:
    def save(name: str, seed: int, folder: str) -> str:
        z = random_z(llama, seed)
        return save_expert(tmp_path / folder / "x.safetensors", expert_of(llama, name, z).manifest, z)

    assert save("a", 0, "1") == save("a", 0, "2")
    assert len({save("a", 0, "1"), save("a", 1, "1"), save("b", 0, "1")}) == 3


def test_z_of_another_precision_that_requires_gradients_is_saved(llama: TransformersEngine, tmp_path: Path) -> None:
    z = random_z(llama, 0)
    manifest = expert_of(llama, "x", z).manifest
    digest = save_expert(tmp_path / "a", manifest, z)
    assert digest == save_expert(tmp_path / "b", manifest, {n: v.double().requires_grad_() for n, v in z.items()})


def test_values_that_are_not_finite_are_not_saved(llama: TransformersEngine, tmp_path: Path) -> None:
    z = random_z(llama, 0)
    name = next(iter(z))
    z[name][2] = torch.nan
    with pytest.raises(ExpertFileError, match=rf"{name}\[2\] is nan, values must be finite"):
        save_expert(tmp_path / "x.safetensors", expert_of(llama, "x", z).manifest, z)
    assert list(tmp_path.iterdir()) == []


def altered(expert: Expert, **fields: Any) -> Expert:
    return dataclasses.replace(expert, manifest=expert.manifest.model_copy(update=fields))


def test_an_expert_of_another_model_is_refused_with_the_reason(llama: TransformersEngine) -> None:
    expert = expert_of(llama, "mine", random_z(llama, 0))
    name = "model.layers.0.mlp.up_proj.weight"
    other = BaseModelRef(id="other-model", fingerprint="f" * 64)
    cases = {
        f"expert mine was trained on other weights (other-model, fingerprint {'f' * 12}) than "
        f"tiny-llama ({llama.base.fingerprint[:12]}) has; names and ranks agree, so transfer=strict applies it "
        "all the same": altered(expert, base=other),
        f"expert mine has rank 99 for {name}, tiny-llama has 32; it was trained on other-model: "
        "choose an expert of tiny-llama or that model, or use transfer=resample": altered(
            expert, base=other, targets={**expert.manifest.targets, name: 99}
        ),
        "expert mine scales transformer.h.0.mlp.c_fc.weight, which tiny-llama does not have; it was trained on "
        "other-model: choose an expert of tiny-llama or that model, or use transfer=resample": altered(
            expert, base=other, targets={"transformer.h.0.mlp.c_fc.weight": 32}
        ),
    }
    for message, wrong in cases.items():
        with pytest.raises(ExpertMismatchError) as caught:
            check_expert(wrong, llama.base, llama.ranks())
        assert str(caught.value) == message


def test_the_name_by_which_a_model_was_loaded_does_not_matter(llama: TransformersEngine) -> None:
    expert = expert_of(llama, "mine", random_z(llama, 0))
    check_expert(altered(expert, base=llama.base.model_copy(update={"id": "/a/folder"})), llama.base, llama.ranks())


def test_an_expert_of_some_matrices_is_one_of_the_model(llama: TransformersEngine) -> None:
    z = {name: vector for name, vector in random_z(llama, 0).items() if "mlp" in name}
    check_expert(expert_of(llama, "part", z), llama.base, llama.ranks())
