"""One run, and a sweep of runs over λ."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from t2.core.digests import canonical_json, digest_of
from t2.core.errors import ExpertFileError, StorageError, TrainingError
from t2.core.files import atomic_write
from t2.core.manifest import Manifest, pack_hashes
from t2.harness.runs import BaseTargets
from t2.training import folders
from t2.training.checkpoint import Checkpoint
from t2.training.config import TrainConfig
from t2.training.methods import Method
from t2.training.problem import Measured, Problem
from t2.training.split import Halves
from t2.training.tracking import Tracking
from t2.training.trainer import Trainer


@dataclass
class Workplace:
    """The objects that all runs of a training share.

    Attributes:
        model: identity of the base model (:func:`t2.harness.identity.identity_of`).
    """

    model: str
    method: Method
    problem: Problem
    halves: Halves
    labels: tuple[str, ...]
    domain: str | None
    checkpoint_every: int
    overwrite: bool
    progress: bool
    tracking: Tracking
    _base: Measured | None = field(default=None, init=False)

    def manifest(self, config: TrainConfig) -> Manifest:
        """What the expert of a run says of itself."""
        return Manifest(
            kind=config.kind,
            name=config.name,
            base=self.method.engine.base,
            targets=self.method.ranks,
            task=config.task,
            domain=self.domain,
            method=self.problem.method,
            training=config.told(),
            training_docs=pack_hashes(self.halves.marks),
            labels=self.labels,
        )

    def check_room(self, config: TrainConfig) -> None:
        """Check before the training that its expert can be written after it.

        Raises:
            TrainingError: an expert's file has no room for the hashes of so many documents.
        """
        try:
            self.method.check_room(self.manifest(config))
        except ExpertFileError as error:
            documents = len(self.halves.train) + len(self.halves.validation)
            raise TrainingError(
                f"an expert's file cannot name the {documents} documents of {config.task} ({error}); give "
                f"{'fewer --shots' if config.shots is not None else '--train-docs or --validation-docs'}"
            ) from error

    def identity(self, config: TrainConfig) -> str:
        """Digest of all that decides the outcome of a run."""
        engine = self.method.engine
        return digest_of([config.digest(), self.model, str(engine.dtype), self.halves.digest()])

    def base(self, config: TrainConfig) -> Measured:
        """The base model on the validation documents, measured once.

        Raises:
            TrainingError: it earns the same reward for every answer.
        """
        if self._base is None:
            self._base = self.problem.measure(None, "Measuring the base model" if self.progress else None)
            _check_signal(self.problem, self._base, config)
        return self._base


def run_one(place: Workplace, config: TrainConfig, working: Path) -> None:
    """Train with the one λ of a configuration, or go on with it, and write the expert.

    Raises:
        TrainingError: the reward is constant, nothing improved, or training diverged.
    """
    done = _train(place, config, working, config.name)
    if config.shots is not None and torch.equal(done.best_theta, place.method.parameters.initial()):
        (working / folders.CHECKPOINT).unlink(missing_ok=True)
        raise TrainingError(
            f"every answer to the {config.shots} documents drawn from {config.task} earned the same reward, so "
            f"{done.progress.step} steps moved nothing; use another --seed, more --shots, or --objective next-token"
        )
    if done.progress.best_step == 0:
        (working / folders.CHECKPOINT).unlink(missing_ok=True)
        raise TrainingError(
            f"no validation measurement of {config.name} beat the base model's score of {done.progress.base_score:g} "
            f"in {done.progress.step} steps, so no expert was written (the curve is {working / folders.CURVE}); "
            "try more --steps, another --learning-rate, a larger --clip, or more documents"
        )
    _write_scores(place, done, working)
    _write_base(place, working)
    _write_expert(place, config, done, working)


def run_sweep(place: Workplace, config: TrainConfig, working: Path) -> None:
    """Train once with each λ under ``sweep/kl-λ``, and make the best on validation the expert.

    A run that ends without an expert (nothing beat the base model, or it diverged) is one that validation does not
    choose. Ties by score and reward go to the λ named first.

    Raises:
        TrainingError: the reward is constant, or no run improved on the base model.
    """
    folders.write_config(working / folders.SWEEP, config)
    rows = []
    for kl in config.kls:
        own = config.model_copy(update={"kl": kl})
        folder = _place_of(kl, working)
        scores = _finished_run(folder)
        if scores is None:
            scores = _sweep_run(place, own, folder, f"{config.name}-{folder.name}")
        rows.append({"kl": kl, **scores})
    found = [row for row in rows if row.get("best_step")]
    if not found:
        if all("error" in row for row in rows):
            raise TrainingError(f"no run of the sweep came to its end; with kl={rows[0]['kl']:g}: {rows[0]['error']}")
        raise TrainingError(
            f"no run of the sweep over kl={','.join(f'{kl:g}' for kl in config.kls)} beat the base model, so no expert "
            f"was written (the curves are in {working / folders.SWEEP}); try more --steps, another --learning-rate, a "
            "larger --clip, or more documents"
        )
    order = ("best_score", "best_reward") if config.select == "score" else ("best_reward", "best_score")
    chosen = max(found, key=lambda row: tuple(row[name] for name in order))
    folder = _place_of(chosen["kl"], working)
    table = {"chosen": chosen["kl"], "select": config.select, "runs": rows}
    atomic_write(working / folders.TABLE, (json.dumps(table, indent=2) + "\n").encode())
    _write_base(place, working)
    # The expert comes last: where it is, the training is finished.
    try:
        for name in (folders.CURVE, folders.SCORES, folders.CHECKPOINT, folders.CONFIG, *place.method.files):
            shutil.copy(folder / name, working / f"{name}.copy")
            (working / f"{name}.copy").replace(working / name)
    except OSError as error:
        raise StorageError(
            f"cannot copy {folder} to {working}: {error.strerror or error}; free space and start again, no step is lost"
        ) from error


def _train(place: Workplace, config: TrainConfig, working: Path, run: str) -> Checkpoint:
    identity = place.identity(config)
    checkpoint = folders.resume(working, config.name, identity, place.overwrite)
    base: Measured | None = None
    if config.shots is None and checkpoint is None:
        base = place.base(config)
    elif config.shots is None and checkpoint is not None:
        base = Measured(checkpoint.progress.base_reward, checkpoint.progress.base_score)
    folders.write_config(working, config)
    place.problem.kl = config.kls[0]
    with place.tracking.run(run, config) as observe:
        trainer = Trainer(
            config,
            identity,
            place.problem,
            place.method.parameters,
            len(place.halves.train),
            working,
            checkpoint_every=place.checkpoint_every,
            progress=place.progress,
            observe=observe,
            forms=place.method.engine.forms,
        )
        return trainer.run(base, checkpoint)


def _place_of(kl: float, working: Path) -> Path:
    """The folder of a sweep's run; two λ never share one."""
    short = f"{kl:g}"
    return working / folders.SWEEP / f"kl-{short if float(short) == kl else repr(kl)}"


