"""Verdicts on runs that the registry holds, as ``t2 leaderboard check`` gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from t2.core.comparison import compare_results
from t2.core.comparison_summary import as_json
from t2.core.errors import (
    ArgumentError,
    ConflictError,
    DataError,
    InvalidRequestError,
    NotFoundError,
    ResultsError,
    TooLargeError,
)
from t2.core.results import TaskResult
from t2.registry.run_references import RunLister, parse_expert, runs_of
from t2.registry.schemas import Judgement, Run, VerdictQuery


def judge(runs: RunLister, query: VerdictQuery, read: Callable[[Run], TaskResult], *, limit: int) -> Judgement:
    """Compare the runs that a query names.

    Args:
        read: gets a run's samples.
        limit: bytes of all samples together.

    Raises:
        InvalidRequestError: a reference names nothing that runs have, or more than one run, or a parameter is wrong.
        NotFoundError: a run, an expert or its version is not there, or has no run.
        TooLargeError: the samples are over the limit; nothing is read then.
        ConflictError: the runs cannot be compared; the message is the reason.
    """
    if len(query.noise) == 1:
        raise InvalidRequestError("noise: give at least two runs: the spread of repeats is the noise floor")
    if len(set(query.noise)) < len(query.noise):
        raise InvalidRequestError("noise: a run is named twice, and is no repeat of itself; give others")
    sides = {
        what: _find(runs, what, reference, query.tasks)
        for what, reference in (
            ("candidate", query.candidate),
            ("baseline", query.baseline),
            *((f"noise {number}", each) for number, each in enumerate(query.noise, start=1)),
        )
    }
    named = {run.reference: run for side in sides.values() for run in side}
    size = sum(run.samples_size for run in named.values())
    if size > limit:
        raise TooLargeError(
            f"the samples of these runs have {size} bytes, the limit of a comparison here is {limit}; name fewer "
            "tasks, or compare them with t2 leaderboard check"
        )
    results = {reference: read(run) for reference, run in named.items()}
    candidate, baseline, *noise = ([results[run.reference] for run in side] for side in sides.values())
    try:
        found = compare_results(
            candidate,
            baseline,
            margin=query.margin,
            noise=noise,
            tasks=query.tasks,
            metric=query.metric,
            filter=query.filter,
            skip_unpaired=any(parse_expert(reference) for reference in (query.baseline, query.candidate)),
            level=query.level,
            power=query.power,
            seed=query.seed,
        )
    except (ResultsError, DataError) as error:
        raise ConflictError(str(error)) from error
    except ArgumentError as error:
        raise InvalidRequestError(str(error)) from error
    told = as_json(found)
    by_task = {what: {run.task: run.reference for run in sides[what]} for what in ("baseline", "candidate")}
    tasks = [
        {**task, **{f"{what}_run": references[task["task"]] for what, references in by_task.items()}}
        for task in told["tasks"]
    ]
    return Judgement.model_validate({**told, "tasks": tasks})


def _find(runs: RunLister, what: str, reference: str, tasks: Sequence[str]) -> list[Run]:
    try:
        found = runs_of(runs, reference)
    except ArgumentError as error:
        raise InvalidRequestError(f"{what}: {error}") from error
    except NotFoundError as error:
        raise NotFoundError(f"{what}: {error}") from error
    wanted = [run for run in found if run.task in tasks]
    # Where one is missing all are read, so that the refusal can name the nearest.
    return wanted if wanted and len(wanted) == len(set(tasks)) else found
