"""Bases of a checkpoint, built matrix by matrix: the engine's own, in bounded memory, and resumed."""

from __future__ import annotations

import math
import multiprocessing
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import threadpoolctl
import torch
import transformers

from t2.adapters import basis as basis_module
from t2.adapters.basis import basis_bytes, build_basis, build_bytes, eigh
from t2.adapters.build_plan import Rates, make_plan, share_cores
from t2.adapters.building import build_bases, missing_bases
from t2.adapters.checkpoint import Checkpoint, open_checkpoint, outline
from t2.adapters.digest_memo import DigestMemo
from t2.adapters.engine.transformers import TransformersEngine
from t2.core.errors import ArgumentError, ModelError, StorageError
from tests.adapters.conftest import make_model, make_tokenizer


def saved(folder: Path, family: str = "gpt2") -> Checkpoint:
    make_model(family).save_pretrained(folder, max_shard_size="30KB")
    return open_checkpoint(str(folder))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*/*")}


@pytest.mark.parametrize("lapack", ["torch", "numpy"])
@pytest.mark.parametrize("shape", [(96, 96), (96, 160), (160, 96), (1, 7)])
def test_a_basis_is_orthonormal_and_decomposes_its_matrix(
    shape: tuple[int, int], lapack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(basis_module, "_lapack", lambda rank: lapack)
    monkeypatch.setattr(basis_module, "_ROWS", 40)
    monkeypatch.setattr(basis_module, "_COLUMNS", 50)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16().double()
    found = build_basis(w)
    q, sigma = found.q.double(), found.sigma.double()
    assert float((q.T @ q - torch.eye(found.rank, dtype=torch.float64)).abs().max()) < 1e-6
    u, expected, vt = torch.linalg.svd(w, full_matrices=False)
    assert torch.allclose(sigma, expected, rtol=1e-6, atol=1e-6)
    assert (found.side == "in") == (shape[0] > shape[1])
    # The components themselves, to what float32 holds of them; their signs are arbitrary and mean nothing.
    other = vt.T if found.side == "in" else u
    assert torch.allclose((q * other).sum(0).abs(), torch.ones(found.rank, dtype=torch.float64), atol=1e-6)


def test_both_libraries_find_the_same_vectors() -> None:
    threads = [library["num_threads"] for library in threadpoolctl.threadpool_info()]
    w = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (one, first), (two, second) = eigh(w @ w.T, "torch"), eigh(w @ w.T, "numpy")
    assert torch.allclose(one, two, rtol=1e-10)
    assert torch.allclose((first * second).sum(0).abs(), torch.ones(64, dtype=torch.float64), atol=1e-9)
    assert [library["num_threads"] for library in threadpoolctl.threadpool_info()] == threads


def test_what_was_built_from_the_checkpoint_is_what_the_engine_wants(tmp_path: Path, bases_folder: Path) -> None:
    checkpoint = saved(tmp_path / "model")
    half = [name for name, target in checkpoint.targets.items() if target.layer == 0]
    first = build_bases(checkpoint, half, workers=0, progress=False)
    assert (first.built, first.present, first.bytes) == (4, 0, sum(basis_bytes(32) for _ in range(4)))
    second = build_bases(checkpoint, list(checkpoint.targets), workers=0, progress=False)
    assert (second.built, second.present) == (4, 4)
    before = files(bases_folder)
    assert len(before) == 8
    engine = TransformersEngine(make_model("gpt2"), make_tokenizer(), "gpt2")
    bases = engine.bases(engine.ranks(), progress=False)
    assert files(bases_folder) == before
    shutil.rmtree(bases_folder)
    for name, built in TransformersEngine(engine.model, make_tokenizer(), "gpt2").bases(bases, False).items():
        assert torch.equal(built.q, bases[name].q), name
        assert torch.equal(built.sigma, bases[name].sigma), name
    assert files(bases_folder) == before


def test_nothing_is_read_again_until_a_file_changes(tmp_path: Path, bases_folder: Path) -> None:
    checkpoint = saved(tmp_path / "model")
    names = list(checkpoint.targets)
    build_bases(checkpoint, names, workers=0, progress=False)
    again = open_checkpoint(checkpoint.pretrained)
    assert missing_bases(again, names, DigestMemo(again)) == []
    next(bases_folder.glob("*/*")).unlink()
    assert len(missing_bases(again, names, DigestMemo(again))) == 1
    assert build_bases(again, names, workers=0, progress=False).built == 1

    path = again.files[-1]
    tensors = safetensors.torch.load(path.read_bytes())
    name = next(name for name in names if name in tensors)
    tensors[name][0, 0] += 1
    safetensors.torch.save_file(tensors, path)
    changed = open_checkpoint(checkpoint.pretrained)
    assert not DigestMemo(changed).known
    assert build_bases(changed, names, workers=0, progress=False).built == 1
    for memo in bases_folder.parent.glob("digests/*.json"):
        memo.write_text("{")
    assert not DigestMemo(changed).known
    assert DigestMemo(changed).complete(progress=False) == changed.digests()


