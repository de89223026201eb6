"""Reward curves in an experiment tracker, through accelerate's interface to them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from t2.core.curve import CurvePoint
from t2.core.errors import ArgumentError, DependencyError, nearest
from t2.training.config import TrainConfig

_DISTRIBUTIONS = {"comet_ml": "comet-ml"}
"""Packages of trackers that are called otherwise than the tracker."""


class Tracking:
    """Starts the wanted trackers for each run and hands them its points.

    A point of the curve becomes ``train/reward``, ``validation/score`` and so on, at its step. After an interruption
    the tracker begins a run of its own that goes on at the checkpoint's step.

    Args:
        trackers: names by which accelerate knows them, or trackers.
        folder: where those that need a folder write.

    Raises:
        ArgumentError: accelerate knows no such tracker.
        DependencyError: its package is not installed.
    """

    def __init__(self, trackers: Sequence[str | GeneralTracker], folder: Path) -> None:
        self._trackers = list(trackers)
        self._folder = folder
        known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
        available = {str(name) for name in get_available_trackers()}
        bundled = {name for name in known if LOGGER_TYPE_TO_CLASS[name].__module__ == "accelerate.tracking"}
        for tracker in self._trackers:
            if not isinstance(tracker, str):
                continue
            if tracker not in known:
                raise ArgumentError(f"--tracker={tracker}: accelerate knows no such tracker{nearest(tracker, known)}")
            if tracker in bundled and tracker not in available:
                package = _DISTRIBUTIONS.get(tracker, tracker)
                raise DependencyError(
                    f"--tracker={tracker} needs {package}, not part of any t2 install; run: pip install {package}"
                )

    @contextlib.contextmanager
    def run(self, name: str, config: TrainConfig) -> Iterator[Callable[[CurvePoint], None] | None]:
        """The trackers of one run, to be told its points; None where there are none.

        Args:
            name: of the run; most trackers call it the project.
            config: stored as the run's hyperparameters.
        """
        if not self._trackers:
            yield None
            return
        with self._blamed("start"):
            self._folder.mkdir(parents=True, exist_ok=True)
            accelerator = Accelerator(log_with=self._trackers, project_dir=self._folder)
            accelerator.init_trackers(name, config=_flat(config))

        def observe(point: CurvePoint) -> None:
            values = point.model_dump(exclude={"step", "split"}, exclude_none=True)
            with self._blamed("take a point"):
                accelerator.log({f"{point.split}/{key}": value for key, value in values.items()}, step=point.step)

        try:
            yield observe
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()

    @contextlib.contextmanager
    def _blamed(self, what: str) -> Iterator[None]:
        names = ", ".join(tracker if isinstance(tracker, str) else str(tracker.name) for tracker in self._trackers)
        try:
            yield
        except Exception as error:  # a tracker's own package may raise anything
            raise DependencyError(
                f"tracker {names} could not {what}: {type(error).__name__}: {error}; the training goes on from its "
                "checkpoint when it is started again, also without --tracker"
            ) from error


def _flat(config: TrainConfig) -> dict[str, str | int | float | bool]:
    """The configuration in the types that every tracker takes."""
    values = config.told().items()
    return {key: value if isinstance(value, (str, int, float, bool)) else json.dumps(value) for key, value in values}
