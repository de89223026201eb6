"""What building the spectral bases of a model takes: bytes, memory and an estimate of the time."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from t2.adapters.basis import basis_bytes, build_bytes, eigh
from t2.core.errors import ArgumentError

_PROBE = {"cpu": 512, "cuda": 4096}
"""Size of the matrix that a device is timed with; larger ones on a CPU fall out of its caches and take longer."""
_SMALL = 10.0
"""Seconds of work that are done before other processes would have started."""
_PROCESS_BYTES = 600 * 2**20
"""Memory of a process before it has read a matrix: Python, torch and transformers."""


@dataclass(frozen=True)
class Rates:
    """What one process does on a device, by a probe.

    Attributes:
        multiply: multiply-adds a second of a product in float64.
        eigh: r³ a second of an eigendecomposition of r × r in float64.
    """

    multiply: float
    eigh: float

    def seconds(self, shape: tuple[int, int]) -> float:
        """Seconds of one matrix of shape (m, n)."""
        r = min(shape)
        return r * r * max(shape) / 2 / self.multiply + r**3 / self.eigh


@dataclass(frozen=True)
class Plan:
    """What a build is going to take.

    Attributes:
        matrices: how many are wanted.
        present: how many of them are known to be in the cache.
        matrix_bytes: of all of them in bfloat16.
        bytes: of all their bases.
        missing_bytes: of the bases that are not known to be there.
        workers: processes; 0 where it is not worth starting one.
        threads: of each on a CPU.
        worker_bytes: memory of one process at most; on a GPU most of it is the GPU's.
        seconds: of the missing ones, estimated; None without rates.
    """

    matrices: int
    present: int
    matrix_bytes: int
    bytes: int
    missing_bytes: int
    workers: int
    threads: int
    worker_bytes: int
    seconds: float | None


def probe(device: str, threads: int) -> Rates:
    """Time a product and an eigendecomposition, for about a second."""
    size, before = _PROBE[torch.device(device).type], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device, torch.float64)
        gram = a @ a.T
        multiply = min(_timed(lambda: a @ a.T, device) for _ in range(3))
        decompose = min(_timed(lambda: eigh(gram), device) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    return Rates(size**3 / multiply, size**3 / decompose)


def make_plan(
    shapes: Mapping[str, tuple[int, int]],
    missing: Sequence[str],
    workers: int,
    threads: int,
    rates: Rates | None = None,
) -> Plan:
    """Plan a build.

    Args:
        shapes: (m, n) of all matrices that are wanted, by name.
        missing: those that are not in the cache.
        workers: processes.
        threads: of each.
        rates: of one process while the others run; None estimates no time.
    """
    seconds = None
    if rates is not None:
        each = [rates.seconds(shapes[name]) for name in missing]
        workers = 0 if sum(each) < _SMALL else workers
        seconds = max([sum(each) / max(workers, 1), *each])
    return Plan(
        matrices=len(shapes),
        present=len(shapes) - len(missing),
        matrix_bytes=sum(2 * m * n for m, n in shapes.values()),
        bytes=sum(basis_bytes(min(shape)) for shape in shapes.values()),
        missing_bytes=sum(basis_bytes(min(shapes[name])) for name in missing),
        workers=workers,
        threads=threads,
        worker_bytes=_PROCESS_BYTES + max((build_bytes(shape) for shape in shapes.values()), default=0),
        seconds=seconds,
    )


def share_cores(shapes: Mapping[str, tuple[int, int]], device: str, workers: int | None = None) -> tuple[int, int]:
    """Processes and threads of each.

    On a CPU decompositions side by side with one thread each do more than one with all threads, so there are as many as
    the cores and three quarters of the free memory bear. On a GPU there is one.

    Args:
        shapes: of the matrices.
        device: ``cpu`` or ``cuda``.
        workers: processes, where they are given.

    Raises:
        ArgumentError: there are fewer than one.
    """
    cores = _cores()
    if workers is None:
        most = _PROCESS_BYTES + max((build_bytes(shape) for shape in shapes.values()), default=0)
        fit = int(0.75 * free_memory() / most)
        workers = 1 if device.startswith("cuda") else max(1, min(cores, fit, len(shapes)))
    if workers < 1:
        raise ArgumentError(f"workers={workers}: there must be 1 or more")
    return workers, max(1, cores // workers)


def free_memory() -> int:
    """Bytes of memory that can be had without swapping, within the container's limit."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with contextlib.suppress(OSError, ValueError):  # no limit reads "max"
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return max(free, 0)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _timed(work: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began
