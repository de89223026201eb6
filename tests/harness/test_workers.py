from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from t2.adapters.engine import GenerateRequest, ScoreRequest
from t2.adapters.engine.pool import PooledEngine, Turns, Workers
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z
from t2.core.errors import ArgumentError, ModelError
from t2.harness.model import T2LM
from tests.harness import tiny
from tests.harness.light import DEADLY, FAULTY, Spec, Unbuildable


@pytest.fixture(scope="module")
def spec(tiny_folder: Path) -> Spec:
    return Spec(str(tiny_folder))


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Any]:
    """Ray, started once for all tests of this file."""
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def pooled(ray_here: Any, tiny_engine: TransformersEngine, spec: Spec) -> Iterator[PooledEngine]:
    """Two workers."""
    workers = Workers(spec, 2, tiny_engine.base)
    yield PooledEngine(tiny_engine, workers, 4)
    workers.close()


def mixtures(engine: TransformersEngine, count: int) -> list[Z | None]:
    random = torch.Generator().manual_seed(0)
    ranks = engine.ranks().items()
    return [None, *({name: 1 + 0.3 * torch.randn(r, generator=random) for name, r in ranks} for _ in range(count - 1))]


def prompts(count: int, **changes: Any) -> list[GenerateRequest]:
    return [GenerateRequest((10 + i, 20, 30 + i % 7, 40), 12, **changes) for i in range(count)]


