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

import contextlib
import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import safetensors
import safetensors.torch
import threadpoolctl
import torch
from tqdm import tqdm

from t2.core.digests import canonical_json
from t2.core.errors import ModelError
from t2.core.files import atomic_write
from t2.core.settings import cache_dir

Side = Literal["out", "in"]
_SIDES: tuple[Side, ...] = get_args(Side)
_FORMAT = 1
_SMALL, _LARGE = 512, 1024
_COLUMNS, _ROWS = 2048, 512
"""Parts in which a Gram matrix is summed: so many columns of W are in float64 at once, so many rows in a product."""


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


class Matrix(Protocol):
    """A matrix that is read when it is asked for."""

    @property
    def rank(self) -> int:
        """r = min(m, n)."""
        ...

    @property
    def matrix(self) -> torch.Tensor:
        """W, of shape (m, n)."""
        ...


def build_basis(matrix: torch.Tensor) -> Basis:
    """Decompose one matrix of shape (m, n), rounded to bfloat16; O(r²·max(m, n) + r³) in float64.

    Beside the matrix it needs at most :func:`build_bytes` of memory, on the matrix's device.
    """
    w = matrix.detach().to(torch.bfloat16)
    side: Side = "out" if w.shape[0] <= w.shape[1] else "in"
    values, vectors = eigh(_gram(w if side == "out" else w.T))
    q = vectors.to(torch.float32).flip(-1).contiguous()
    sigma = values.flip(-1).clamp_min(0).sqrt().to(torch.float32).contiguous()
    return Basis(side, q, sigma)


def _gram(w: torch.Tensor) -> torch.Tensor:
    """The lower triangle of W·Wᵀ in float64, which is all that ``eigh`` reads; W has shape (r, k)."""
    r, k = w.shape
    gram = torch.zeros(r, r, dtype=torch.float64, device=w.device)
    for start in range(0, k, _COLUMNS):
        columns = w[:, start : start + _COLUMNS].to(torch.float64)
        for row in range(0, r, _ROWS):
            end = min(row + _ROWS, r)
            gram[row:end, :end].addmm_(columns[row:end], columns[:end].T)
    return gram


