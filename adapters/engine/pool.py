"""Engines on several processes, GPUs or machines: actors of Ray, each with its own, over which work is spread."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, TypeVar

import torch

from t2.adapters.basis import Basis
from t2.adapters.engine.base import Engine, Generated, GenerateRequest, Scored, ScoreRequest
from t2.adapters.expert import Z
from t2.adapters.progress import request_bar
from t2.core.errors import ArgumentError, DependencyError, ModelError, T2Error
from t2.core.manifest import BaseModelRef
from t2.core.seeds import derive_seed

ATTEMPTS = 3
"""How many workers may die over one piece of work before it is held to be the reason."""
PATIENCE = 30.0
"""Seconds after which it is told that a worker has not started."""

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Piece:
    """Some requests of a call, for one worker.

    Attributes:
        method: ``generate`` or ``score``.
        indices: their places in the call.
        requests: the requests.
        mixtures: places in the call of the mixtures they use.
        rows: for each request the place of its mixture among those.
    """

    method: str
    indices: tuple[int, ...]
    requests: tuple[Any, ...]
    mixtures: tuple[int, ...]
    rows: tuple[int, ...]


class Turns:
    """Lets threads that wait for workers overlap, and nothing else: only one of them runs at any time.

    So code that was never meant for threads, such as a tokenizer, can prepare several tasks whose work is done
    elsewhere.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own = threading.local()

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Run jobs beside each other, each in a thread, and return their results in the order of the jobs.

        Raises:
            Exception: that of the first job that failed, after all have ended.
        """

        def take(job: Callable[[], T]) -> T:
            with self._lock:
                self._own.held = True
                try:
                    return job()
                finally:
                    self._own.held = False

        if len(jobs) < 2:
            return [job() for job in jobs]
        with ThreadPoolExecutor(len(jobs), "task") as threads:
            return [future.result() for future in [threads.submit(take, job) for job in jobs]]

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Context in which another thread may run; at its end it is this one's turn again."""
        if not getattr(self._own, "held", False):
            yield
            return
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()


