"""Checkpoints of the public code: what they are as experts, and what is refused."""

from __future__ import annotations

import contextlib
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from t2.adapters.convert.public import import_public, public_targets, read_public
from t2.adapters.engine.transformers import TransformersEngine
from t2.core.errors import ArgumentError, ExpertFileError, ExpertMismatchError
from t2.core.expertfile import read_expert
from tests.adapters.conftest import make_model


def raw(engine: TransformersEngine, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Raw p of every matrix with "mlp" in its name, spread wide enough that z differs."""
    generator = torch.Generator().manual_seed(seed)
    names = [name for name in engine.model.state_dict() if "mlp" in name and name.endswith("weight")]
    return {name: (0.1 + torch.randn(engine.ranks()[name], generator=generator)).to(dtype) for name in names}


def policy(params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict that the public code's policy saves."""
    return {f"learnable_params_module_list.{i}": p for i, p in enumerate(params.values())}


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def public_weight(w: torch.Tensor, p: torch.Tensor, max_mult: float) -> torch.Tensor:
    """W′ by the public code's formula, dense: U·diag(σ⊙z)·Vᵀ · Σσ / Σ(σ⊙z), z = sigmoid(p)·max_mult in bfloat16."""
    u, sigma, vt = torch.linalg.svd(w.double(), full_matrices=False)
    z = (torch.sigmoid(p).to(torch.bfloat16) * max_mult).double()
    return u @ torch.diag(sigma * z) @ vt * (sigma.sum() / (sigma * z).sum())


@pytest.mark.parametrize("max_mult", [1.0, 1.7])
@pytest.mark.parametrize("form", ["policy_params", "learnable_params"])
def test_an_imported_expert_gives_the_public_codes_weights(
    engine: TransformersEngine, form: str, max_mult: float, tmp_path: Path
) -> None:
    params = raw(engine)
    content = policy(params) if form == "policy_params" else {k: torch.nn.Parameter(p) for k, p in params.items()}
    checkpoint = read_public(save(tmp_path / f"{form}.pt", content))
    assert checkpoint.form == form
    z = import_public(checkpoint, engine, max_mult)
    assert list(z) == list(params)
    assert all("mlp" in name for name in z)
    with engine.applied(z):
        for name, p in params.items():
            adapted = engine.targets[name].matrix.double()
            wanted = public_weight(base_matrix(engine, name), p, max_mult)
            assert float((adapted - wanted).norm() / wanted.norm()) < 1e-6


def base_matrix(engine: TransformersEngine, name: str) -> torch.Tensor:
    """W as it was loaded, also while a mixture is applied."""
    fresh = make_model(str(engine.base.id).removeprefix("tiny-")).state_dict()[name]
    return fresh.T if engine.targets[name].transposed else fresh


def test_numbered_vectors_are_rounded_to_bfloat16_as_the_public_code_takes_them_up(
    llama: TransformersEngine, tmp_path: Path
) -> None:
    exact = raw(llama, dtype=torch.float32)
    rounded = {name: p.to(torch.bfloat16) for name, p in exact.items()}
    of_exact = import_public(read_public(save(tmp_path / "a.pt", policy(exact))), llama)
    of_rounded = import_public(read_public(save(tmp_path / "b.pt", policy(rounded))), llama)
    assert all(torch.equal(of_exact[name], of_rounded[name]) for name in exact)
    named = import_public(read_public(save(tmp_path / "c.pt", exact)), llama)
    assert any(not torch.equal(named[name], of_rounded[name]) for name in exact)


def test_max_mult_bears_on_rounding_alone(llama: TransformersEngine, tmp_path: Path) -> None:
    checkpoint = read_public(save(tmp_path / "p.pt", policy(raw(llama))))
    one, two, three = (import_public(checkpoint, llama, mult) for mult in (1.0, 2.0, 3.0))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=0)
        torch.testing.assert_close(one[name], three[name], rtol=1e-2, atol=0)


