"""Training an expert, from a configuration to files."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM

from t2.adapters.engine.base import Engine
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.targets import parse_layers
from t2.core.curve import CurvePoint
from t2.core.errors import ArgumentError, StorageError, TaskError, nearest
from t2.core.settings import experts_dir
from t2.harness.adaptation import SPARE
from t2.harness.args import check_hf_args
from t2.harness.base import open_base
from t2.harness.generation import LENGTHS, requested_length
from t2.harness.identity import identity_of
from t2.harness.pool import find_pool
from t2.harness.tasks import PromptForm, TaskDocs, load_task
from t2.training import folders
from t2.training.choices import ChoiceProblem
from t2.training.config import CHECKPOINTING, CheckpointingName, TrainConfig
from t2.training.methods import build_engine, build_method
from t2.training.next_token import NextTokenProblem
from t2.training.passes import Passes
from t2.training.problem import Problem, Setup
from t2.training.rollouts import GenerationProblem
from t2.training.runs import Workplace, run_one, run_sweep
from t2.training.split import Halves, draw_shots, split_docs
from t2.training.tracking import Tracking


@dataclass(frozen=True)
class TrainResult:
    """A finished training.

    Attributes:
        path: the expert's file, or the adapter's weights; beside it lie ``curve.jsonl``, ``config.json``,
            ``scores.json``, ``base.json`` and ``checkpoint.safetensors``, after a sweep ``sweep.json`` and ``sweep/``,
            and of an adapter ``adapter_config.json`` and ``training.json``.
        digest: hex SHA-256 of the file.
        curve: the points of the curve.
        base_score: the task's metric of the base model on the validation documents; nan with ``shots``, which has none.
        best_score: that of the expert.
        kl: λ, of a sweep the one that validation chose.
    """

    path: Path
    digest: str
    curve: list[CurvePoint]
    base_score: float
    best_score: float
    kl: float


def train(
    config: TrainConfig,
    *,
    folder: Path | None = None,
    overwrite: bool = False,
    continue_: bool = False,
    checkpoint_every: int = 5,
    include_path: Path | None = None,
    trackers: Sequence[str | GeneralTracker] = (),
    tracker_dir: Path | None = None,
    checkpointing: CheckpointingName = "auto",
    rollouts: Engine | None = None,
    lm: HFLM | None = None,
    task: Task | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train an expert on a task; a run that was interrupted under the same configuration goes on where it was.

    While training goes, ``<folder>/<name>.training`` holds the configuration, the curve and the checkpoint; when it
    ends that folder becomes ``<folder>/<name>`` in one rename. With several λ in ``config.kl`` one run each is made
    under ``sweep/``, and the one that validation chooses becomes the expert: the same file that its λ alone gives.

    Args:
        config: what to train.
        folder: where experts lie; None is ``T2_EXPERTS_DIR``.
        overwrite: replace a finished expert of that name, or drop an interrupted run of another configuration.
        continue_: train a finished expert further, from its last step and not from its best;
            :data:`t2.training.folders.MAY_CHANGE` names what may differ from its configuration.
        checkpoint_every: steps between checkpoints.
        include_path: a folder of further lm-eval tasks.
        trackers: names of accelerate's trackers, or trackers, that get the curve's points as they come.
        tracker_dir: where trackers that need a folder write; None is ``<folder>/logs``.
        checkpointing: compute each layer's activations again in the backward pass, which changes memory and time and no
            gradient: ``on``, ``off``, or ``auto``, as soon as a document does not fit into memory without.
        rollouts: another engine over the same base model, to generate answers with; None takes the one that is trained.
        lm: the base model when it is already loaded; None loads it by ``config.model_args``.
        task: the task when it is already loaded; None loads it by name.
        progress: show progress bars.

    Raises:
        ArgumentError: the expert exists (or, to be continued, does not), an interrupted run differs, or a value does
            not fit the task or model.
        DependencyError: a tracker's package is not installed.
        TaskError: the task is unknown or cannot be trained on.
        TrainingError: the reward is constant, nothing improved, or training diverged.
        StorageError: a file cannot be written.
    """
    if checkpointing not in CHECKPOINTING:
        raise ArgumentError(
            f"checkpointing={checkpointing} is not one of {', '.join(CHECKPOINTING)}"
            f"{nearest(checkpointing, CHECKPOINTING)}"
        )
    home = (folder or experts_dir()).absolute()
    final, working = home / config.name, home / f"{config.name}.training"
    if config.layers is not None:
        parse_layers(config.layers)
    if rollouts is not None and config.method != "svf":
        raise ArgumentError(f"rollouts: an adapter of method={config.method} is in the model that is trained alone")
    check_hf_args(config.model_args, "model_args")
    tracking = Tracking(trackers, tracker_dir or home / "logs")
    folders.check_places(final, working)
    # One that was killed while it took its final place is only to be put there.
    ready = folders.result_of(working) is not None
    earlier = folders.check_continued(final, config) if continue_ and not ready else None
    if folders.result_of(final) is not None and not overwrite and not continue_:
        raise ArgumentError(
            f"expert {config.name} exists in {final}; give another --name, --overwrite to replace it, or --continue to "
            "train it further"
        )
    with _lock(home, config.name):
        folders.check_interrupted(working, config, overwrite)
        if folders.result_of(working) is not None:
            return _result(folders.publish(working, final))
        task = task if task is not None else load_task(config.task, include_path=include_path)
        labels: tuple[str, ...] = ()
        if config.shots is None:
            halves = split_docs(task, config.seed, config.train_docs, config.validation_docs)
            labels = _labels(task, halves) if config.kind == "classifier" else ()
        given = lm is not None
        lm = lm if lm is not None else open_base(**config.model_args)
        if config.shots is not None:
            halves = draw_shots(task_docs(config, task, lm), config.shots, config.seed)
        model = identity_of(lm)
        engine = build_engine(lm, config, given=given)
        # Without a length of its own, training takes that of lm-eval's runs of the task.
        named = not config.gen_kwargs.keys().isdisjoint(LENGTHS)
        length = requested_length(lm) if named else contextlib.nullcontext()
        try:
            problem = build_problem(config, engine, lm, task, halves, checkpointing=checkpointing, rollouts=rollouts)
            method = build_method(config, engine, progress=progress)
            place = Workplace(
                model=model,
                method=method,
                problem=problem,
                halves=halves,
                labels=labels,
                domain=config.domain or _domain(task),
                checkpoint_every=checkpoint_every,
                overwrite=overwrite,
                progress=progress,
                tracking=tracking,
            )
            place.check_room(config)
            if earlier is not None and not working.exists():
                folders.take_up(final, working, config, place.identity(earlier), place.identity(config))
            with length:
                (run_sweep if len(config.kls) > 1 else run_one)(place, config, working)
        finally:
            engine.close()
        return _result(folders.publish(working, final))


