"""Building spectral bases, against ``torch.linalg.svd`` of the same matrices in float32.

Two ways: one matrix after another on all threads, as an evaluation builds those that it lacks; and on a CPU as many
processes of one thread as there are cores, a matrix each, as ``t2 basis build`` does, against the decomposition in
whichever of the two ways is faster for it. The floor that a row names is the eigendecomposition in float64 alone,
without the Gram matrix that goes in and the rounding of what comes out.

Bytes are those of the numbers of Q and σ against U, σ and V, all in float32. Matrices of size 4096 take minutes on a
CPU, so there each side runs once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch

from benchmarks.speed.rows import Row, in_turn
from t2.adapters.basis import Basis, build_basis, eigh

_SHAPES = ((576, 576), (4096, 4096), (4096, 14336))
_QUICK = ((64, 64), (96, 96), (96, 336))
_LARGE = 2048

_Matrix = torch.Tensor


def run(args: argparse.Namespace) -> Iterator[Row]:
    """Measure each shape, see :class:`benchmarks.speed.rows.Benchmark`."""
    for index, (shape, original) in enumerate(zip(_QUICK if args.quick else _SHAPES, _SHAPES, strict=True)):
        yield from _measure(args, shape, original, args.seed + index)


def svd(w: _Matrix) -> tuple[_Matrix, _Matrix, _Matrix]:
    """U, σ and Vᵀ in float32, the thin ones."""
    u, sigma, vt = torch.linalg.svd(w.float(), full_matrices=False)
    return u, sigma, vt


def _measure(args: argparse.Namespace, shape: tuple[int, int], original: tuple[int, int], seed: int) -> Iterator[Row]:
    on_gpu = args.device.startswith("cuda")
    large = min(shape) >= _LARGE and not on_gpu
    count = 1 if large else 4
    ws = [w.to(args.device) for w in _matrices(shape, count, seed)]
    (theirs, ours), (decomposed, built) = in_turn(
        [lambda: [svd(w) for w in ws], lambda: [build_basis(w) for w in ws]],
        1 if large else args.repeats,
        args.device,
        warm=not large,
    )
    theirs, ours = theirs / count, ours / count
    symmetric = torch.rand(min(shape), min(shape), dtype=torch.float64).to(args.device)
    (floor,), _ = in_turn([lambda: eigh(symmetric)], 1, args.device, warm=not large)
    name = f"{shape[0]}×{shape[1]}"
    bound = 5.0 if on_gpu else 1.5 if original == _SHAPES[0] else 2.5
    u, sigma, vt = decomposed[0]
    error = float((built[0].sigma.cpu() - sigma.cpu()).abs().max() / sigma[0].cpu())
    yield Row(
        f"basis build, {name}, {'GPU' if on_gpu else f'{torch.get_num_threads()} threads'}",
        "torch.linalg.svd, float32",
        theirs / ours,
        "time of the decomposition / ours",
        bound,
        "above",
        f"{theirs:.3g} s, {ours:.3g} s a matrix, floor {floor:.3g} s; σ differ by {error:.0e} of the largest",
        {"orthogonality": _orthogonality(built[0])},
    )
    if not on_gpu:
        processes = os.cpu_count() or 1
        apart, own = (_side_by_side(side, shape, processes, count, seed) for side in (svd, build_basis))
        yield Row(
            f"basis build, {name}, {processes} processes",
            "torch.linalg.svd, float32, the faster way",
            min(theirs, apart) / own,
            "time of the decomposition / ours",
            bound,
            "above",
            f"a matrix every {theirs:.3g} s (threads) or {apart:.3g} s (processes), every {own:.3g} s",
        )
    size, whole = _bytes(built[0].q, built[0].sigma), _bytes(u, sigma, vt)
    yield Row(
        f"basis bytes, {name}",
        "U, σ, V",
        size / whole,
        "bytes",
        0.5 if shape[0] == shape[1] else 0.25,
        "below",
        f"{size / 1e6:.4g} MB, {whole / 1e6:.4g} MB; Q and σ of a square matrix are (r + 1) / (2r + 1) of U, σ, V",
    )


def _matrices(shape: tuple[int, int], count: int, seed: int) -> list[_Matrix]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).bfloat16() for _ in range(count)]


def _side_by_side(
    side: Callable[[_Matrix], object], shape: tuple[int, int], processes: int, count: int, seed: int
) -> float:
    """Seconds from one matrix to the next, of processes with a thread each that do as many at the same time."""
    context = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
        context.Manager() as manager,
        ProcessPoolExecutor(processes, context) as pool,
    ):
        start = manager.Barrier(processes)
        asked = [pool.submit(_alone, side, shape, count, seed + i, start) for i in range(processes)]
        return max(each.result() for each in asked) / (processes * count)


def _alone(
    side: Callable[[_Matrix], object],
    shape: tuple[int, int],
    count: int,
    seed: int,
    start: threading.Barrier,
) -> float:
    ws = _matrices(shape, count, seed)
    # Of the large ones one would take as long as all; loading libraries is little beside them.
    side(ws[0] if min(shape) < _LARGE else _matrices((64, 64), 1, seed)[0])
    start.wait()
    began = time.perf_counter()
    for w in ws:
        side(w)
    return time.perf_counter() - began


def _orthogonality(basis: Basis) -> float:
    """Largest entry of QᵀQ − I."""
    q = basis.q.double()
    return float((q.T @ q - torch.eye(basis.rank, dtype=q.dtype, device=q.device)).abs().max())


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
