"""The folders of trainings: what lies in them while they run and after, and how one becomes the other."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from t2.core.curve import CurvePoint, read_curve
from t2.core.digests import canonical_json, sha256_file
from t2.core.errors import ArgumentError, DataError, StorageError
from t2.core.files import atomic_write
from t2.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from t2.training.config import TrainConfig
from t2.training.trainer import finished

EXPERT, CURVE, CONFIG, SCORES, BASE, CHECKPOINT, TABLE = (
    "expert.safetensors",
    "curve.jsonl",
    "config.json",
    "scores.json",
    "base.json",
    "checkpoint.safetensors",
    "sweep.json",
)
ADAPTER = "adapter_model.safetensors"
RESULTS = (EXPERT, ADAPTER)
"""What a finished training ends in, by its method; what is written last."""
SWEEP = "sweep"
"""The folder of a sweep's runs."""
MAY_CHANGE = ("steps", "patience", "decay_steps", "validate_every")
"""What a continued training may change: how long it goes and how often it looks, not what it learns."""


@dataclass(frozen=True)
class Finished:
    """What a finished training left; the scores are nan where nothing was validated."""

    config: TrainConfig
    path: Path
    digest: str
    curve: list[CurvePoint]
    base_score: float
    best_score: float


def write_config(folder: Path, config: TrainConfig) -> None:
    """Write ``config.json``."""
    atomic_write(folder / CONFIG, (canonical_json(config.told()) + "\n").encode())


def result_of(folder: Path) -> Path | None:
    """The file of the expert or adapter in a folder; None where its training has not come to an end."""
    return next((folder / name for name in RESULTS if (folder / name).exists()), None)


def check_places(*places: Path) -> None:
    """Check that nothing but folders lies where a training's folders are to be.

    Raises:
        ArgumentError: a file does.
    """
    for place in places:
        if place.exists() and not place.is_dir():
            raise ArgumentError(f"{place} is a file where a training needs a folder; move it, or give another --name")


def check_interrupted(working: Path, config: TrainConfig, overwrite: bool) -> None:
    """Drop what may be dropped of an earlier run, and refuse to touch what may not.

    Raises:
        ArgumentError: a run of another configuration was interrupted there.
    """
    if not working.exists():
        return
    # A sweep's own configuration lies with its runs; that of the chosen run takes the other place in the end.
    found = [_read_json(place / CONFIG) for place in (working, working / SWEEP)]
    wanted = config.told()
    if wanted in found:
        return
    earlier = next((one for one in found if isinstance(one, dict)), None)
    kept = [path for name in (CHECKPOINT, *RESULTS) for path in working.rglob(name)]
    if earlier is not None and not overwrite and kept:
        raise ArgumentError(
            f"an interrupted training of {config.name} in {working} had another configuration "
            f"({_differences(earlier, wanted)}); give the same options to go on with it, --overwrite to "
            "drop it, or another --name"
        )
    remove(working)


def is_trained(final: Path, config: TrainConfig) -> bool:
    """Whether a folder holds the finished expert of a configuration."""
    if result_of(final) is None:
        return False
    return config.told() in [_read_json(place / CONFIG) for place in (final, final / SWEEP)]


def check_continued(final: Path, config: TrainConfig) -> TrainConfig:
    """The configuration of a finished expert that is to be trained further.

    Raises:
        ArgumentError: there is no such expert, it cannot be continued, or more than :data:`MAY_CHANGE` differs.
    """
    if result_of(final) is None:
        raise ArgumentError(f"--continue: there is no finished expert {final.name} in {final.parent} to train further")
    if not (final / CHECKPOINT).exists():
        raise ArgumentError(
            f"--continue: {final} holds no {CHECKPOINT}, the state after its last step; train it again with --overwrite"
        )
    if len(config.kls) > 1:
        raise ArgumentError("--continue goes on with one run: give the one --kl that was chosen")
    found = _read_json(final / CONFIG)
    try:
        earlier = TrainConfig.model_validate(found)
    except pydantic.ValidationError as error:
        raise DataError(f"{final / CONFIG} is not a training configuration; train again with --overwrite") from error
    differences = _differences(earlier.told(), config.told(), MAY_CHANGE)
    if differences:
        raise ArgumentError(
            f"--continue may change {', '.join(MAY_CHANGE)} only, and {differences}; give the options that "
            f"{final.name} was trained with"
        )
    return earlier