def finished(config: TrainConfig, folder: Path | None = None) -> TrainResult | None:
    """The result of a training of this configuration that has come to its end; None where there is none."""
    final = (folder or experts_dir()).absolute() / config.name
    return _result(final) if folders.is_trained(final, config) else None


def _result(final: Path) -> TrainResult:
    done = folders.read_finished(final)
    return TrainResult(done.path, done.digest, done.curve, done.base_score, done.best_score, done.config.kls[0])


def build_problem(
    config: TrainConfig,
    engine: TransformersEngine,
    lm: HFLM,
    task: Task,
    halves: Halves,
    *,
    checkpointing: CheckpointingName = "auto",
    rollouts: Engine | None = None,
) -> Problem:
    """What is to be learned from a task's documents; the last two arguments are those of :func:`train`.

    Raises:
        ArgumentError: the task has no such metric or filter, the objective does not suit its answers, or
            ``rollouts`` is over another base model.
        TaskError: the task's answers cannot be rewarded.
    """
    docs = task_docs(config, task, lm)
    if rollouts is not None and rollouts.base.fingerprint != engine.base.fingerprint:
        raise ArgumentError(
            f"rollouts come from {rollouts.base.id}, whose weights are not those of {engine.base.id}, which is "
            "trained; load the same base model into both"
        )
    passes = Passes(engine, engine.likelihood, config.micro_tokens, config.rank, checkpointing, config.seed)
    setup = Setup(config, engine, engine.likelihood, passes, rollouts or engine, docs, halves.train, halves.validation)
    chosen = docs.output_type != "generate_until"
    if chosen and (config.reward != "outcome" or config.reward_format):
        option = "reward_format" if config.reward == "outcome" else f"reward={config.reward}"
        raise ArgumentError(f"{option} is for generated answers, and task {config.task} has choices; leave it out")
    if not chosen and config.objective == "expected-reward":
        raise ArgumentError(
            f"objective=expected-reward sums over choices, and task {config.task} generates answers; use reinforce"
        )
    if not chosen and config.normalise != "auto":
        raise ArgumentError(f"normalise is for choices, and task {config.task} generates answers; leave it out")
    if chosen and config.gen_kwargs:
        raise ArgumentError(f"gen_kwargs is for generated answers, and task {config.task} has choices; leave it out")
    if chosen and config.samples > 1 and config.objective in ("auto", "expected-reward"):
        raise ArgumentError(
            f"samples={config.samples} has no effect with objective=expected-reward, which sums over the choices of "
            f"task {config.task}; leave it at 1, or use objective=reinforce"
        )
    answers = ChoiceProblem(setup, exact=config.objective != "reinforce") if chosen else GenerationProblem(setup)
    return NextTokenProblem(setup, answers) if config.objective == "next-token" else answers


def task_docs(config: TrainConfig, task: Task, lm: HFLM) -> TaskDocs:
    """A task as training sees it; with ``shots`` its prompts are those of a search over the same documents.

    Raises:
        ArgumentError: the task has no such metric or filter.
        TaskError: the task has no metric.
    """
    form = PromptForm(
        num_fewshot=config.num_fewshot,
        system_instruction=config.system_instruction,
        apply_chat_template=config.apply_chat_template,
        gen_kwargs=config.gen_kwargs,
    )
    asked: dict[str, Any] = {"metric": config.metric, "filter": config.filter}
    if config.shots is not None:
        pool = find_pool(task)
        asked |= {"forbidden": pool.scored, "spare": pool.docs[:SPARE]}
    return TaskDocs(task, lm, form, **asked)


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