class Workers:
    """Actors that each own an engine, made by the same function.

    A worker that dies is replaced, and its work done again. What a piece of work is does not depend on how many workers
    there are or which of them does it.

    Args:
        build: makes an engine; it is sent to the workers, so it and all that it holds can be pickled.
        count: workers.
        base: of the engine at home; the workers' must be the same.
        gpus: GPUs of each worker; a cluster must have them.

    Raises:
        DependencyError: Ray is not installed.
        ModelError: a worker cannot make its engine, or makes one of another model.
    """

    def __init__(self, build: Callable[[], Engine], count: int, base: BaseModelRef, *, gpus: float = 0) -> None:
        if count < 1:
            raise ArgumentError(f"workers={count} must be at least 1")
        self._ray = _import_ray()
        self.turns = Turns()
        self.lost = 0
        self._told, self._why = 0, ""
        self._build = build
        self._base = base
        self._closed = threading.Event()
        cores = len(os.sched_getaffinity(0))
        threads = max(1, cores // count)
        _enter(self._ray, max(cores, count))
        self._actor: Any = self._ray.remote(_Worker).options(
            num_cpus=1 if os.environ.get("RAY_ADDRESS") else min(1.0, cores / count),
            num_gpus=gpus,
            max_restarts=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}},
        )
        self._all: list[Any] = []
        self._free: deque[Any] = deque()
        self._lock = threading.Condition()
        try:
            made = [self._make() for _ in range(count)]
            for worker in made:
                self._check(worker)
            self._free.extend(made)
        except BaseException:
            self.close()
            raise

    def _make(self) -> Any:
        worker = self._actor.remote(self._build)
        self._all.append(worker)
        return worker

    def _check(self, worker: Any) -> None:
        ready = worker.ready.remote()
        if not self._ray.wait([ready], timeout=PATIENCE)[0]:
            free = self._ray.available_resources()
            told = ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
            _log.warning("a worker has not started for %d s; Ray has %s free", PATIENCE, told)
        try:
            found = self._ray.get(ready)
        except self._lost() as error:
            raise ModelError(f"a worker died while it loaded the model: {_line(error)}; use fewer workers") from error
        if isinstance(found, str):
            raise ModelError(f"a worker cannot load the model: {found}")
        if found.fingerprint != self._base.fingerprint:
            raise ModelError(
                f"a worker has loaded other weights ({found.fingerprint[:12]}) than this process "
                f"({self._base.fingerprint[:12]}); give all machines of the cluster the same files"
            )

    def _lost(self) -> tuple[type[BaseException], ...]:
        errors = self._ray.exceptions
        return (errors.RayActorError, errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError)

    def run(self, pieces: Sequence[_Piece], mixtures: Sequence[Z | None], done: Callable[[int], object]) -> list[Any]:
        """Do pieces of work and return what each gave, in their order.

        Args:
            pieces: the work.
            mixtures: what the pieces refer to.
            done: is told the number of requests of each piece that is done.

        Raises:
            T2Error: a piece failed so; its text is the engine's own.
            ModelError: workers die over one piece again and again, or none can be had.
        """
        ray = self._ray
        stored = [ray.put(z) for z in mixtures]
        waiting = deque(range(len(pieces)))
        attempts = [0] * len(pieces)
        running: dict[Any, tuple[int, Any]] = {}
        results: list[Any] = [None] * len(pieces)
        try:
            while waiting or running:
                while waiting and (worker := self._take(block=not running)) is not None:
                    index = waiting.popleft()
                    piece = pieces[index]
                    ask = getattr(worker, piece.method)
                    running[ask.remote(piece.requests, piece.rows, *(stored[i] for i in piece.mixtures))] = (
                        index,
                        worker,
                    )
                with self.turns.waiting():
                    ready, _ = ray.wait(list(running), timeout=1.0)
                for reference in ready:
                    index, worker = running.pop(reference)
                    try:
                        results[index] = ray.get(reference)
                    except self._lost() as error:
                        attempts[index] += 1
                        self._replace(worker, error, attempts[index])
                        waiting.appendleft(index)
                    except ray.exceptions.RayTaskError as error:
                        self._give(worker)
                        if isinstance(error.cause, T2Error):
                            raise error.cause from None
                        raise ModelError(f"a worker failed: {_line(error.cause)}") from error
                    else:
                        self._give(worker)
                        done(len(pieces[index].indices))
        except BaseException:
            # What is still running would be waited for by the next call.
            for reference, (_, worker) in running.items():
                ray.cancel(reference, force=False)
                self._give(worker)
            raise
        return results

    def _take(self, *, block: bool) -> Any | None:
        """A free worker; without ``block`` None where there is none now."""
        with self._lock:
            if self._free:
                return self._free.popleft()
        if not block:
            return None
        with self.turns.waiting(), self._lock:
            while not self._free:
                if self._closed.is_set():
                    raise ModelError("the workers have been stopped")
                self._lock.wait(1.0)
            return self._free.popleft()

    def _give(self, worker: Any) -> None:
        with self._lock:
            self._free.append(worker)
            self._lock.notify()

    def _replace(self, worker: Any, error: BaseException, attempts: int) -> None:
        self.lost += 1
        self._why = _line(error)
        if attempts >= ATTEMPTS:
            self._give(self._make())
            raise ModelError(
                f"{attempts} workers died over the same work: {_line(error)}; use fewer workers or a smaller batch"
            ) from error
        with contextlib.suppress(Exception):
            self._ray.kill(worker)
        self._all.remove(worker)
        fresh = self._make()
        self._check(fresh)
        self._give(fresh)

    def losses(self) -> str | None:
        """In one line how many workers were lost since this was asked last, and why; None where none was."""
        count, self._told = self.lost - self._told, self.lost
        if not count:
            return None
        some = "1 worker was" if count == 1 else f"{count} workers were"
        return f"{some} lost and replaced ({self._why}); the work was done again, and no answer depends on it"

    def close(self) -> None:
        """Stop the workers, and Ray where this process started it and no other workers use it."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._ray.is_initialized():
            for worker in self._all:
                with contextlib.suppress(Exception):
                    self._ray.kill(worker)
        _leave(self._ray)


class PooledEngine:
    """An engine whose answers come from workers; bases and weights are those of the engine at home.

    Args:
        home: the engine of this process.
        workers: engines of the same model.
        rows: requests of a piece of work, about.
    """

    def __init__(self, home: Engine, workers: Workers, rows: int = 32) -> None:
        self.home = home
        self.workers = workers
        self.base = home.base
        self.supports_rows = home.supports_rows
        self._rows = rows
        self._applied: ContextVar[Z | None] = ContextVar("applied", default=None)

    @property
    def precision(self) -> str:
        """See :class:`t2.adapters.engine.Engine`."""
        return self.home.precision

    def ranks(self) -> Mapping[str, int]:
        """See :class:`t2.adapters.engine.Engine`."""
        return self.home.ranks()

    def probe(self, tokens: Sequence[int], mixtures: Sequence[Z | None] = (None,)) -> list[torch.Tensor]:
        """See :class:`t2.adapters.engine.Engine`; the engine at home is asked."""
        return self.home.probe(tokens, mixtures)

    def bases(self, names: Iterable[str]) -> Mapping[str, Basis]:
        """See :class:`t2.adapters.engine.Engine`; the workers of this machine find them in its cache."""
        return self.home.bases(names)

    @contextlib.contextmanager
    def applied(self, z: Z | None) -> Iterator[None]:
        """See :class:`t2.adapters.engine.Engine`; what it is asked meanwhile without a mixture is under it."""
        with self.home.applied(z):
            token = self._applied.set(z)
            try:
                yield
            finally:
                self._applied.reset(token)

    def switching(self, experts: Sequence[Z], mixtures: Sequence[Z | None]) -> contextlib.AbstractContextManager[None]:
        """See :class:`t2.adapters.engine.Engine`."""
        return self.home.switching(experts, mixtures)

    def release(self) -> None:
        """See :class:`t2.adapters.engine.Engine`."""
        self.home.release()

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        mixtures: Sequence[Z | None] = (None,),
        rows: Sequence[int] | None = None,
        *,
        seed: int = 0,
        progress: str | None = None,
    ) -> list[Generated]:
        """See :class:`t2.adapters.engine.Engine`; each request has its own seed, wherever it is answered."""
        asked = [
            request if request.seed is not None else replace(request, seed=derive_seed(seed, "generate", i))
            for i, request in enumerate(requests)
        ]
        return self._run("generate", asked, lambda request: None, mixtures, rows, progress)

    def score(
        self,
        requests: Sequence[ScoreRequest],
        mixtures: Sequence[Z | None] = (None,),
        rows: Sequence[int] | None = None,
        *,
        progress: str | None = None,
    ) -> list[Scored]:
        """See :class:`t2.adapters.engine.Engine`; continuations of one context are scored together."""
        return self._run("score", requests, lambda request: request.context, mixtures, rows, progress)

    def _run(
        self,
        method: str,
        requests: Sequence[Any],
        together: Callable[[Any], Any],
        mixtures: Sequence[Z | None],
        rows: Sequence[int] | None,
        progress: str | None,
    ) -> list[Any]:
        current = self._applied.get()
        mixtures = [current if z is None else z for z in mixtures]
        pieces = _cut(method, requests, rows if rows is not None else [0] * len(requests), together, self._rows)
        answers: list[Any] = [None] * len(requests)
        with request_bar(progress, len(requests)) as bar:
            for piece, found in zip(pieces, self.workers.run(pieces, mixtures, bar.update), strict=True):
                for i, answer in zip(piece.indices, found, strict=True):
                    answers[i] = answer
        return answers


class _Worker:
    """The actor: an engine, or why there is none."""

    def __init__(self, build: Callable[[], Engine]) -> None:
        self._engine: Engine | None = None
        self._failed = ""
        try:
            self._engine = build()
        except Exception as error:  # noqa: BLE001 - an actor that fails here would be told as one that died
            self._failed = _line(error)

    def ready(self) -> BaseModelRef | str:
        """The model, or why there is none."""
        return self._engine.base if self._engine is not None else self._failed

    def generate(
        self, requests: Sequence[GenerateRequest], rows: Sequence[int], *mixtures: Z | None
    ) -> list[Generated]:
        """Continue prompts; see :class:`t2.adapters.engine.Engine`."""
        assert self._engine is not None
        return self._engine.generate(requests, mixtures, rows)

    def score(self, requests: Sequence[ScoreRequest], rows: Sequence[int], *mixtures: Z | None) -> list[Scored]:
        """Log-likelihoods; see :class:`t2.adapters.engine.Engine`."""
        assert self._engine is not None
        return self._engine.score(requests, mixtures, rows)


def _cut(
    method: str, requests: Sequence[Any], rows: Sequence[int], together: Callable[[Any], Any], size: int
) -> list[_Piece]:
    """Pieces of about so many requests, mixture by mixture; what belongs together stays together."""
    groups: dict[Any, list[int]] = {}
    for i in sorted(range(len(requests)), key=lambda i: (rows[i], i)):
        key = together(requests[i])
        groups.setdefault((rows[i], i if key is None else key), []).append(i)
    cut: list[list[int]] = []
    for group in groups.values():
        if not cut or len(cut[-1]) + len(group) > size:
            cut.append([])
        cut[-1] += group
    pieces = []
    for indices in cut:
        used = sorted({rows[i] for i in indices})
        places = tuple(used.index(rows[i]) for i in indices)
        pieces.append(_Piece(method, tuple(indices), tuple(requests[i] for i in indices), tuple(used), places))
    return pieces


def _import_ray() -> ModuleType:
    # Nothing of a run is told to Ray's makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise DependencyError('workers needs Ray, which is not installed: pip install "t2-eval[ray]"') from error
    return ray


_users = 0
_started = False


def _enter(ray: ModuleType, cores: int) -> None:
    """Use Ray as it runs in this process, else connect to the cluster ``RAY_ADDRESS``, else start it on this machine.

    Raises:
        ModelError: it cannot be had.
    """
    global _users, _started
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {} if address else {"num_cpus": cores, "include_dashboard": False}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = f"the cluster RAY_ADDRESS={address}" if address else "Ray on this machine"
            raise ModelError(f"cannot use {where}: {_line(error)}") from error
        _started = True
    _users += 1


def _leave(ray: ModuleType) -> None:
    global _users, _started
    _users -= 1
    if _started and not _users:
        _started = False
        ray.shutdown()


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines and not isinstance(error, T2Error) else str(error)
