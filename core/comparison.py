"""Two sets of results, paired document by document and judged.

Documents are paired by the hash of their content, never by their place. A document that the data set repeats is one
pair, with the means of its scores: a repeat is no further evidence. Results are compared only if everything except the
model is the same: task version, shots, documents, prompts, right answers, metric and filter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from t2.core.errors import ArgumentError, ResultsError, nearest
from t2.core.results import EvaluatedBase, Score, TaskResult
from t2.core.statistics import paired
from t2.core.verdicts import TaskVerdict, Verdict, decide, noise_floor


@dataclass(frozen=True, slots=True)
class ComparedTask:
    """One task of two runs.

    Attributes:
        task, metric, filter: what was compared.
        higher_is_better: of the metric.
        baseline, candidate: mean scores of the paired documents.
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
        unpaired: skipped tasks, whose score in the baseline is not a mean over documents.
    """

    verdict: Verdict
    tasks: tuple[ComparedTask, ...]
    margin: float
    level: float
    power: float
    unpaired: tuple[str, ...] = ()


def compare_results(
    candidate: Sequence[TaskResult],
    baseline: Sequence[TaskResult],
    *,
    margin: float,
    noise: Sequence[Sequence[TaskResult]] = (),
    tasks: Sequence[str] = (),
    metric: str | None = None,
    filter: str | None = None,
    skip_unpaired: bool = False,
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
        metric, filter: the score to compare; by default each task's first.
        skip_unpaired: without ``tasks``, skip tasks whose score is not a mean over documents, unless all are such. The
            baseline's score decides, or the candidate's if the baseline lacks the task.
        level: of the intervals, and 1 − level the risk of a false verdict.
        power: of the smallest drop that is told.
        seed: of the bootstrap.

    Raises:
        ResultsError: the two cannot be paired: another task version, number of shots, documents, prompts, answers,
            metric or filter; a task or a score is missing; the first metrics differ; documents have a score on one side
            only; or the repeats are not of one evaluation.
        ArgumentError: a margin, level or power is out of range, or the margin is all that scores of 0 to 1 can drop.
    """
    ours, theirs = _by_task(candidate, "candidate"), _by_task(baseline, "baseline")
    names = sorted(set(tasks)) or sorted(ours.keys() | theirs.keys())
    unpaired: list[str] = []
    if skip_unpaired and not tasks:
        unpaired = [name for name in names if not _is_mean({**ours, **theirs}[name], metric, filter)]
    if len(unpaired) == len(names):
        unpaired = []
    names = [name for name in names if name not in unpaired]
    repeats = [_by_task(run, f"noise run {number}") for number, run in enumerate(noise, start=1)]
    differences, floors, scores, means = {}, {}, {}, {}
    for name in names:
        after, before = _find(ours, name, "candidate", tasks), _find(theirs, name, "baseline", tasks)
        _check(after, before, "candidate")
        score = _score(after, before, metric, filter)
        scores[name] = score
        of_baseline, of_candidate = _scored(before, score, "baseline"), _scored(after, score, "candidate")
        old = _values(of_baseline, of_candidate, before, score, "baseline")
        new = _values(of_candidate, of_baseline, after, score, "candidate")
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
            named = [(run, f"noise run {number}") for number, run in enumerate(runs, start=1)]
            floors[name] = noise_floor(
                [_values(_scored(run, score, whose), of_baseline, run, score, whose) for run, whose in named]
            )
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
    return Comparison(decision.verdict, compared, margin, level, power, tuple(unpaired))


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
    """Refuse results that differ in more than the experts or, if one side has none, the model."""
    task = baseline.run.task
    ours, theirs = one.run.base, baseline.run.base
    are_known = None not in (ours.identity, theirs.identity)
    if one.run.experts and baseline.run.experts and are_known and ours.identity != theirs.identity:
        raise ResultsError(
            f"{task}: the {whose} was scored on another model ({_describe(ours)}) than the baseline "
            f"({_describe(theirs)}); evaluate both on one model, loaded the same way"
        )
    for what, here, there in (
        ("version", one.run.task_version, baseline.run.task_version),
        ("number of few-shot examples", one.run.n_shot, baseline.run.n_shot),
    ):
        if here != there:
            raise ResultsError(
                f"{task}: the {whose} has {what} {here} and the baseline {there}; evaluate both with the same"
            )
    count = len(baseline.samples)
    missing, more = _count_unmatched(one, baseline, "doc_hash"), _count_unmatched(baseline, one, "doc_hash")
    if missing or more:
        raise ResultsError(
            f"{task}: the {whose} lacks {missing} of the baseline's {count} documents and has {more} others; "
            "evaluate both on the same documents, with the same limit"
        )
    for what, cause, changed in (
        (
            "prompts",
            "few-shot examples, chat template or instructions",
            _count_unmatched(one, baseline, "doc_hash", "prompt_hash"),
        ),
        ("right answers", "the task or its data", _count_unmatched(one, baseline, "doc_hash", "target_hash")),
    ):
        if changed:
            raise ResultsError(
                f"{task}: {changed} of {count} {what} of the {whose} differ from the baseline's ({cause}); "
                "evaluate both the same way"
            )


