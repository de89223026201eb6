"""Training an expert, from a configuration to files."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import save_expert
from t2.adapters.targets import find_targets, parse_layers
from t2.core.curve import CurvePoint, read_curve
from t2.core.digests import canonical_json, digest_of, sha256_file
from t2.core.errors import ArgumentError, DataError, StorageError, TaskError, TrainingError
from t2.core.files import atomic_write
from t2.core.manifest import Manifest, pack_hashes
from t2.core.settings import experts_dir
from t2.harness.args import check_hf_args
from t2.harness.base import base_id, open_base
from t2.harness.tasks import PromptForm, TaskDocs, load_task
from t2.training.checkpoint import Checkpoint, load_checkpoint
from t2.training.choices import ChoiceProblem
from t2.training.config import TrainConfig
from t2.training.problem import Measured, Problem, Setup
from t2.training.rollouts import GenerationProblem
from t2.training.split import Halves, split_docs
from t2.training.trainer import Parameters, Trainer

EXPERT, CURVE, CONFIG, SCORES, CHECKPOINT = (
    "expert.safetensors",
    "curve.jsonl",
    "config.json",
    "scores.json",
    "checkpoint.safetensors",
)


@dataclass(frozen=True)
class TrainResult:
    """A finished training.

    Attributes:
        path: the expert's file; beside it lie ``curve.jsonl``, ``config.json`` and ``scores.json``.
        digest: hex SHA-256 of the file.
        curve: the points of the curve.
        base_score: the task's metric of the base model on the validation documents.
        best_score: that of the expert.
    """

    path: Path
    digest: str
    curve: list[CurvePoint]
    base_score: float
    best_score: float


def train(
    config: TrainConfig,
    *,
    folder: Path | None = None,
    overwrite: bool = False,
    checkpoint_every: int = 5,
    include_path: Path | None = None,
    lm: HFLM | None = None,
    task: Task | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train an expert on a task; a run that was interrupted under the same configuration goes on where it was.

    While training goes, ``<folder>/<name>.training`` holds the configuration, the curve and the checkpoint; when it
    ends that folder becomes ``<folder>/<name>`` in one rename.

    Args:
        config: what to train.
        folder: where experts lie; None is ``T2_EXPERTS_DIR``.
        overwrite: replace a finished expert of that name, or drop an interrupted run of another configuration.
        checkpoint_every: steps between checkpoints.
        include_path: a folder of further lm-eval tasks.
        lm: the base model when it is already loaded; None loads it by ``config.model_args``.
        task: the task when it is already loaded; None loads it by name.
        progress: show progress bars.

    Raises:
        ArgumentError: the expert exists, an interrupted run differs, or a value does not fit the task or model.
        TaskError: the task is unknown or cannot be trained on.
        TrainingError: the reward is constant, nothing improved, or training diverged.
        StorageError: a file cannot be written.
    """
    home = (folder or experts_dir()).absolute()
    final, working = home / config.name, home / f"{config.name}.training"
    layers = parse_layers(config.layers) if config.layers is not None else None
    check_hf_args(config.model_args, "model_args")
    if (final / EXPERT).exists() and not overwrite:
        raise ArgumentError(
            f"expert {config.name} exists in {final}; give another --name, or --overwrite to replace it"
        )
    with _lock(home, config.name):
        _check_interrupted(working, config, overwrite)
        if (working / EXPERT).exists():
            return _publish(working, final)
        task = task if task is not None else load_task(config.task, include_path=include_path)
        halves = split_docs(task, config.seed, config.train_docs, config.validation_docs)
        labels = _labels(task, halves) if config.kind == "classifier" else ()
        given = lm is not None
        lm = lm if lm is not None else open_base(**config.model_args)
        engine = build_engine(lm, config, given=given)
        ranks = {
            name: target.rank for name, target in find_targets(lm.model, config.targets, layers, config.moe).items()
        }
        problem = build_problem(config, engine, lm, task, halves)
        identity = digest_of([config.digest(), engine.base.fingerprint, str(engine.dtype), halves.digest()])
        checkpoint = _resume(working, config, identity, overwrite)
        if checkpoint is None:
            base = problem.measure(None, "Measuring the base model" if progress else None)
            _check_signal(problem, base, config)
        else:
            base = Measured(checkpoint.progress.base_reward, checkpoint.progress.base_score)
        engine.bases(ranks, progress=progress)
        atomic_write(working / CONFIG, (canonical_json(config.model_dump(mode="json")) + "\n").encode())
        parameters = Parameters(ranks, config.rank)
        trainer = Trainer(
            config,
            identity,
            problem,
            parameters,
            len(halves.train),
            working,
            checkpoint_every=checkpoint_every,
            progress=progress,
        )
        done = trainer.run(base, checkpoint)
        return _finish(done, config, task, engine, parameters, problem.method, labels, halves, working, final)