def _sweep_run(place: Workplace, config: TrainConfig, folder: Path, run: str) -> dict[str, Any]:
    place.base(config)  # its errors concern every run
    try:
        done = _train(place, config, folder, run)
    except TrainingError as error:
        scores: dict[str, Any] = {"best_step": 0, "error": str(error)}
        atomic_write(folder / folders.SCORES, (json.dumps(scores, indent=2) + "\n").encode())
    else:
        if done.progress.best_step:
            _write_expert(place, config, done, folder)
        scores = _write_scores(place, done, folder)
    if not scores["best_step"]:
        (folder / folders.CHECKPOINT).unlink(missing_ok=True)
    return scores


def _finished_run(folder: Path) -> dict[str, Any] | None:
    """The scores of a sweep's run that was finished before an interruption."""
    try:
        scores = dict(json.loads((folder / folders.SCORES).read_bytes()))
    except (OSError, ValueError):
        return None
    return scores if not scores.get("best_step") or folders.result_of(folder) is not None else None


def _write_scores(place: Workplace, done: Checkpoint, working: Path) -> dict[str, Any]:
    state = done.progress
    validated = {
        "base_reward": state.base_reward,
        "base_score": state.base_score,
        "best_reward": state.best_reward,
        "best_score": state.best_score,
    }
    scores = {
        **(validated if place.halves.validation else {}),
        "best_step": state.best_step,
        "seconds": round(state.seconds, 1),
        "steps": state.step,
        "train_docs": len(place.halves.train),
        "validation_docs": len(place.halves.validation),
    }
    atomic_write(working / folders.SCORES, (json.dumps(scores, indent=2) + "\n").encode())
    return scores


def _write_base(place: Workplace, working: Path) -> None:
    known = BaseTargets(base=place.method.engine.base, targets=dict(place.method.engine.ranks()))
    atomic_write(working / folders.BASE, (canonical_json(known.model_dump(mode="json")) + "\n").encode())


def _write_expert(place: Workplace, config: TrainConfig, done: Checkpoint, working: Path) -> None:
    place.method.write(working, place.manifest(config), done.best_theta)


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
