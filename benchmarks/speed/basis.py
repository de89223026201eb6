"""Building spectral bases, against ``torch.linalg.svd`` of the same matrices in float32.

One matrix after another, both sides on all threads. Bytes are those of the numbers of Q and σ against U, σ and V, all
in float32. Matrices of size 4096 take minutes on a CPU, so there each side runs once. The floor that a row names is the
eigendecomposition in float64 alone, without the Gram matrix that goes in and the rounding of what comes out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from benchmarks.speed.rows import Row, in_turn
from t2.adapters.basis import Basis, build_basis, eigh

_SHAPES = ((576, 576), (4096, 4096), (4096, 14336))
_QUICK = ((64, 64), (96, 96), (96, 336))
_LARGE = 2048


def run(args: argparse.Namespace) -> Iterator[Row]:
    """Measure each shape, see :class:`benchmarks.speed.rows.Benchmark`."""
    for index, (shape, original) in enumerate(zip(_QUICK if args.quick else _SHAPES, _SHAPES, strict=True)):
        yield from _measure(args, shape, original, args.seed + index)


def _measure(args: argparse.Namespace, shape: tuple[int, int], original: tuple[int, int], seed: int) -> list[Row]:
    large = min(shape) >= _LARGE and not args.device.startswith("cuda")
    count = 1 if large else 4
    generator = torch.Generator().manual_seed(seed)
    ws = [torch.randn(shape, generator=generator).bfloat16().to(args.device) for _ in range(count)]

    def reference() -> list[tuple[torch.Tensor, ...]]:
        return [tuple(torch.linalg.svd(w.float(), full_matrices=False)) for w in ws]

    (theirs, ours), (svd, built) = in_turn(
        [reference, lambda: [build_basis(w) for w in ws]], 1 if large else args.repeats, args.device, warm=not large
    )
    symmetric = torch.rand(min(shape), min(shape), dtype=torch.float64, generator=generator).to(args.device)
    (floor,), _ = in_turn([lambda: eigh(symmetric)], 1, args.device, warm=not large)
    name = f"{shape[0]}×{shape[1]}"
    on = "GPU" if args.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    u, sigma, vt = svd[0]
    error = float((built[0].sigma.cpu() - sigma.cpu()).abs().max() / sigma[0].cpu())
    rows = [
        Row(
            f"basis build, {name}",
            "torch.linalg.svd, float32",
            theirs / ours,
            "time of the decomposition / ours",
            5.0 if on == "GPU" else 1.5 if original == _SHAPES[0] else 2.5,
            "above",
            f"{theirs / count:.3g} s, {ours / count:.3g} s a matrix, floor {floor:.3g} s; {on}; "
            f"σ differ by {error:.0e} of the largest",
            {"orthogonality": _orthogonality(built[0])},
        )
    ]
    size, whole = _bytes(built[0].q, built[0].sigma), _bytes(u, sigma, vt)
    rows.append(
        Row(
            f"basis bytes, {name}",
            "U, σ, V",
            size / whole,
            "bytes",
            0.5 if shape[0] == shape[1] else 0.25,
            "below",
            f"{size / 1e6:.4g} MB, {whole / 1e6:.4g} MB; Q and σ of a square matrix are (r + 1) / (2r + 1) of U, σ, V",
        )
    )
    return rows


def _orthogonality(basis: Basis) -> float:
    """Largest entry of QᵀQ − I."""
    q = basis.q.double()
    return float((q.T @ q - torch.eye(basis.rank, dtype=q.dtype, device=q.device)).abs().max())


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