def build_engine(lm: HFLM, config: TrainConfig, *, given: bool = True) -> TransformersEngine:
    """The engine over a loaded base model.

    Args:
        lm: the base model.
        config: its ``model_args`` name it.
        given: the caller loaded it, so it goes by its own name.
    """
    pretrained = lm.model if given else config.model_args.get("pretrained")
    name = base_id(pretrained, config.model_args.get("gguf_file"))
    batch = lm.batch_size if isinstance(lm.batch_size, int) and lm.batch_size > 1 else 32
    revision = config.model_args.get("revision")
    return TransformersEngine(lm.model, lm.tokenizer, name, revision, batch_size=batch, moe=config.moe)


def build_problem(config: TrainConfig, engine: TransformersEngine, lm: HFLM, task: Task, halves: Halves) -> Problem:
    """What is to be learned from a task's documents.

    Raises:
        ArgumentError: the task has no such metric or filter, or the objective does not suit its answers.
        TaskError: the task's answers cannot be rewarded.
    """
    form = PromptForm(
        num_fewshot=config.num_fewshot,
        system_instruction=config.system_instruction,
        apply_chat_template=config.apply_chat_template,
        gen_kwargs=config.gen_kwargs,
    )
    docs = TaskDocs(task, lm, form, metric=config.metric, filter=config.filter)
    setup = Setup(config, engine, engine.likelihood, docs, halves.train, halves.validation)
    if docs.output_type != "generate_until":
        return ChoiceProblem(setup, exact=config.objective != "reinforce")
    if config.objective == "expected-reward":
        raise ArgumentError(
            f"objective=expected-reward sums over choices, and task {config.task} generates answers; use reinforce"
        )
    return GenerationProblem(setup)


def _check_signal(problem: Problem, base: Measured, config: TrainConfig) -> None:
    if problem.has_signal():
        return
    if base.score <= 0:
        advice = (
            "use an easier task or prompt form (a likelihood form over choices, more --num-fewshot, "
            "--apply-chat-template), another --metric, a larger base model, or more --samples at a --temperature"
        )
    else:
        advice = "use a harder task or another --metric"
    raise TrainingError(
        f"the base model earns the same reward ({base.reward:+g}) for every answer to the validation documents of "
        f"{config.task} (score {base.score:g}), so there is nothing to learn from: {advice}"
    )


@contextlib.contextmanager
def _lock(home: Path, name: str) -> Iterator[None]:
    path = home / f".{name}.lock"
    try:
        home.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; choose another folder for experts"
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ArgumentError(
                f"expert {name} is being trained by another process; wait, or give another --name"
            ) from error
        yield
    finally:
        os.close(handle)


def _check_interrupted(working: Path, config: TrainConfig, overwrite: bool) -> None:
    """Drop what may be dropped of an earlier run, and refuse to touch what may not."""
    if not working.exists():
        return
    try:
        earlier = json.loads((working / CONFIG).read_bytes())
    except (OSError, ValueError):
        earlier = None
    wanted = config.model_dump(mode="json")
    if earlier == wanted:
        return
    if isinstance(earlier, dict) and not overwrite and ((working / CHECKPOINT).exists() or (working / EXPERT).exists()):
        changed = [key for key in wanted if earlier.get(key) != wanted[key]]
        shown = ", ".join(f"{key} was {earlier.get(key)!r} and is {wanted[key]!r}" for key in changed[:3])
        raise ArgumentError(
            f"an interrupted training of {config.name} in {working} had another configuration ({shown}); "
            "give the same options to go on with it, --overwrite to drop it, or another --name"
        )
    _remove(working)


