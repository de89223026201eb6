"""What is to be said of a candidate beside a baseline, over one task or several.

REGRESSED     the candidate is worse: p ≤ 1 − level after Holm over the tasks, and the drop seen is above the margin
              and above the noise floor.
IMPROVED      the candidate is better, by the same rules.
NO CHANGE     neither, and the interval excludes a drop of more than the margin.
UNDERPOWERED  neither, and the interval does not exclude it: these documents cannot answer.

So under no difference REGRESSED is said at most with probability 1 − level, and half of that where scores are 0 and 1;
and without a margin NO CHANGE is never said of runs that differ at random, since no number of documents excludes every
drop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike

from t2.core.errors import ArgumentError, DataError, nearest
from t2.core.statistics import PairedDifference, holm, smallest_detectable


class Verdict(StrEnum):
    """See the module; in falling order of what several tasks together are called by."""

    REGRESSED = "REGRESSED"
    UNDERPOWERED = "UNDERPOWERED"
    IMPROVED = "IMPROVED"
    NO_CHANGE = "NO CHANGE"


@dataclass(frozen=True, slots=True)
class TaskVerdict:
    """The verdict on one task.

    Attributes:
        difference: what the two runs say.
        p: of the difference, adjusted for the number of tasks.
        noise: the task's noise floor.
        smallest_drop: the smallest drop that would have been called REGRESSED with the decision's power; infinite where
            none would.
    """

    verdict: Verdict
    difference: PairedDifference
    p: float
    noise: float
    smallest_drop: float


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict on all tasks together, and on each.

    Attributes:
        verdict: REGRESSED if any task is, else UNDERPOWERED if any is, else IMPROVED if any is, else NO CHANGE.
        tasks: by name.
        margin: in the unit of the scores.
        level, power: shares.
    """

    verdict: Verdict
    tasks: dict[str, TaskVerdict]
    margin: float
    level: float
    power: float


def decide(
    differences: Mapping[str, PairedDifference],
    *,
    margin: float,
    noise: Mapping[str, float] | None = None,
    power: float = 0.8,
) -> Decision:
    """Judge the paired differences of one or several tasks.

    ``smallest_drop`` of several tasks is told for Holm's first and strictest step, (1 − level) / tasks.

    Args:
        differences: of each task, all of one level.
        margin: the largest drop that does not matter, in the unit of the scores; 0 where every drop does.
        noise: noise floors (:func:`noise_floor`) of tasks.
        power: of ``smallest_drop``.

    Raises:
        ArgumentError: the margin is negative or not finite, levels differ, the power is none, or ``noise`` names a task
            that is not judged.
        DataError: there is no task.
    """
    if not differences:
        raise DataError("there is no task to judge; give results of at least one")
    if not 0 <= margin < float("inf"):
        raise ArgumentError(f"a margin is a drop of the score that does not matter, such as 0.01; got {margin}")
    levels = {difference.interval.level for difference in differences.values()}
    if len(levels) > 1:
        raise ArgumentError(f"all tasks are judged at one level; got {', '.join(map(str, sorted(levels)))}")
    floors = dict(noise or {})
    for task in floors:
        if task not in differences:
            raise ArgumentError(f"there is a noise floor of {task!r}, which is not judged{nearest(task, differences)}")
    level = levels.pop()
    adjusted = holm([difference.p for difference in differences.values()])
    tasks = {}
    for (task, difference), p in zip(differences.items(), adjusted, strict=True):
        floor = floors.get(task, 0.0)
        smallest = smallest_detectable(
            difference, threshold=max(margin, floor), alpha=(1 - level) / len(differences), power=power
        )
        tasks[task] = TaskVerdict(judge(difference, p, margin=margin, noise=floor), difference, p, floor, smallest)
    said = {task.verdict for task in tasks.values()}
    return Decision(next(verdict for verdict in Verdict if verdict in said), tasks, margin, level, power)


def judge(difference: PairedDifference, p: float, *, margin: float, noise: float = 0.0) -> Verdict:
    """The verdict on one task, whose p is adjusted for the number of tasks."""
    if p <= 1 - difference.interval.level and abs(difference.difference) > max(margin, noise):
        return Verdict.REGRESSED if difference.difference < 0 else Verdict.IMPROVED
    return Verdict.NO_CHANGE if difference.interval.low >= -margin else Verdict.UNDERPOWERED


def noise_floor(runs: Sequence[ArrayLike]) -> float:
    """The spread of repeated runs that should agree: the largest difference between the mean scores of any two.

    Args:
        runs: scores of the same documents, of each run.

    Raises:
        DataError: there are fewer than two runs, or they differ in length.
    """
    scores = [np.asarray(run, dtype=np.float64) for run in runs]
    if len(scores) < 2 or len({run.shape for run in scores}) > 1 or scores[0].size == 0:
        raise DataError("a noise floor takes at least two runs over the same documents")
    means = [float(run.mean()) for run in scores]
    return max(means) - min(means)
