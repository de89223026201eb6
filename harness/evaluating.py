"""One run of lm-eval from a program: as its command line would do it, and written as that writes it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.evaluator
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from pydantic import BaseModel, ConfigDict

from t2.core.errors import ArgumentError, StorageError

SEEDS = (0, 1234, 1234, 1234)
"""Those of lm-eval's command line."""


class RunForm(BaseModel):
    """How lm-eval runs tasks: options of its command line, by their names.

    Attributes:
        limit: the first so many documents, or a share below 1; None is all.
        num_fewshot: None keeps the task's own.
        apply_chat_template: use the model's chat template.
        system_instruction: a system message.
        gen_kwargs: over the tasks' own.
        batch_size: of lm-eval's model.
        device: of lm-eval's model.
        include_path: a folder of further tasks.
        seed: of Python, NumPy, PyTorch and the drawing of few-shot examples.
        confirm_run_unsafe_code: run what the model writes, where a task does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    limit: float | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    gen_kwargs: dict[str, Any] = {}
    batch_size: int | str = 1
    device: str | None = None
    include_path: str | None = None
    seed: tuple[int | None, int | None, int | None, int | None] = SEEDS
    confirm_run_unsafe_code: bool = False

    def base_args(self) -> dict[str, Any]:
        """What lm-eval's command line hands to a model beside its model_args."""
        given = {"batch_size": self.batch_size, "device": self.device}
        return {name: value for name, value in given.items() if value is not None}

    def command(self, model_args: Mapping[str, Any], task: str, output: str | None = None) -> str:
        """The command line of lm-eval that does the same."""
        options: list[tuple[str, Any]] = [("--model", "t2"), ("--model_args", written(model_args)), ("--tasks", task)]
        options += [
            ("--limit", None if self.limit is None else f"{self.limit:g}"),
            ("--num_fewshot", self.num_fewshot),
            ("--system_instruction", self.system_instruction),
            ("--gen_kwargs", written(self.gen_kwargs) or None),
            ("--batch_size", self.batch_size),
            ("--device", self.device),
            ("--include_path", self.include_path),
            ("--seed", None if self.seed == SEEDS else ",".join(map(str, self.seed))),
            ("--output_path", output),
        ]
        words = ["lm_eval", *(word for name, value in options if value is not None for word in (name, str(value)))]
        words += ["--log_samples"] if output is not None else []
        words += ["--apply_chat_template"] if self.apply_chat_template else []
        words += ["--confirm_run_unsafe_code"] if self.confirm_run_unsafe_code else []
        return shlex.join(words)


def written(args: Mapping[str, Any]) -> str:
    """Arguments as ``key=value,…``, as ``--model_args`` takes them."""
    return ",".join(f"{name}={value}" for name, value in args.items())


def check_consent(task: Task, form: RunForm) -> None:
    """Refuse a task that runs what the model writes, where nobody agreed to that.

    Raises:
        ArgumentError: nobody did.
    """
    if getattr(task, "UNSAFE_CODE", False) and not form.confirm_run_unsafe_code:
        raise ArgumentError(
            f"task {task.task_name} runs programs that the model writes; agree with --confirm-run-unsafe-code, or "
            "leave it out"
        )


def evaluate_tasks(
    lm: LM, tasks: Sequence[Task], form: RunForm, model_args: Mapping[str, Any]
) -> tuple[EvaluationTracker, dict[str, Any]]:
    """Let lm-eval score tasks, as ``lm_eval --model t2`` would.

    Args:
        lm: the model.
        tasks: freshly loaded.
        form: how they are run.
        model_args: what made the model, for the results.

    Returns:
        What writes the results, see :func:`write_results`, and the results with their samples.
    """
    python, numpy, torch, fewshot = form.seed
    flags = {
        "num_fewshot": form.num_fewshot,
        "batch_size": form.batch_size,
        "device": form.device,
        "limit": form.limit,
        "gen_kwargs": dict(form.gen_kwargs) or None,
        "system_instruction": form.system_instruction,
        "apply_chat_template": form.apply_chat_template,
        "fewshot_as_multiturn": form.apply_chat_template,
        "random_seed": python,
        "numpy_random_seed": numpy,
        "torch_random_seed": torch,
        "fewshot_random_seed": fewshot,
        "confirm_run_unsafe_code": form.confirm_run_unsafe_code,
    }
    return call_lm_eval(lm, tasks, flags, model_args)


def call_lm_eval(
    lm: LM, tasks: Sequence[Task], flags: Mapping[str, Any], model_args: Mapping[str, Any], model: str = "t2"
) -> tuple[EvaluationTracker, dict[str, Any]]:
    """Call lm-eval's ``simple_evaluate`` on a loaded model, with samples.

    Args:
        lm: the model.
        tasks: freshly loaded.
        flags: further arguments of ``simple_evaluate``.
        model_args: the arguments that the model was loaded with, for the results.
        model: lm-eval's name of the model, for the results.

    Returns:
        See :func:`evaluate_tasks`.
    """
    tracker = EvaluationTracker()
    results = lm_eval.evaluator.simple_evaluate(
        lm,
        model_args=dict(model_args),
        tasks=list(tasks),
        task_manager=TaskManager(include_defaults=False),
        evaluation_tracker=tracker,
        log_samples=True,
        **flags,
    )
    assert results is not None
    results["config"]["model"] = model
    return tracker, dict(results)


def write_results(tracker: EvaluationTracker, results: Mapping[str, Any], folder: Path) -> tuple[Path, dict[str, Path]]:
    """Write results and samples as lm-eval's ``--output_path`` and ``--log_samples`` do.

    Returns:
        The file of the results, and those of the samples by task.

    Raises:
        StorageError: they cannot be written.
    """
    own = dict(results)
    samples = own.pop("samples")
    tracker.output_path = str(folder / "results.json")
    # lm-eval goes on with a log line where a file cannot be written.
    tracker.save_results_aggregated(results=own, samples=samples)
    for name, rows in samples.items():
        tracker.save_results_samples(task_name=name, samples=rows)
    aggregated = [*folder.glob("results_*.json")]
    files = {name: folder / f"samples_{name}_{tracker.date_id}.jsonl" for name in samples if aggregated}
    if not aggregated or not all(path.is_file() for path in files.values()):
        raise StorageError(f"cannot write lm-eval's results into {folder}; free space or choose another folder")
    return aggregated[0], files