def eigh(gram: torch.Tensor, lapack: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix, of which the lower triangle is read.

    Args:
        gram: shape (r, r), float64.
        lapack: on a CPU whose to use: ``torch`` or ``numpy``; None is the one that is faster on this make of CPU.

    Returns:
        Shapes (r,) and (r, r), vectors in columns.
    """
    if gram.device.type != "cpu" or (lapack or _lapack(len(gram))) == "torch":
        values, vectors = torch.linalg.eigh(gram)
        return values, vectors
    with _openblas().limit(limits=1) if len(gram) < _LARGE else contextlib.nullcontext():
        values, vectors = map(torch.from_numpy, np.linalg.eigh(gram.numpy()))
    return values, vectors


def _lapack(rank: int) -> str:
    """Whose LAPACK: torch's wheels carry MKL, which is at its best on Intel's CPUs, numpy's carry OpenBLAS.

    Threads cost both of them more than they gain on matrices that are not large, and on a busy machine those of
    OpenBLAS wait for each other many times as long as they work. So OpenBLAS has one there, and large matrices are for
    it in processes in which it has but one.
    """
    alone = os.environ.get("OPENBLAS_NUM_THREADS") == "1"
    return "numpy" if rank >= _SMALL and (alone or rank < _LARGE) and not _is_intel() else "torch"


@functools.cache
def _openblas() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController().select(internal_api="openblas")


@functools.cache
def _is_intel() -> bool:
    with contextlib.suppress(OSError):
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    return True


def build_bytes(shape: tuple[int, int]) -> int:
    """Most bytes that :func:`build_basis` and writing its result hold at once, for a matrix of shape (m, n).

    The matrix in bfloat16, twice while its digest is taken; the Gram matrix, its copy, the vectors and the workspace of
    two matrices of LAPACK's ``syevd``, all in float64; a float64 copy of some columns.
    """
    r = min(shape)
    return 2 * 2 * shape[0] * shape[1] + 8 * 5 * r * r + 8 * r * min(max(shape), _COLUMNS)


def matrix_digest(matrix: torch.Tensor) -> str:
    """Hex SHA-256 of a matrix's shape and of its values rounded to bfloat16."""
    dense = matrix.detach().to(torch.bfloat16).cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(dense.shape)}".encode())
    digest.update(dense.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(digests: Mapping[str, str], aliases: Mapping[str, str] | None = None) -> str:
    """Fingerprint of a model: hex SHA-256 over the names and digests of its matrices.

    Args:
        digests: :func:`matrix_digest` of each adaptable matrix, by name.
        aliases: further names of shared matrices, mapped to their names in ``digests``. Sharing changes the
            fingerprint: a model that shares a matrix and an untied copy of it take different experts.
    """
    found = {**digests, **{alias: f"= {name}" for alias, name in (aliases or {}).items()}}
    lines = "".join(f"{name} {found[name]}\n" for name in sorted(found))
    return hashlib.sha256(lines.encode()).hexdigest()


def load_bases(
    targets: Mapping[str, Matrix], digests: Mapping[str, str], folder: Path | None = None, progress: bool = True
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
    folder = bases_folder(folder)
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
        check_finite(name, matrix)
        basis = build_basis(matrix)
        del matrix  # a quantised one was dequantised for this alone
        path = save_basis(basis, digests[name], folder)
        bases[name] = _read(path, basis.rank) or basis
    return {name: bases[name] for name in targets}


def check_finite(name: str, matrix: torch.Tensor) -> None:
    """Refuse a matrix that has no decomposition.

    Raises:
        ModelError: it holds values that are not finite.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise ModelError(f"{name} of the base model holds values that are not finite; load whole weights")


def save_basis(basis: Basis, digest: str, folder: Path | None = None) -> Path:
    """Write a basis into the cache, atomically, and return its path.

    Args:
        basis: the basis.
        digest: :func:`matrix_digest` of its matrix.
        folder: the cache, as for :func:`load_bases`.

    Raises:
        StorageError: it could not be written.
    """
    path = _path(bases_folder(folder), digest)
    tensors = {"q": basis.q.cpu(), "sigma": basis.sigma.cpu()}
    atomic_write(path, safetensors.torch.save(tensors, metadata=_metadata(basis.side)))
    return path


def cached_sigma(digest: str, rank: int, folder: Path | None = None) -> torch.Tensor | None:
    """σ of a matrix, shape (r,), where the cache has its basis; Q is not read."""
    return _read_sigma(_path(bases_folder(folder), digest), rank)


def basis_bytes(rank: int) -> int:
    """Bytes of the numbers in a basis of a rank."""
    return 4 * rank * (rank + 1)


def bases_folder(folder: Path | None = None) -> Path:
    """The cache of bases: ``folder``, without it ``bases`` in ``T2_CACHE_DIR``."""
    return folder or cache_dir() / "bases"


def read_basis(folder: Path, digest: str, rank: int) -> Basis | None:
    """A basis of the cache, memory-mapped; None where it is not there, or is not whole.

    Args:
        folder: the cache.
        digest: :func:`matrix_digest` of the matrix.
        rank: r.
    """
    return _read(_path(folder, digest), rank)


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
            side = _side(file, rank)
            return None if side is None else Basis(side, file.get_tensor("q"), file.get_tensor("sigma"))
    except (safetensors.SafetensorError, OSError):
        return None


def _read_sigma(path: Path, rank: int) -> torch.Tensor | None:
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            # A copy, lest the whole file stay mapped.
            return None if _side(file, rank) is None else file.get_tensor("sigma").clone()
    except (safetensors.SafetensorError, OSError):
        return None


def _side(file: Any, rank: int) -> Side | None:
    """The side of a basis of a rank in an open file; None where the file is something else."""
    forms = {"q": [rank, rank], "sigma": [rank]}
    if set(file.keys()) != set(forms):
        return None
    for name, shape in forms.items():
        part = file.get_slice(name)
        if (part.get_shape(), part.get_dtype()) != (shape, "F32"):
            return None
    metadata = file.metadata()
    return next((side for side in _SIDES if metadata == _metadata(side)), None)
