"""The cache of spectral bases: built once, whole or not there, shared by the copies of a model."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from t2.adapters import basis as basis_module
from t2.adapters.basis import Basis, load_bases
from t2.adapters.engine.transformers import TransformersEngine
from t2.core.errors import ModelError, StorageError
from tests.adapters.conftest import ARCHITECTURES, make_model, make_tokenizer


def engine_of(architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> TransformersEngine:
    return TransformersEngine(make_model(architecture, seed, dtype=dtype), make_tokenizer(), "tiny")


def all_bases(engine: TransformersEngine) -> dict[str, Basis]:
    return engine.bases(engine.ranks(), progress=False)


def state(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Digest, inode and time of every file of a folder."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_ino,
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def same(one: dict[str, Basis], other: dict[str, Basis]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].side == other[name].side
        and torch.equal(one[name].q, other[name].q)
        and torch.equal(one[name].sigma, other[name].sigma)
        for name in one
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_second_load_builds_nothing(architecture: str, bases_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = all_bases(engine_of(architecture))
    before = state(bases_folder)
    assert len(before) == len(first)

    def refuse(matrix: torch.Tensor) -> Basis:
        raise AssertionError("built again")

    monkeypatch.setattr(basis_module, "build_basis", refuse)
    assert same(all_bases(engine_of(architecture)), first)
    assert state(bases_folder) == before


def test_the_files_are_mapped_and_not_read(bases_folder: Path) -> None:
    all_bases(engine_of())
    mapped = all_bases(engine_of())
    maps = Path("/proc/self/maps").read_text()
    assert all(str(path) in maps for path in bases_folder.rglob("*.safetensors"))
    assert len(mapped) == len(list(bases_folder.rglob("*.safetensors")))


def test_copies_of_a_model_in_two_precisions_share_fingerprint_and_bases(bases_folder: Path) -> None:
    # Weights that bfloat16 does not have, as of a model trained in float32.
    model = make_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)
    full = TransformersEngine(model, make_tokenizer(), "full")
    bases = all_bases(full)
    before = state(bases_folder)
    half = TransformersEngine(make_model("llama", dtype=torch.bfloat16), make_tokenizer(), "half")
    half.model.load_state_dict(model.state_dict())
    half = TransformersEngine(half.model, make_tokenizer(), "half")
    assert half.dtype == torch.bfloat16 != full.dtype
    assert half.base.fingerprint == full.base.fingerprint
    assert same(all_bases(half), bases)
    assert state(bases_folder) == before


def test_another_matrix_has_another_fingerprint_and_basis(bases_folder: Path) -> None:
    engine = engine_of()
    all_bases(engine)
    before = len(state(bases_folder))
    name = "model.layers.1.mlp.up_proj.weight"
    changed = make_model("llama")
    with torch.no_grad():
        changed.get_parameter(name)[0, 0] += 1
    other = TransformersEngine(changed, make_tokenizer(), "tiny")
    assert other.base.fingerprint != engine.base.fingerprint
    all_bases(other)
    assert len(state(bases_folder)) == before + 1


def broken_files(data: bytes, path: Path) -> dict[str, bytes]:
    """What may be wrong with the file of a basis."""
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()

    def save(metadata: dict[str, str], **changes: torch.Tensor) -> bytes:
        return safetensors.torch.save({**tensors, **changes}, metadata=metadata)

    return {
        "empty": b"",
        "seven bytes": data[:7],
        "half the header": data[:60],
        "half the data": data[: len(data) // 2],
        "one byte short": data[:-1],
        "no safetensors": b"x" * len(data),
        "huge header": b"\xff" * 8 + data[8:],
        "no metadata": safetensors.torch.save(tensors),
        "another format": save({"t2": metadata["t2"].replace("1", "0")}),
        "another side": save({"t2": metadata["t2"].replace("out", "up").replace("in", "up")}),
        "no sigma": safetensors.torch.save({"q": tensors["q"]}, metadata=metadata),
        "another rank": save(metadata, sigma=tensors["sigma"][:-1].clone()),
        "another type": save(metadata, q=tensors["q"].half()),
    }


def test_a_broken_file_is_built_again(bases_folder: Path) -> None:
    engine = engine_of()
    bases = all_bases(engine)
    before = {path: digest for path, (digest, _, _) in state(bases_folder).items()}
    path = next(bases_folder.rglob("*.safetensors"))
    # A mapped file must not be cut in place, so every break is a new file.
    for what, data in broken_files(path.read_bytes(), path).items():
        path.unlink()
        path.write_bytes(data)
        assert same(all_bases(engine_of()), bases), what
        assert {path: digest for path, (digest, _, _) in state(bases_folder).items()} == before, what


def test_a_folder_in_the_place_of_a_file_is_told(bases_folder: Path) -> None:
    all_bases(engine_of())
    path = next(bases_folder.rglob("*.safetensors"))
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match=f"cannot write {path}: Is a directory"):
        all_bases(engine_of())


def test_a_matrix_that_the_model_lacks_is_told() -> None:
    engine = engine_of()
    with pytest.raises(ModelError, match=r"tiny has no adaptable matrix model\.layers\.9\.x\.weight"):
        engine.bases(["model.layers.9.x.weight"])


BUILDER = """
import sys
from pathlib import Path
import torch
from t2.adapters.basis import load_bases, matrix_digest
from t2.adapters.targets import Target
layers = [torch.nn.Linear(200, 200, bias=False) for _ in range(200)]
targets = {f"m{i}": Target(f"m{i}", layer, i, False) for i, layer in enumerate(layers)}
digests = {name: matrix_digest(target.matrix) for name, target in targets.items()}
print("ready", flush=True)
load_bases(targets, digests, Path(sys.argv[1]), progress=False)
"""


def test_a_kill_while_building_leaves_whole_files(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", BUILDER, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        while len(files := list(tmp_path.rglob("*.safetensors"))) < 5 and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    files = list(tmp_path.rglob("*.safetensors"))
    assert 5 <= len(files) < 200
    for path in files:
        tensors = safetensors.torch.load_file(path)
        assert torch.allclose(tensors["q"].T @ tensors["q"], torch.eye(200), atol=1e-4)


def test_no_target_needs_no_cache(bases_folder: Path) -> None:
    assert load_bases({}, {}) == {}
    assert not bases_folder.exists()


def test_weights_that_are_not_finite_are_told(bases_folder: Path) -> None:
    engine = engine_of()
    name = next(iter(engine.ranks()))
    engine.targets[name].parameter.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="holds values that are not finite"):
        engine.bases([name], progress=False)