def _resume(working: Path, config: TrainConfig, identity: str, overwrite: bool) -> Checkpoint | None:
    path = working / CHECKPOINT
    checkpoint = load_checkpoint(path) if path.exists() and not (overwrite and not _readable(path)) else None
    if checkpoint is not None and checkpoint.progress.config != identity:
        if not overwrite:
            raise ArgumentError(
                f"an interrupted training of {config.name} in {working} had the same options on another base model, "
                "dtype or set of documents; restore those to go on with it, or give --overwrite to drop it"
            )
        checkpoint = None
    keep = checkpoint.progress.points if checkpoint is not None else 0
    if (working / CURVE).exists():
        points = read_curve(working / CURVE)
        if len(points) < keep:
            raise DataError(f"{working / CURVE} has lost points; start again with --overwrite")
        lines = [canonical_json(point.model_dump(mode="json")) + "\n" for point in points[:keep]]
        atomic_write(working / CURVE, "".join(lines).encode())
    return checkpoint


def _readable(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except DataError:
        return False
    return True


def _finish(
    done: Checkpoint,
    config: TrainConfig,
    task: Task,
    engine: TransformersEngine,
    parameters: Parameters,
    method: str,
    labels: tuple[str, ...],
    halves: Halves,
    working: Path,
    final: Path,
) -> TrainResult:
    state = done.progress
    if state.best_step == 0:
        (working / CHECKPOINT).unlink(missing_ok=True)
        raise TrainingError(
            f"no validation measurement of {config.name} beat the base model's score of {state.base_score:g} in "
            f"{state.step} steps, so no expert was written (the curve is {working / CURVE}); try more --steps, another "
            "--learning-rate, a larger --clip, or more documents"
        )
    manifest = Manifest(
        kind=config.kind,
        name=config.name,
        base=engine.base,
        targets=parameters.ranks,
        task=config.task,
        domain=config.domain or _domain(task),
        method=method,
        training=config.model_dump(mode="json"),
        training_docs=pack_hashes([*halves.train_hashes, *halves.validation_hashes]),
        labels=labels,
    )
    scores = {
        "base_reward": state.base_reward,
        "base_score": state.base_score,
        "best_reward": state.best_reward,
        "best_score": state.best_score,
        "best_step": state.best_step,
        "seconds": round(state.seconds, 1),
        "steps": state.step,
        "train_docs": len(halves.train),
        "validation_docs": len(halves.validation),
    }
    atomic_write(working / SCORES, (json.dumps(scores, indent=2) + "\n").encode())
    save_expert(working / EXPERT, manifest, parameters.z(done.best_theta))
    return _publish(working, final)


def _labels(task: Any, halves: Halves) -> tuple[str, ...]:
    """The domains that a classifier learns to name: the choices, which every document shares."""
    offered = (
        {tuple(map(str, task.doc_to_choice(doc))) for doc in (*halves.train, *halves.validation)}
        if task.OUTPUT_TYPE == "multiple_choice"
        else set()
    )
    if len(offered) != 1:
        raise TaskError(
            f"task {task.task_name} cannot train a classifier, which needs one set of choices, the domains, for every "
            "document; take t2_domains or a task like it, or --kind expert"
        )
    return next(iter(offered))


def _domain(task: Task) -> str | None:
    metadata: Any = task.config.metadata
    own = metadata.get("t2") if isinstance(metadata, Mapping) else None
    domain = own.get("domain") if isinstance(own, Mapping) else None
    return str(domain) if domain is not None else None


def _publish(working: Path, final: Path) -> TrainResult:
    """Make a working folder that holds a finished expert the expert's folder."""
    scores = json.loads((working / SCORES).read_bytes())
    aside = final.with_name(f"{final.name}.replaced")
    try:
        (working / CHECKPOINT).unlink(missing_ok=True)
        _remove(aside)
        if final.exists():
            final.rename(aside)
        working.rename(final)
    except OSError as error:
        raise StorageError(f"cannot move {working} to {final}: {error.strerror or error}") from error
    _remove(aside)
    return TrainResult(
        final / EXPERT,
        sha256_file(final / EXPERT),
        read_curve(final / CURVE),
        float(scores["base_score"]),
        float(scores["best_score"]),
    )


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
