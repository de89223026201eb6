"""Building the spectral bases of a checkpoint, matrix by matrix, in several processes.

A process reads one matrix, decomposes it, writes its basis into the cache and lets go of both, so memory is bounded by
the largest matrix and the number of processes, whatever the size of the model. The cache is addressed by what matrices
hold and each of its files is whole or not there, so a build that was stopped goes on where it was.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from t2.adapters.basis import (
    bases_folder,
    basis_bytes,
    build_basis,
    cached_sigma,
    check_finite,
    matrix_digest,
    save_basis,
)
from t2.adapters.build_plan import Rates
from t2.adapters.checkpoint import Checkpoint, open_checkpoint
from t2.adapters.digest_memo import DigestMemo
from t2.core.errors import ModelError, StorageError, T2Error
from t2.core.files import STALE, is_stale

_ERRORS: dict[str, type[T2Error]] = {error.__name__: error for error in (ModelError, StorageError)}


@dataclass(frozen=True)
class Built:
    """What a build did.

    Attributes:
        built: bases that were built.
        present: bases that were in the cache.
        bytes: of the numbers in those built.
        seconds: that it took.
    """

    built: int
    present: int
    bytes: int
    seconds: float


def missing_bases(
    checkpoint: Checkpoint, names: Sequence[str], memo: DigestMemo, folder: Path | None = None
) -> list[str]:
    """Matrices whose bases are not known to be in the cache; those whose digest is not known count as missing."""
    known, targets = memo.known, checkpoint.targets
    return [
        name for name in names if name not in known or cached_sigma(known[name], targets[name].rank, folder) is None
    ]


def build_one(checkpoint: Checkpoint, name: str, device: str = "cpu", folder: Path | None = None) -> tuple[str, bool]:
    """Build the basis of a matrix unless the cache has it.

    Returns:
        The matrix's digest, and whether the basis was built.

    Raises:
        ModelError: the matrix cannot be read, holds values that are not finite, or does not fit into the device.
        StorageError: the basis could not be written.
    """
    matrix = checkpoint.matrix(name)
    digest = matrix_digest(matrix)
    if cached_sigma(digest, checkpoint.targets[name].rank, folder) is not None:
        return digest, False
    check_finite(name, matrix)
    try:
        basis = build_basis(matrix.to(device))
    except (torch.OutOfMemoryError, MemoryError) as error:
        shape = " × ".join(map(str, checkpoint.targets[name].shape))
        raise ModelError(
            f"{name} ({shape}) does not fit into the memory of {device}; use --workers 1 or --device cpu"
        ) from error
    save_basis(basis, digest, folder)
    return digest, True


def build_bases(
    checkpoint: Checkpoint,
    names: Sequence[str],
    *,
    device: str = "cpu",
    workers: int = 1,
    threads: int = 1,
    folder: Path | None = None,
    progress: bool = True,
) -> Built:
    """Build those bases of a checkpoint that the cache lacks.

    When this is left by an exception or a Ctrl-C, no process of it is left, what was built stays, and the next call
    goes on from there.

    Args:
        checkpoint: the checkpoint.
        names: its matrices.
        device: ``cpu`` or ``cuda``.
        workers: processes; 0 builds in this one.
        threads: of each process on a CPU.
        folder: the cache; by default ``bases`` in ``T2_CACHE_DIR``.
        progress: show a progress bar with the time left.

    Raises:
        ModelError: as :func:`build_one`; or a process was killed.
        StorageError: a basis cannot be written, or there is not enough space for all.
    """
    began, folder = time.monotonic(), bases_folder(folder)
    memo = DigestMemo(checkpoint)
    shapes = {name: checkpoint.targets[name].shape for name in names}
    missing = missing_bases(checkpoint, names, memo, folder)
    _sweep(folder, time.time() - STALE)
    _check_space(folder, sum(basis_bytes(min(shapes[name])) for name in missing))
    # Time by the arithmetic, whatever the rates: the products' multiply-adds and about nine r³ of eigenvectors.
    costs = {name: Rates(1.0, 1 / 9).seconds(shapes[name]) for name in missing}
    order = sorted(missing, key=lambda name: -costs[name])
    built = size = 0
    bar = tqdm(
        total=sum(costs.values()),
        desc="Building spectral bases",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]",
        smoothing=0,
        disable=not (progress and missing),
        postfix=f"0/{len(order)} matrices",
    )
    try:
        with bar, _results(checkpoint, order, device, min(workers, len(order)), threads, folder) as results:
            for done, (name, digest, new) in enumerate(results, 1):
                memo.add(name, digest)
                built += new
                size += basis_bytes(min(shapes[name])) if new else 0
                bar.set_postfix_str(f"{done}/{len(order)} matrices", refresh=False)
                bar.update(costs[name])
    finally:
        if missing:
            memo.save()
    return Built(built, len(names) - built, size, time.monotonic() - began)


@contextlib.contextmanager
def _results(
    checkpoint: Checkpoint, names: Sequence[str], device: str, workers: int, threads: int, folder: Path
) -> Iterator[Iterator[tuple[str, str, bool]]]:
    """Names, digests and whether a basis was built, as they come."""
    if workers == 0:
        yield ((name, *build_one(checkpoint, name, device, folder)) for name in names)
        return
    context = multiprocessing.get_context("spawn")
    how = (checkpoint.pretrained, checkpoint.revision, checkpoint.moe, device, threads, folder)
    processes: dict[Connection, Any] = {}
    try:
        # What they inherit: Ctrl-C is this process's to handle, in one line; threads are set when libraries are loaded.
        with _interrupts_ignored(), _environment(OMP_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads):
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, *how), daemon=True)
                process.start()
                theirs.close()
                processes[ours] = process
        yield _dispatch(processes, names)
    finally:
        for process in processes.values():
            process.terminate()
        for connection, process in processes.items():
            process.join()
            connection.close()
        _sweep(folder, time.time() + 1)


def _dispatch(processes: dict[Connection, Any], names: Sequence[str]) -> Iterator[tuple[str, str, bool]]:
    """Give each process the next matrix when it asks for one, and pass on what it answers."""
    waiting, idle = iter(names), 0
    while idle < len(processes):
        for ready in wait(list(processes)):
            assert isinstance(ready, Connection)
            name = None
            try:
                answer = ready.recv()
                if not isinstance(answer, _Failure) and (name := next(waiting, None)) is not None:
                    ready.send(name)
            except (EOFError, ConnectionError):
                raise _lost(processes[ready]) from None
            if isinstance(answer, _Failure):
                raise answer.error()
            idle += name is None
            if answer is not None:
                yield answer


@dataclass(frozen=True)
class _Failure:
    """A failure of a process that a user can mend, in a form that travels."""

    kind: str
    message: str

    def error(self) -> T2Error:
        return _ERRORS.get(self.kind, T2Error)(self.message)


def _work(
    connection: Connection, pretrained: str, revision: str | None, moe: str, device: str, threads: int, folder: Path
) -> None:
    """Build the matrices that are named over a connection, one at a time, until it is closed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            checkpoint = open_checkpoint(pretrained, revision, moe)
            connection.send(None)
            while True:
                name = connection.recv()
                connection.send((name, *build_one(checkpoint, name, device, folder)))
        except T2Error as error:
            connection.send(_Failure(type(error).__name__, str(error)))


def _end_with_parent() -> None:
    """End this process when the one that started it has gone, however it went."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    signal.raise_signal(signal.SIGKILL)


def _lost(process: Any) -> Exception:
    """What to raise for a process that ended before its work did."""
    process.join(5)
    code = process.exitcode
    if code is None or code >= 0:
        return RuntimeError("a process that built bases failed; its traceback stands above")
    return ModelError(
        f"a process that built bases was ended from outside (signal {-code}), perhaps for lack of memory; run the "
        "command again with fewer --workers: what was built stays"
    )


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _environment(**values: object) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _check_space(folder: Path, wanted: int) -> None:
    """Refuse a build that the disk cannot hold.

    Raises:
        StorageError: there is too little space.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < wanted:
        raise StorageError(
            f"the bases need {wanted / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free; free space, set "
            "T2_CACHE_DIR to another disk, or build fewer --layers"
        )


def _sweep(folder: Path, before: float) -> None:
    """Remove what killed processes were writing: temporary files that no process holds."""
    for found in folder.glob("*/.*.tmp"):
        is_stale(found, before, remove=True)