def processes() -> list[int]:
    """The processes of workers."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                if (folder / "cmdline").read_bytes().startswith(b"ray::_Worker"):
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def test_workers_answer_as_the_engine_at_home(pooled: PooledEngine, tiny_engine: TransformersEngine) -> None:
    several = mixtures(tiny_engine, 5)
    asked = prompts(30)
    rows = [i % 5 for i in range(30)]
    assert pooled.generate(asked, several, rows) == tiny_engine.generate(asked, several, rows)
    scored = [ScoreRequest((10 + i // 3, 20), (30 + i % 3, 41)) for i in range(30)]
    theirs, ours = pooled.score(scored, several, rows), tiny_engine.score(scored, several, rows)
    assert [one.greedy for one in theirs] == [one.greedy for one in ours]
    assert [one.loglikelihood for one in theirs] == pytest.approx([one.loglikelihood for one in ours], abs=1e-3)


def test_a_mixture_that_is_applied_reaches_the_workers(pooled: PooledEngine, tiny_engine: TransformersEngine) -> None:
    z = mixtures(tiny_engine, 2)[1]
    asked = prompts(6)
    with pooled.applied(z):
        adapted = pooled.generate(asked)
    assert adapted == tiny_engine.generate(asked, [z])
    assert pooled.generate(asked) == tiny_engine.generate(asked) != adapted


def test_the_number_of_workers_changes_no_answer(
    ray_here: Any, pooled: PooledEngine, tiny_engine: TransformersEngine, spec: Spec
) -> None:
    asked = prompts(20, kwargs={"do_sample": True, "temperature": 1.0})
    several, rows = mixtures(tiny_engine, 3), [i % 3 for i in range(20)]
    workers = Workers(spec, 1, tiny_engine.base)
    try:
        one = PooledEngine(tiny_engine, workers, 4).generate(asked, several, rows, seed=5)
    finally:
        workers.close()
    assert one == pooled.generate(asked, several, rows, seed=5)
    assert one != pooled.generate(asked, several, rows, seed=6)


def test_the_work_of_a_killed_worker_is_done_again(
    pooled: PooledEngine, tiny_engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    several, rows = mixtures(tiny_engine, 4), [i % 4 for i in range(60)]
    asked = prompts(60)
    lost = pooled.workers.lost
    pooled.workers.losses()
    killed: list[int] = []
    original = pooled.workers.run

    def run(pieces: Any, z: Any, done: Any) -> list[Any]:
        def and_kill(count: int) -> None:
            done(count)
            if not killed:
                killed.append(processes()[0])
                os.kill(killed[0], signal.SIGKILL)

        return original(pieces, z, and_kill)

    monkeypatch.setattr(pooled.workers, "run", run)
    answers = pooled.generate(asked, several, rows)
    assert answers == tiny_engine.generate(asked, several, rows)
    assert killed
    # The killed one may have been idle; then the next call finds it dead.
    assert pooled.generate(asked, several, rows) == answers
    assert pooled.workers.lost == lost + 1
    told = str(pooled.workers.losses())
    assert told.startswith("1 worker was lost and replaced (")
    assert "\n" not in told
    assert pooled.workers.losses() is None


def test_work_that_kills_every_worker_is_given_up(pooled: PooledEngine, tiny_engine: TransformersEngine) -> None:
    with pytest.raises(ModelError, match="3 workers died over the same work"):
        pooled.generate([GenerateRequest((DEADLY,), 2)])
    asked = prompts(9)
    assert pooled.generate(asked) == tiny_engine.generate(asked)


def test_what_an_engine_refuses_is_told_in_its_own_words(pooled: PooledEngine) -> None:
    with pytest.raises(ArgumentError, match=r"^faulty: ask something else$"):
        pooled.generate([*prompts(9), GenerateRequest((FAULTY,), 2)])
    assert len(pooled.generate(prompts(9))) == 9


def test_a_worker_that_cannot_load_is_told(ray_here: Any, tiny_engine: TransformersEngine) -> None:
    with pytest.raises(ModelError, match=r"^a worker cannot load the model: nowhere: there is no such folder$"):
        Workers(Unbuildable(), 1, tiny_engine.base)


def test_a_worker_with_other_weights_is_refused(ray_here: Any, tiny_engine: TransformersEngine, spec: Spec) -> None:
    with pytest.raises(ModelError, match="other weights"):
        Workers(spec, 1, tiny_engine.base.model_copy(update={"fingerprint": "0" * 64}))


def test_searches_of_several_tasks_are_those_without_workers(
    ray_here: Any, tiny_folder: Path, experts: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = []
    for workers in ({}, {"workers": 2}):
        monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / f"cache {workers}"))
        lm = T2LM(
            pretrained=str(tiny_folder),
            device="cpu",
            adapt="cem",
            experts=experts,
            shots=4,
            population=4,
            generations=3,
            **workers,
        )
        results = tiny.evaluate(lm, [tiny.choice_task(), tiny.text_task()])
        found.append(
            (
                [(record.task, record.mixtures, record.held_out, record.note) for record in lm.records],
                [sample["filtered_resps"] for sample in results["samples"]["tiny_text"]],
            )
        )
        assert lm._runtime is not None
        if lm._runtime.pool is not None:
            lm._runtime.pool.workers.close()
    assert found[0] == found[1]


def test_turns_overlap_where_they_wait_and_nowhere_else() -> None:
    turns, other, running = Turns(), threading.Event(), []

    def waits() -> int:
        running.append(1)
        with turns.waiting():
            assert other.wait(30)
        running.append(1)
        time.sleep(0.01)
        assert running.pop() == 1
        return 1

    def is_waited_for() -> int:
        # Whoever waits has left its turn to this one.
        other.set()
        assert running in ([], [1])
        return 2

    assert turns.run([waits, is_waited_for]) == [1, 2]


def test_the_first_failure_of_several_jobs_is_told() -> None:
    def fails() -> int:
        raise ArgumentError("first")

    with pytest.raises(ArgumentError, match="first"):
        Turns().run([fails, lambda: 2])


def test_ctrl_c_leaves_no_process(tiny_folder: Path) -> None:
    script = f"""
        import sys
        from t2.adapters.engine import GenerateRequest
        from t2.adapters.engine.pool import PooledEngine, Workers
        from tests.harness.light import Spec
        spec = Spec({str(tiny_folder)!r})
        home = spec()
        pooled = PooledEngine(home, Workers(spec, 2, home.base), 4)
        print("ready", flush=True)
        while True:
            pooled.generate([GenerateRequest((10 + i,), 400) for i in range(40)])
    """
    mark = f"T2_TEST_MARK={os.urandom(8).hex()}"
    environment = os.environ | dict([mark.split("=")])
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in error
    for _ in range(100):
        if not marked(mark):
            return
        time.sleep(0.1)
    raise AssertionError(f"left behind: {marked(mark)}")


def marked(mark: str) -> list[str]:
    """Processes with a variable in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_bytes().decode(errors="replace")[:200])
            except OSError:
                continue
    return found