def memory(field: str) -> int:
    """A figure of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def test_memory_is_bounded_by_a_matrix_and_not_by_the_model(tmp_path: Path, bases_folder: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 160_000, "num_hidden_layers": 10}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, vocab_size=100)
    config.save_pretrained(tmp_path)
    numbers = torch.randn(32 * 160_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    shapes = {name: target.shape for name, target in outline(str(tmp_path)).targets.items()}
    tensors = {n: numbers.roll(i)[: math.prod(shape)].view(shape) for i, (n, shape) in enumerate(shapes.items())}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    del tensors, numbers
    checkpoint = open_checkpoint(str(tmp_path))
    # Beside the matrix: what allocators keep.
    bound = max(map(build_bytes, shapes.values())) + 2**26
    assert (tmp_path / "model.safetensors").stat().st_size > 3 * bound
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    build_bases(checkpoint, list(checkpoint.targets), workers=0, progress=False)
    assert memory("VmHWM") - before < bound


def test_a_process_that_is_killed_is_told_and_none_is_left(tmp_path: Path, bases_folder: Path) -> None:
    checkpoint = saved(tmp_path / "model")

    def kill() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.01)
        children[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ModelError, match=r"ended from outside \(signal 9\).* fewer --workers"):
        build_bases(checkpoint, list(checkpoint.targets), workers=2, progress=False)
    killer.join()
    assert not multiprocessing.active_children()
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


def test_what_cannot_be_built_is_told(tmp_path: Path, bases_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = saved(tmp_path / "model")
    names = list(checkpoint.targets)
    path = checkpoint.files[-1]
    tensors = safetensors.torch.load(path.read_bytes())
    name = next(name for name in names if name in tensors)
    tensors[name][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ModelError, match=f"{name} of the base model holds values that are not finite"):
        build_bases(checkpoint, names, workers=0, progress=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(StorageError, match=r"the bases need .* and .* has 0.0 GB free"):
        build_bases(checkpoint, names, workers=0, progress=False)


def test_a_plan_adds_up() -> None:
    shapes = {"a": (4096, 4096), "b": (14336, 4096), "c": (1024, 4096)}
    rates = Rates(1e9, 1e9)
    plan = make_plan(shapes, ["a", "b"], 2, 1, rates)
    assert (plan.matrices, plan.present) == (3, 1)
    assert plan.bytes == 4 * (2 * 4096 * 4097 + 1024 * 1025)
    assert plan.missing_bytes == 4 * 2 * 4096 * 4097
    # Half of U, σ and V of a square matrix; less than a quarter of a wide one's.
    assert basis_bytes(4096) < 0.5001 * 4 * (2 * 4096 * 4096 + 4096)
    assert basis_bytes(4096) < 0.25 * 4 * (4096 * 4096 + 4096 * 14336 + 4096)
    square, tall = 4096**3 / 2 + 4096**3, 4096**2 * 14336 / 2 + 4096**3
    assert plan.seconds == pytest.approx(tall / 1e9)  # no sooner than the longest
    assert make_plan(shapes, ["a", "b"], 1, 1, rates).seconds == pytest.approx((square + tall) / 1e9)
    assert make_plan(shapes, [], 2, 1, rates).workers == 0
    assert make_plan(shapes, ["a"], 2, 1).seconds is None


def test_cores_are_shared_as_far_as_memory_bears() -> None:
    small, large = {str(i): (64, 64) for i in range(1000)}, {"a": (10**6, 10**6), "b": (10**6, 10**6)}
    workers, threads = share_cores(small, "cpu")
    assert workers >= 1
    assert share_cores(small, "cpu", 1) == (1, workers * threads)
    assert share_cores(large, "cpu")[0] == 1
    assert share_cores(small, "cuda")[0] == 1
    with pytest.raises(ArgumentError, match="workers=0"):
        share_cores(small, "cpu", 0)
