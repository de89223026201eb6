"""The one place that touches lm-eval's internals: how t2 gets to see the tasks that lm-eval runs.

A model of lm-eval sees requests only. ``simple_evaluate`` builds the model, applies all overrides to the tasks, and
then calls the global ``lm_eval.evaluator.evaluate``; that function is wrapped when a t2 model is built, so that the
model gets the final tasks and flags before any request. lm-eval's tracker, which names the results, logs the arguments
just before that call; it gets the model's own name for the results.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import lm_eval.evaluator
from lm_eval.api.task import Task
from lm_eval.evaluator_utils import _handle_back_comp
from lm_eval.loggers.evaluation_tracker import GeneralConfigTracker
from lm_eval.utils import sanitize_model_name

from t2.core.errors import DependencyError
from t2.harness.tasks import PromptForm

OLDEST, NEWEST = (0, 4, 13), (0, 5)
_logged: list[GeneralConfigTracker] = []
"""Tracker of the evaluation that is about to begin, if any."""


@dataclass(frozen=True)
class Evaluation:
    """What lm-eval is about to run.

    Attributes:
        tasks: the final task objects, by name.
        samples: positions of the docs to score, by task; absent tasks score all.
        form: how prompts are built; the rest of it is already in the tasks.
        caches_requests: requests may come from an older run's cache.
    """

    tasks: Mapping[str, Task]
    samples: Mapping[str, Collection[int]]
    form: PromptForm
    caches_requests: bool = False


@runtime_checkable
class Watching(Protocol):
    """A model that wants to be told what is evaluated."""

    def evaluation(self, evaluation: Evaluation) -> AbstractContextManager[dict[str, Any]]:
        """Context around lm-eval's run; yields arguments of ``evaluate`` to override."""
        ...

    def results_name(self, own: str) -> str:
        """Return the name of the results and of their folder, given lm-eval's name."""
        ...


def check_version() -> None:
    """Refuse versions of lm-eval whose internals are not known to be as this module expects.

    Raises:
        DependencyError: the installed version is another one.
    """
    text = importlib.metadata.version("lm_eval")
    numbers = tuple(int(part) for part in text.split(".")[:3] if part.isdigit())
    if not OLDEST <= numbers < NEWEST:
        raise DependencyError(f'lm-eval {text} is not supported by this t2; run: pip install "lm-eval>=0.4.13,<0.5"')


def watch() -> None:
    """Wrap ``lm_eval.evaluator.evaluate``; safe to call again.

    Raises:
        DependencyError: lm-eval's version is not supported.
    """
    check_version()
    original = lm_eval.evaluator.evaluate
    if getattr(original, "_t2", False):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        model = given["lm"]
        model = vars(model).get("lm", model)  # CachingLM holds the model under that name
        tracker = _logged.pop() if _logged else None
        if not isinstance(model, Watching):
            return original(*args, **kwargs)
        tasks = given["task_dict"].get("tasks") or _handle_back_comp(given["task_dict"])[1]
        evaluation = Evaluation(
            tasks=dict(tasks),
            samples=given["samples"] or {},
            form=PromptForm(
                system_instruction=given["system_instruction"],
                apply_chat_template=given["apply_chat_template"],
                fewshot_as_multiturn=bool(given["fewshot_as_multiturn"]),
            ),
            caches_requests=bool(given["cache_requests"]),
        )
        if tracker is not None:
            tracker.model_name = model.results_name(str(tracker.model_name))
            tracker.model_name_sanitized = sanitize_model_name(tracker.model_name)
        with model.evaluation(evaluation) as overrides:
            given.update(overrides)
            return original(*bound.args, **bound.kwargs)

    evaluate._t2 = True  # type: ignore[attr-defined]
    lm_eval.evaluator.evaluate = evaluate
    log = GeneralConfigTracker.log_experiment_args

    @functools.wraps(log)
    def log_experiment_args(self: GeneralConfigTracker, *args: Any, **kwargs: Any) -> None:
        log(self, *args, **kwargs)
        _logged[:] = [self]

    GeneralConfigTracker.log_experiment_args = log_experiment_args


@contextlib.contextmanager
def described_once() -> Iterator[None]:
    """Inside, lm-eval describes the machine once, which takes a second, and not for each of several results."""
    describe = lm_eval.evaluator.add_env_info
    known: dict[str, Any] = {}

    def add(storage: dict[str, Any]) -> None:
        if not known:
            describe(known)
        storage.update(known)

    lm_eval.evaluator.add_env_info = add
    try:
        yield
    finally:
        lm_eval.evaluator.add_env_info = describe


def in_command_line() -> bool:
    """Whether lm-eval's own command line is running us (console script, ``python -m`` or ``t2 eval``)."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "cli_evaluate" and frame.f_globals.get("__name__") in (
            "__main__",
            "lm_eval.__main__",
        ):
            return True
        frame = frame.f_back
    return False
