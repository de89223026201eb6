"""Results that lm-eval itself wrote, of a tiny model with and without t2."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from lm_eval.loggers import EvaluationTracker

from t2.core.record import ModelRef
from t2.core.results import TaskResult, samples_digests
from t2.harness import discovery
from tests.harness import tiny

TASKS = (tiny.choice_task, tiny.text_task, tiny.rolling_task)
NAMES = ("tiny_choice", "tiny_rolling", "tiny_text")


@dataclass(frozen=True)
class Evaluated:
    """Folders as ``lm_eval --output_path`` makes them.

    Attributes:
        hf: of the plain model.
        expert: of t2 with one expert.
        mixed: of t2 with two experts that a search mixed.
        experts: the folder of the experts' files.
    """

    hf: Path
    expert: Path
    mixed: Path
    experts: Path


def evaluate_all(folder: Path) -> Evaluated:
    """Evaluate a new tiny model on three tasks: by choices, by text, and by perplexity."""
    discovery.install()
    base = tiny.save_model(folder / "tiny")
    engine = tiny.engine_of(base)
    for seed, name in enumerate(("alpha", "beta")):
        tiny.save_expert(folder / f"experts/{name}.safetensors", engine, seed, domain="math")
    made = Evaluated(folder / "hf", folder / "expert", folder / "mixed", folder / "experts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("T2_CACHE_DIR", str(folder / "cache"))
        patch.setenv("T2_EXPERTS_DIR", str(made.experts))
        # lm-eval describes the machine in its results, which takes a second of every evaluation.
        told = {"lm_eval_version": version("lm_eval")}
        patch.setattr("lm_eval.evaluator.add_env_info", lambda storage: storage.update(told))
        evaluate(made.hf, "hf", f"pretrained={base},device=cpu")
        evaluate(made.expert, "t2", f"pretrained={base},device=cpu,adapt=expert,experts=alpha")
        search = "adapt=cem,population=3,generations=2,shots=4,adapt_seed=7"
        evaluate(made.mixed, "t2", f"pretrained={base},device=cpu,experts=alpha+beta,{search}")
    return made


def evaluate(folder: Path, model: str, model_args: str) -> None:
    """What lm-eval's command line does with ``--output_path`` and ``--log_samples``."""
    tracker = EvaluationTracker(output_path=str(folder))
    results = tiny.evaluate(
        model, [task() for task in TASKS], model_args=model_args, evaluation_tracker=tracker, bootstrap_iters=20
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for name in results["configs"]:
        tracker.save_results_samples(task_name=name, samples=samples[name])


def change_json(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the results file of a folder."""
    (file,) = folder.rglob("results_*.json")
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def change_lines(folder: Path, task: str, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change the samples of a task."""
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    change(samples)
    file.write_text("".join(f"{json.dumps(sample)}\n" for sample in samples))


def vary(result: TaskResult, *, wrong: int | None = None, docs: int | None = None, **fields: Any) -> TaskResult:
    """The same task again with something else about it; digests and means follow.

    Args:
        wrong: how many of its samples score 0; the others score 1.
        docs: keep so many samples.
        fields: of the run; with another ``base`` the record is of that too.
    """
    samples = result.samples[:docs]
    if wrong is not None:
        samples = tuple(
            sample.model_copy(update={"scores": dict.fromkeys(sample.scores, float(number >= wrong))})
            for number, sample in enumerate(samples)
        )
    scores = []
    for score in result.run.scores:
        values = [sample.scores[score.key] for sample in samples if score.key in sample.scores]
        if score.aggregation == "mean":
            score = score.model_copy(update={"n": len(values), "score": sum(values) / len(values)})
        scores.append(score)
    docs_digest, prompts_digest, samples_digest = samples_digests(samples)
    record = result.run.record
    if record is not None and "base" in fields and "record" not in fields:
        record = record.model_copy(update={"base": ModelRef(**fields["base"].model_dump())})
    update = {
        "docs": len(samples),
        "docs_digest": docs_digest,
        "prompts_digest": prompts_digest,
        "samples_digest": samples_digest,
        "scores": tuple(scores),
        "record": record,
        **fields,
    }
    return TaskResult(result.run.model_copy(update=update), samples)