class Evil:
    """Runs a program when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_a_pickle_that_would_run_something_is_refused_unrun(write: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    mark, file = tmp_path / "ran", tmp_path / "learnable_params.pt"
    write({"model.layers.0.mlp.up_proj.weight": Evil(mark)}, file)
    with pytest.raises(ExpertFileError) as caught:
        read_public(file)
    assert not mark.exists()
    assert "\n" not in str(caught.value)
    assert "posix.system" in str(caught.value)
    with contextlib.suppress(RuntimeError):
        torch.load(file, weights_only=False)
    assert mark.exists(), "the pickle is harmless, so the test shows nothing"


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.pt"
    text.write_text("not a pickle")
    empty = tmp_path / "empty.pt"
    empty.write_bytes(b"")
    cut = save(tmp_path / "cut.pt", {"a": torch.zeros(1000)})
    cut.write_bytes(cut.read_bytes()[:-500])
    legacy = tmp_path / "legacy.pt"
    with tarfile.open(legacy, "w") as archive:
        archive.add(text)
    for path in (text, empty, cut, legacy, tmp_path / "missing.pt"):
        with pytest.raises(ExpertFileError, match=str(path)) as caught:
            read_public(path)
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ([torch.zeros(3)], "list"),
        ({}, "dict"),
        ({"a": torch.zeros(2, 2)}, r"a has shape \(2, 2\)"),
        ({"a": torch.zeros(2, dtype=torch.long)}, "int64"),
        ({"a": torch.tensor([1.0, float("nan")])}, "finite"),
        ({"a": torch.zeros(3).to_sparse()}, "no ordinary vector"),
        ({"a": torch.zeros(3, device="meta")}, "no ordinary vector"),
        ({"a": 1.0}, "'a' is not a named tensor"),
        ({"learnable_params_module_list.1": torch.zeros(3)}, "none is number 0"),
        ({"learnable_params_module_list.0": torch.zeros(3), "other": torch.zeros(3)}, "other beside numbered"),
        ({"adaptive_weights": torch.zeros(3), "weights_0_k_a": torch.zeros(3)}, "few-shot"),
    ],
)
def test_content_of_another_form_is_named(content: Any, names: str, tmp_path: Path) -> None:
    with pytest.raises(ExpertFileError, match=names):
        read_public(save(tmp_path / "p.pt", content))


def test_a_mismatch_with_the_base_says_what_differs(llama: TransformersEngine, tmp_path: Path) -> None:
    params = raw(llama)
    names = public_targets(llama)

    def refused(content: dict[str, torch.Tensor]) -> str:
        with pytest.raises(ExpertMismatchError) as caught:
            import_public(read_public(save(tmp_path / "p.pt", content)), llama)
        return str(caught.value)

    fewer = policy(params)
    fewer.popitem()
    assert f"has {len(names) - 1} vectors, tiny-llama has {len(names)} MLP matrices" in refused(fewer)
    short = policy({**params, names[2]: params[names[2]][:-1]})
    assert f"vector 2 has 31 values, {names[2]} of tiny-llama has rank 32" in refused(short)
    renamed = {name.replace("layers.1", "layers.7"): p for name, p in params.items()}
    assert "model.layers.7.mlp" in refused(renamed)
    assert "did you mean" in refused(renamed)
    partial = {name: params[name] for name in names[:-1]}
    assert f"none for {names[-1]}" in refused(partial)


@pytest.mark.parametrize("max_mult", [0.0, -1.0, float("nan")])
def test_max_mult_must_be_above_zero(llama: TransformersEngine, max_mult: float, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="max_mult"):
        import_public(read_public(save(tmp_path / "p.pt", policy(raw(llama)))), llama, max_mult)


def test_its_file_says_where_it_came_from(llama: TransformersEngine, tmp_path: Path) -> None:
    from t2.core.digests import sha256_file

    file = save(tmp_path / "policy_params.pt", policy(raw(llama)))
    checkpoint = read_public(file)
    assert checkpoint.digest == sha256_file(file)
    with pytest.raises(ExpertFileError):
        read_expert(file)
