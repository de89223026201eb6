"""The flags of a run of lm-eval, read back from the results it wrote.

:data:`HELD`, :data:`PER_TASK`, :data:`FROM_USER` and :data:`NO_EFFECT` together name every argument of
``lm_eval.simple_evaluate`` and every option of its command line, once each. A test compares them with both, so that an
option of a newer lm-eval is classified before this package allows that version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RunResults:
    """Results of lm-eval with what the files of samples add.

    Attributes:
        content: the results file.
        doc_ids: the documents of each task in the order of the samples.
    """

    content: Mapping[str, Any]
    doc_ids: Mapping[str, Sequence[int]]

    @property
    def config(self) -> Mapping[str, Any]:
        """The model and the flags, as ``simple_evaluate`` writes them."""
        config: Mapping[str, Any] = self.content["config"]
        return config


def _read_samples(results: RunResults) -> dict[str, list[int]] | None:
    """Documents that ``--samples`` chose. lm-eval writes no such flag; only the documents' numbers tell it."""
    if results.config["limit"] is not None:
        return None
    totals = {task: count["original"] for task, count in results.content["n-samples"].items()}
    chosen = {task: list(ids) for task, ids in results.doc_ids.items() if list(ids) != list(range(totals[task]))}
    for task, ids in chosen.items():
        if len(set(ids)) < len(ids):
            raise ValueError(f"--samples named a document of {task} twice, and lm-eval then writes wrong numbers")
    return chosen or None


def _read_predict_only(results: RunResults) -> bool:
    # The marks that lm-eval's Task.override_metric leaves; a task whose own metric is bypass has no such function.
    return any(
        config.get("metric_list") == [{"metric": "bypass"}] and config.get("process_results") == "process_results"
        for config in results.content["configs"].values()
    )


def _read_batch_size(results: RunResults) -> int | str | None:
    """The batch size; where ``auto`` settled on a single one for all requests, that one."""
    size: int | str | None = results.config["batch_size"]
    settled = set(results.config.get("batch_sizes") or ())
    generates = any(config.get("output_type") == "generate_until" for config in results.content["configs"].values())
    if isinstance(size, str) and size.startswith("auto") and len(settled) == 1 and not generates:
        return int(settled.pop())
    return size


def _config(name: str) -> Callable[[RunResults], Any]:
    return lambda results: results.config[name]


def _top(name: str) -> Callable[[RunResults], Any]:
    return lambda results: results.content[name]


HELD: dict[str, Callable[[RunResults], Any]] = {
    "batch_size": _read_batch_size,
    "device": _config("device"),
    "limit": _config("limit"),
    "samples": _read_samples,
    "bootstrap_iters": _config("bootstrap_iters"),
    "gen_kwargs": _config("gen_kwargs"),
    "predict_only": _read_predict_only,
    "system_instruction": _top("system_instruction"),
    "fewshot_as_multiturn": _top("fewshot_as_multiturn"),
    "random_seed": _config("random_seed"),
    "numpy_random_seed": _config("numpy_seed"),
    "torch_random_seed": _config("torch_seed"),
    "fewshot_random_seed": _config("fewshot_seed"),
}
"""Arguments of ``simple_evaluate`` → how results say them. Raises KeyError where they do not, ValueError where the
value cannot be told."""

PER_TASK: dict[str, str] = {
    "tasks": "the tasks of n-samples, by the groups of group_subtasks",
    "task_manager": "loads them",
    "num_fewshot": "configs[task].num_fewshot, whether flag or task set it",
    "metadata": "configs[task].metadata",
    "model": "config.model",
    "model_args": "config.model_args",
    "trust_remote_code": "in model_args",
    "apply_chat_template": "chat_template is the template's text; its name is looked up in the tokenizer",
    "seed": "the four seeds",
}
"""Arguments that results hold in another form, and where."""

FROM_USER: dict[str, str] = {
    "include_path": "t2 rerun --include-path",
    "confirm_run_unsafe_code": "t2 rerun --confirm-run-unsafe-code",
}
"""Arguments that results do not hold and that the user gives again."""

NO_EFFECT: dict[str, str] = {
    "max_batch_size": "bounds what batch_size=auto finds",
    "use_cache": "holds answers of the same model; a rerun asks again",
    "cache_requests": "holds requests that the task builds again",
    "rewrite_requests_cache": "as cache_requests",
    "delete_requests_cache": "as cache_requests",
    "check_integrity": "tests the task",
    "write_out": "prints",
    "log_samples": "always on",
    "evaluation_tracker": "writes the results",
    "verbosity": "log lines",
    "config": "a file of the other options",
    "output_path": "where results are written",
    "show_config": "prints",
    "hf_hub_log_args": "where results are sent",
    "wandb_args": "where results are sent",
    "wandb_config_args": "where results are sent",
    "trackio_args": "where results are sent",
}
"""Arguments that do not change a sample."""
