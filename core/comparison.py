"""Two sets of results, paired document by document and judged.

Documents are paired by the hash of their content, never by their place. Results are compared only where everything but
the model is the same: task version, shots, documents, prompts, right answers, metric and filter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from t2.core.errors import ArgumentError, ResultsError, nearest
from t2.core.results import EvaluatedBase, Sample, Score, TaskResult
from t2.core.statistics import paired
from t2.core.verdicts import TaskVerdict, Verdict, decide, noise_floor


@dataclass(frozen=True, slots=True)
class ComparedTask:
    """One task of two runs.

    Attributes:
        task, metric, filter: what was compared.
        higher_is_better: of the metric.
        baseline, candidate: mean scores.
        said: what is to be said of their difference.
    """

    task: str
    metric: str
    filter: str
    higher_is_better: bool
    baseline: float
    candidate: float
    said: TaskVerdict


@dataclass(frozen=True, slots=True)
class Comparison:
    """The verdict on a candidate beside a baseline.

    Attributes:
        verdict: of all tasks together (:class:`t2.core.verdicts.Decision`).
        tasks: sorted by name.
        margin: in the unit of the scores.
        level, power: shares.
    """

    verdict: Verdict
    tasks: tuple[ComparedTask, ...]
    margin: float
    level: float
    power: float


def compare_results(
    candidate: Sequence[TaskResult],
    baseline: Sequence[TaskResult],
    *,
    margin: float,
    noise: Sequence[Sequence[TaskResult]] = (),
    tasks: Sequence[str] = (),
    metric: str | None = None,
    filter: str | None = None,
    level: float = 0.95,
    power: float = 0.8,
    seed: int = 0,
) -> Comparison:
    """Pair two sets of results and judge the candidate.

    Args:
        candidate, baseline: their tasks, each once.
        margin: the largest drop that does not matter, in the unit of the scores.
        noise: at least two repeats of one evaluation of the same documents, for the noise floor; or none.
        tasks: those to compare; all if empty, and then both sides must have the same.
        metric, filter: what to compare by; the baseline's first of each task where not told.
        level: of the intervals, and 1 − level the risk of a false verdict.
        power: of the smallest drop that is told.
        seed: of the bootstrap.

    Raises:
        ResultsError: the two cannot be paired: another task version, number of shots, documents, prompts, answers,
            metric or filter; a task or a score is missing; or the repeats are none of one evaluation.
        ArgumentError: a margin, level or power is out of range, or the margin is all that scores of 0 to 1 can drop.
    """
    ours, theirs = _by_task(candidate, "candidate"), _by_task(baseline, "baseline")
    names = sorted(set(tasks)) or sorted(ours.keys() | theirs.keys())
    repeats = [_by_task(run, f"noise run {number}") for number, run in enumerate(noise, start=1)]
    differences, floors, scores, means = {}, {}, {}, {}
    for name in names:
        after, before = _find(ours, name, "candidate", tasks), _find(theirs, name, "baseline", tasks)
        _check(after, before, "candidate")
        score = before.run.score(metric, filter)
        scores[name] = score
        old, new = _values(before, score, "baseline"), _values(after, score, "candidate")
        _check_margin(margin, name, [*new, *old])
        means[name] = sum(old) / len(old), sum(new) / len(new)
        differences[name] = paired(new, old, higher_is_better=score.higher_is_better, level=level, seed=seed)
        if repeats:
            runs = [_find(run, name, f"noise run {number}", tasks) for number, run in enumerate(repeats, start=1)]
            for number, run in enumerate(runs, start=1):
                _check(run, before, f"noise run {number}")
                if _identity(run) != _identity(runs[0]):
                    raise ResultsError(
                        f"{name}: noise run {number} is no repeat of the first: another model, strategy or experts; "
                        "give runs of one evaluation"
                    )
            floors[name] = noise_floor([_values(run, score, f"noise run {i}") for i, run in enumerate(runs, start=1)])
    decision = decide(differences, margin=margin, noise=floors, power=power)
    compared = tuple(
        ComparedTask(
            name,
            scores[name].metric,
            scores[name].filter,
            scores[name].higher_is_better,
            means[name][0],
            means[name][1],
            decision.tasks[name],
        )
        for name in names
    )
    return Comparison(decision.verdict, compared, margin, level, power)


def _by_task(results: Sequence[TaskResult], whose: str) -> dict[str, TaskResult]:
    found: dict[str, TaskResult] = {}
    for result in results:
        if result.run.task in found:
            raise ResultsError(f"the {whose} has {result.run.task} twice; give one evaluation of each task")
        found[result.run.task] = result
    return found


def _find(results: Mapping[str, TaskResult], task: str, whose: str, wanted: Sequence[str]) -> TaskResult:
    """The results of a task, which one of ``wanted`` may misspell; without these the other side has it."""
    if task not in results:
        advice = nearest(task, results) if wanted else ", which the other has; evaluate it, or choose tasks"
        raise ResultsError(f"the {whose} has no results of {task!r}{advice}")
    return results[task]


def _check(one: TaskResult, baseline: TaskResult, whose: str) -> None:
    """Refuse to pair what differs in more than the experts, or in more than the model where one side has none."""
    task = baseline.run.task
    ours, theirs = one.run.base, baseline.run.base
    stated = None not in (ours.identity, theirs.identity)
    if one.run.experts and baseline.run.experts and stated and ours.identity != theirs.identity:
        raise ResultsError(
            f"{task}: the {whose} was scored on another model ({_model(ours)}) than the baseline ({_model(theirs)}); "
            "evaluate both on one, loaded the same way"
        )
    for what, here, there in (
        ("version", one.run.task_version, baseline.run.task_version),
        ("number of few-shot examples", one.run.n_shot, baseline.run.n_shot),
    ):
        if here != there:
            raise ResultsError(
                f"{task}: the {whose} has {what} {here} and the baseline {there}; evaluate both with the same"
            )
    here_docs, there_docs = _by_doc(one), _by_doc(baseline)
    missing, more = len(there_docs.keys() - here_docs.keys()), len(here_docs.keys() - there_docs.keys())
    if missing or more:
        raise ResultsError(
            f"{task}: the {whose} lacks {missing} of the baseline's {len(there_docs)} documents and has {more} others; "
            "evaluate both on the same documents, with the same limit"
        )
    for what, cause, changed in (
        (
            "prompts",
            "few-shot examples, chat template or instructions",
            sum(here_docs[doc].prompt_hash != sample.prompt_hash for doc, sample in there_docs.items()),
        ),
        (
            "right answers",
            "the task or its data",
            sum(here_docs[doc].target_hash != sample.target_hash for doc, sample in there_docs.items()),
        ),
    ):
        if changed:
            raise ResultsError(
                f"{task}: {changed} of {len(there_docs)} {what} of the {whose} differ from the baseline's ({cause}); "
                "evaluate both the same way"
            )


def _model(base: EvaluatedBase) -> str:
    return f"{base.id}, identity {str(base.identity)[:12]}"


def _check_margin(margin: float, task: str, scores: Sequence[float]) -> None:
    """Refuse points where shares are meant: nothing would ever be called."""
    if margin >= 1 and all(0 <= score <= 1 for score in scores):
        raise ArgumentError(
            f"a margin of {margin:g} is all that {task} can drop, whose scores are between 0 and 1; 0.02 is two points"
        )


def _by_doc(result: TaskResult) -> dict[str, Sample]:
    return {sample.doc_hash: sample for sample in result.samples}


def _values(result: TaskResult, score: Score, whose: str) -> list[float]:
    """Scores by the hash of their document."""
    found = next((each for each in result.run.scores if each.key == score.key), None)
    if found is None:
        known = ", ".join(each.key for each in result.run.scores)
        raise ResultsError(
            f"{result.run.task}: the {whose} has no score {score.key}, which the baseline has; it has: {known}"
        )
    if found.score is None:
        raise ResultsError(
            f"{result.run.task}: the score {score.key} of the {whose} is no finite number; evaluate it again, or "
            "choose another metric"
        )
    if found.aggregation != "mean" or score.aggregation != "mean":
        raise ResultsError(
            f"{result.run.task}: {score.key} is no mean over documents, so they cannot be paired; choose another "
            "metric, or leave the task out"
        )
    if found.higher_is_better != score.higher_is_better:
        raise ResultsError(
            f"{result.run.task}: {score.key} of the {whose} has another direction than the baseline's; "
            "evaluate both with the same task"
        )
    scores = [sample.scores.get(score.key) for _, sample in sorted(_by_doc(result).items())]
    values = [each for each in scores if each is not None]
    if len(values) < len(scores):
        raise ResultsError(
            f"{result.run.task}: {len(scores) - len(values)} of {len(scores)} documents of the {whose} have no score "
            f"{score.key}; evaluate them, or choose another metric"
        )
    return values


def _identity(result: TaskResult) -> tuple[object, ...]:
    """What makes two runs repeats of each other; seeds, batches and machines may differ."""
    run = result.run
    return run.model, run.base, run.strategy, run.control, [expert.content for expert in run.experts]