def _describe(base: EvaluatedBase) -> str:
    return f"{base.id}, identity {str(base.identity)[:12]}"


def _count_unmatched(one: TaskResult, other: TaskResult, *fields: str) -> int:
    """Count the samples of ``other`` without a match in ``one``; each matches at most one."""
    content = attrgetter(*fields)
    return (Counter(map(content, other.samples)) - Counter(map(content, one.samples))).total()


def _check_margin(margin: float, task: str, scores: Sequence[float]) -> None:
    """Refuse points where shares are meant: nothing would ever be called."""
    if margin >= 1 and all(0 <= score <= 1 for score in scores):
        raise ArgumentError(
            f"a margin of {margin:g} is all that {task} can drop, whose scores are between 0 and 1; 0.02 is two points"
        )


def _is_mean(result: TaskResult, metric: str | None, filter: str | None) -> bool:
    return result.run.score(metric, filter).aggregation == "mean"


def _score(candidate: TaskResult, baseline: TaskResult, metric: str | None, filter: str | None) -> Score:
    """Return the score by which a task is compared.

    Raises:
        ResultsError: the baseline has no such score, or no metric is named and the two sides have other first metrics.
    """
    score = baseline.run.score(metric, filter)
    if metric is None:
        first = next((each for each in candidate.run.scores if each.filter == score.filter), score)
        keys = [each.key for each in candidate.run.scores]
        if first.metric != score.metric and score.key in keys:
            raise ResultsError(
                f"{baseline.run.task}: the first metric of the candidate is {first.metric}, that of the baseline "
                f"{score.metric}; name one with --metric, or push the results of the older run again"
            )
    return score


def _scored(result: TaskResult, score: Score, whose: str) -> dict[str, list[float]]:
    """Return the values of a mean score by document hash; only documents that have any."""
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
    return result.by_document(score)


def _values(
    scored: Mapping[str, Sequence[float]],
    other: Mapping[str, Sequence[float]],
    result: TaskResult,
    score: Score,
    whose: str,
) -> list[float]:
    """Return the mean value of each scored document, sorted by document hash.

    Raises:
        ResultsError: some documents have a score on the other side only.
    """
    lacking = sum(len(scored.get(doc, ())) < len(values) for doc, values in other.items())
    if lacking:
        count = len({sample.doc_hash for sample in result.samples})
        raise ResultsError(
            f"{result.run.task}: {lacking} of {count} documents of the {whose} have no score {score.key}, but have one "
            "in the results to compare with; evaluate them or choose another metric"
        )
    return [math.fsum(values) / len(values) for _, values in sorted(scored.items())]


def _identity(result: TaskResult) -> tuple[object, ...]:
    """What makes two runs repeats of each other; seeds, batches and machines may differ."""
    run = result.run
    return run.model, run.base, run.strategy, run.control, [expert.content for expert in run.experts]
