"""Memory and engines: a step that runs out of memory goes on with the same gradient, and any engine gives rollouts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from t2.adapters.engine.base import Generated
from t2.adapters.engine.likelihood import Branches
from t2.adapters.expert import Z
from t2.core.errors import ArgumentError, TrainingError
from t2.core.manifest import BaseModelRef
from t2.training.api import build_problem, train
from t2.training.config import make_config
from t2.training.methods import build_engine
from t2.training.split import split_docs
from tests.harness import tiny
from tests.training import planted
from tests.training.test_gradients import gradient, problem_of, random_z

KINDS: dict[str, dict[str, Any]] = {
    "choices": {"kl": 0.1},
    "sampled": {"objective": "reinforce", "samples": 2},
    "next-token": {"objective": "next-token", "kl": 0.1},
    "texts": {"samples": 2, "kl": 0.1},
}


def problem_kind(lm: HFLM, kind: str, **values: Any) -> Any:
    task: ConfigurableTask = planted.texts() if kind == "texts" else planted.choices()
    problem = problem_of(lm, task, **{**KINDS[kind], **values})
    assert problem.setup.model.packs(Branches((1, 2, 3), ((4, 5), (6,))))
    return problem


class Memory:
    """A device on which a pass of more than so many input tokens, padding included, runs out of memory."""

    def __init__(self, model: torch.nn.Module, tokens: int, where: str = "forward") -> None:
        self.tokens = tokens
        self.failed = 0
        self._where = where
        self._size = 0
        self._handle = model.register_forward_pre_hook(self._before, with_kwargs=True)
        layer = next(module for name, module in model.named_modules() if name.endswith(".0"))
        self._inner = layer.register_forward_hook(self._after)

    def _before(self, _: torch.nn.Module, args: Any, kwargs: Any) -> None:
        self._size = kwargs["input_ids"].numel()
        if self._where == "forward" and self._size > self.tokens:
            self._fail()

    def _after(self, _: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        # The backward pass of later layers has been by then: a part of the gradient is there.
        if self._where == "backward" and output.requires_grad and self._size > self.tokens:
            output.register_hook(lambda _: self._fail())

    def _fail(self) -> None:
        self.failed += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def close(self) -> None:
        self._handle.remove()
        self._inner.remove()


@contextlib.contextmanager
def memory(lm: HFLM, tokens: int, where: str = "forward") -> Iterator[Memory]:
    device = Memory(lm.model, tokens, where)
    try:
        yield device
    finally:
        device.close()


@pytest.mark.parametrize(
    ("kind", "where"), [("choices", "backward"), *((kind, "forward") for kind in sorted(KINDS) if kind != "choices")]
)
def test_out_of_memory_makes_passes_smaller_and_keeps_the_gradient(
    tiny_lm: HFLM, kind: str, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = list(range(6))
    problem = problem_kind(tiny_lm, kind)
    z = random_z(problem)
    expected, measured = gradient(problem, z, docs)
    if kind == "texts":  # only the passes, not the answers themselves, run out of memory
        rollouts = problem._answer
        made: dict[int, Any] = {}

        def answer(*args: Any) -> Any:
            return made[0] if made else made.setdefault(0, rollouts(*args))

        problem._answer = answer
        gradient(problem, z, docs)
    with memory(tiny_lm, 40, where) as device:
        found, again = gradient(problem, z, docs)
        assert device.failed > 0
        failed = device.failed
        gradient(problem, z, docs)
        assert device.failed == failed, "the next step begins with passes that fit"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
    assert again.reward == pytest.approx(measured.reward, abs=1e-5)
    assert again.score == measured.score
    assert "ran out of memory; going on with micro_tokens=" in capsys.readouterr().err


def test_validation_goes_on_after_running_out_of_memory(tiny_lm: HFLM) -> None:
    problem = problem_kind(tiny_lm, "choices")
    expected = problem.measure(None)
    with memory(tiny_lm, 40) as device:
        found = problem.measure(None)
    assert device.failed > 0
    assert found.reward == pytest.approx(expected.reward, abs=1e-6)
    assert found.score == expected.score


def test_a_document_that_does_not_fit_is_checkpointed_and_then_refused(
    tiny_lm: HFLM, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = problem_kind(tiny_lm, "choices")
    with memory(tiny_lm, 3) as device, pytest.raises(TrainingError, match=r"one document of \d+ tokens does not fit"):
        gradient(problem, random_z(problem), [0, 1])
    assert device.failed > 2
    assert problem.setup.passes.checkpointing == "on"
    assert "going on with gradient checkpointing" in capsys.readouterr().err
    off = problem_kind(tiny_lm, "choices")
    off.setup.passes.checkpointing = "off"
    with memory(tiny_lm, 3), pytest.raises(TrainingError, match="use --checkpointing on"):
        gradient(off, random_z(off), [0, 1])


def test_other_errors_are_not_taken_for_memory(tiny_lm: HFLM) -> None:
    problem = problem_kind(tiny_lm, "choices")
    with pytest.raises(RuntimeError, match="another thing"):
        list(problem.setup.passes.run([problem._training_docs([0])[0].unit], lambda _: other()))


def other() -> None:
    raise RuntimeError("another thing")


@pytest.mark.parametrize("kind", ["choices", "texts"])
def test_checkpointing_gives_the_same_step(tiny_lm: HFLM, kind: str) -> None:
    found = []
    for checkpointing in ("off", "on"):
        problem = problem_kind(tiny_lm, kind)
        problem.setup.passes.checkpointing = checkpointing
        found.append(gradient(problem, random_z(problem), [0, 1, 2])[0])
    assert torch.equal(*found)


def test_checkpointing_gives_the_same_expert(tiny_lm: HFLM, tmp_path: Any) -> None:
    digests = set()
    for checkpointing in ("off", "on"):
        task = planted.choices()
        config = make_config(
            task=str(task.task_name), name="letters", steps=2, batch=4, clip=1.0, learning_rate=5e-2, validate_every=1
        )
        folder = tmp_path / checkpointing
        result = train(config, folder=folder, lm=tiny_lm, task=task, progress=False, checkpointing=checkpointing)
        digests.add(result.digest)
    assert len(digests) == 1
    with pytest.raises(ArgumentError, match="checkpointing=onn is not one of auto, on, off; did you mean 'on'"):
        train(config, folder=tmp_path, lm=tiny_lm, task=task, checkpointing=cast(Any, "onn"))


class Other:
    """An engine that keeps to the protocol alone, over the same base model, and counts what it is asked."""

    supports_rows = False

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.base: BaseModelRef = engine.base
        self.asked = 0

    def applied(self, z: Z | None) -> contextlib.AbstractContextManager[None]:
        context: contextlib.AbstractContextManager[None] = self._engine.applied(z)
        return context

    def generate(self, requests: Any, *args: Any, **kwargs: Any) -> list[Generated]:
        self.asked += len(requests)
        found: list[Generated] = self._engine.generate(requests, *args, **kwargs)
        return found


def test_rollouts_come_from_any_engine_over_the_same_base(tiny_lm: HFLM, tmp_path: Any) -> None:
    task = planted.texts()
    config = make_config(task=str(task.task_name), name="x", samples=2)
    engine = build_engine(tiny_lm, config)
    other_engine: Any = Other(engine)
    problem: Any = build_problem(config, engine, tiny_lm, task, split_docs(task, 0), rollouts=other_engine)
    own = problem_of(tiny_lm, task, samples=2)
    z = random_z(own)
    assert torch.equal(gradient(problem, z, [0, 1])[0], gradient(own, z, [0, 1])[0])
    assert other_engine.asked == 4
    problem.measure(None)
    assert other_engine.asked > 4
    strange = tiny.engine_of(tiny.save_model(tmp_path / "strange", seed=9))
    with pytest.raises(ArgumentError, match="load the same base model into both"):
        build_problem(config, engine, tiny_lm, task, split_docs(task, 0), rollouts=strange)
