"""Spectral bases: for each adapted matrix its singular values and the smaller of its two singular bases.

With W = U·diag(σ)·Vᵀ (m × n, σ descending, r = min(m, n)) and an expert z ∈ ℝʳ, W′(z) = U·diag(σ⊙z)·Vᵀ. Where m ≤ n the
basis U is square and W′ = W + U·diag(z−1)·UᵀW; where n < m the basis V is square and W′ = W + W·V·diag(z−1)·Vᵀ. So one
square basis Q (r × r) is all that is needed, and z = 1 gives W bit for bit. Q comes from the eigendecomposition of the
r × r Gram matrix (W·Wᵀ or Wᵀ·W) in float64.

What is decomposed and fingerprinted is W rounded to bfloat16. Rounding perturbs singular values by as much as their
spacing, so bases of the float32 and the bfloat16 copy of one model would differ by rotations among neighbouring
components, and an expert would mean another thing in each. Of the rounded matrix there is only one basis, whichever
dtype a model is loaded in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import safetensors
import safetensors.torch
import torch
from tqdm import tqdm

from t2.adapters.targets import Target
from t2.core.digests import canonical_json
from t2.core.errors import ModelError
from t2.core.files import atomic_write
from t2.core.settings import cache_dir

Side = Literal["out", "in"]
_SIDES: tuple[Side, ...] = get_args(Side)
_FORMAT = 1


@dataclass(frozen=True)
class Basis:
    """The spectral basis of one matrix.

    Attributes:
        side: ``out`` when Q = U (m ≤ n), ``in`` when Q = V (n < m).
        q: shape (r, r), float32, columns in the order of descending σ.
        sigma: shape (r,), float32.
    """

    side: Side
    q: torch.Tensor
    sigma: torch.Tensor

    @property
    def rank(self) -> int:
        """r, the length of an expert's vector for this matrix."""
        return int(self.sigma.shape[0])


def build_basis(matrix: torch.Tensor) -> Basis:
    """Decompose one matrix of shape (m, n), rounded to bfloat16; O(r²·max(m, n) + r³) in float64."""
    w = matrix.detach().to(torch.bfloat16).to(torch.float64)
    side: Side = "out" if w.shape[0] <= w.shape[1] else "in"
    gram = w @ w.T if side == "out" else w.T @ w
    values, vectors = torch.linalg.eigh(gram)
    q = vectors.flip(-1).to(torch.float32).contiguous()
    sigma = values.flip(-1).clamp_min(0).sqrt().to(torch.float32).contiguous()
    return Basis(side, q, sigma)


def matrix_digest(matrix: torch.Tensor) -> str:
    """Hex SHA-256 of a matrix's shape and of its values rounded to bfloat16."""
    dense = matrix.detach().to(torch.bfloat16).cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(dense.shape)}".encode())
    digest.update(dense.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(digests: Mapping[str, str]) -> str:
    """Fingerprint of a model: hex SHA-256 over the names and digests of all its adaptable matrices."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def load_bases(
    targets: Mapping[str, Target], digests: Mapping[str, str], folder: Path | None = None, progress: bool = True
) -> dict[str, Basis]:
    """The bases of some matrices, memory-mapped from the cache; those not yet there are built and written first.

    Args:
        targets: the matrices.
        digests: :func:`matrix_digest` of each, by name; the cache is addressed by it, so models that share a matrix
            share its basis, and a changed matrix never meets an old basis.
        folder: the cache; by default ``bases`` in ``T2_CACHE_DIR``.
        progress: show a progress bar when something has to be built.

    Raises:
        ModelError: a matrix holds values that are not finite.
        StorageError: a basis could not be written; those already written stay whole.
    """
    folder = folder or cache_dir() / "bases"
    bases: dict[str, Basis] = {}
    missing = []
    for name in targets:
        basis = _read(_path(folder, digests[name]), targets[name].rank)
        if basis is None:
            missing.append(name)
        else:
            bases[name] = basis
    bar = tqdm(missing, desc="Building spectral bases", unit="matrix", disable=not (progress and missing), delay=1)
    for name in bar:
        matrix = targets[name].matrix
        if not bool(torch.isfinite(matrix).all()):
            raise ModelError(f"{name} of the base model holds values that are not finite; load whole weights")
        basis = build_basis(matrix)
        del matrix  # a quantised one was dequantised for this alone
        path = _path(folder, digests[name])
        tensors = {"q": basis.q.cpu(), "sigma": basis.sigma.cpu()}
        atomic_write(path, safetensors.torch.save(tensors, metadata=_metadata(basis.side)))
        bases[name] = _read(path, basis.rank) or basis
    return {name: bases[name] for name in targets}


def _metadata(side: Side) -> dict[str, str]:
    # One key: safetensors writes several in random order, and equal bases should be equal files.
    return {"t2": canonical_json({"format": _FORMAT, "side": side})}


def _path(folder: Path, digest: str) -> Path:
    return folder / digest[:2] / f"{digest}.safetensors"


def _read(path: Path, rank: int) -> Basis | None:
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            q, sigma = file.get_tensor("q"), file.get_tensor("sigma")
    except (safetensors.SafetensorError, OSError):
        return None
    side = next((side for side in _SIDES if metadata == _metadata(side)), None)
    if (
        side is None
        or (q.shape, q.dtype) != ((rank, rank), torch.float32)
        or (sigma.shape, sigma.dtype) != ((rank,), torch.float32)
    ):
        return None
    return Basis(side, q, sigma)