def take_up(final: Path, working: Path, config: TrainConfig, earlier: str, identity: str) -> None:
    """Lay out a finished training's last state as that of an interrupted one, which then goes on.

    Args:
        final: the finished expert's folder, which stays as it is until it is replaced.
        working: the folder of the run.
        config: the new configuration.
        earlier: identity of the finished training: digest of configuration, base, dtype and documents.
        identity: that of the new one.

    Raises:
        ArgumentError: the base model, dtype or documents are other ones, or there is nothing left to do.
    """
    last = load_checkpoint(final / CHECKPOINT)
    if last.progress.config != earlier:
        raise ArgumentError(
            f"--continue: {final.name} was trained on another base model, dtype or set of documents; restore those"
        )
    if finished(config, last.progress):
        raise ArgumentError(
            f"--continue: {final.name} has {last.progress.step} steps, {last.progress.stale} validations after its "
            "best; give more --steps, or another --patience (0 is without end)"
        )
    aside = working.with_name(f"{working.name}.copy")
    try:
        remove(aside)
        aside.mkdir(parents=True)
        shutil.copy(final / CURVE, aside / CURVE)
        if (final / TABLE).exists():
            shutil.copy(final / TABLE, aside / TABLE)
            shutil.copytree(final / SWEEP, aside / SWEEP)
        progress = last.progress.model_copy(update={"config": identity})
        save_checkpoint(aside / CHECKPOINT, last.model_copy(update={"progress": progress}))
        write_config(aside, config)
        aside.rename(working)
    except OSError as error:
        raise StorageError(
            f"--continue: cannot copy {final} to {working}: {error.strerror or error}; where a file of it is lost, "
            "train it again with --overwrite"
        ) from error


def resume(working: Path, name: str, identity: str, overwrite: bool) -> Checkpoint | None:
    """The checkpoint that a run goes on from; its curve is cut to what the checkpoint knows.

    Raises:
        ArgumentError: it belongs to another base model, dtype or set of documents.
        DataError: checkpoint or curve are damaged.
    """
    path = working / CHECKPOINT
    checkpoint = load_checkpoint(path) if path.exists() and not (overwrite and not _readable(path)) else None
    if checkpoint is not None and checkpoint.progress.config != identity:
        if not overwrite:
            raise ArgumentError(
                f"an interrupted training of {name} in {working} had the same options on another base model, dtype or "
                "set of documents; restore those to go on with it, or give --overwrite to drop it"
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


def publish(working: Path, final: Path) -> Path:
    """Make a working folder that holds a finished expert the expert's folder, and return it.

    Of a sweep's runs the configurations, curves and scores stay, not their experts and checkpoints.
    """
    aside = final.with_name(f"{final.name}.replaced")
    try:
        if (working / SWEEP).exists():
            for name in (*RESULTS, CHECKPOINT):
                for path in (working / SWEEP).rglob(name):
                    path.unlink()
        remove(aside)
        if final.exists():
            final.rename(aside)
        working.rename(final)
    except OSError as error:
        raise StorageError(f"cannot move {working} to {final}: {error.strerror or error}") from error
    remove(aside)
    return final


def read_finished(final: Path) -> Finished:
    """What a finished training left in its folder."""
    result = result_of(final)
    assert result is not None
    scores = json.loads((final / SCORES).read_bytes())
    config = TrainConfig.model_validate_json((final / CONFIG).read_bytes())
    return Finished(
        config,
        result,
        sha256_file(result),
        read_curve(final / CURVE),
        float(scores.get("base_score", math.nan)),
        float(scores.get("best_score", math.nan)),
    )


def remove(folder: Path) -> None:
    """Remove a folder if it is there.

    Raises:
        StorageError: it cannot be removed.
    """
    try:
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise StorageError(
            f"cannot remove {folder}: {error.strerror or error}; remove it, or give another --name"
        ) from error


def _differences(earlier: dict[str, Any], wanted: dict[str, Any], but: Collection[str] = ()) -> str:
    keys = [key for key in {**wanted, **earlier} if key not in but]
    changed = [key for key in keys if earlier.get(key) != wanted.get(key)]
    return ", ".join(f"{key} was {earlier.get(key)!r} and is {wanted.get(key)!r}" for key in changed[:3])


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _readable(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except DataError:
        return False
    return True
