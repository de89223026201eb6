"""Two sets of results are paired by document, judged, and refused where more than the model differs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from t2.core.comparison import compare_results
from t2.core.comparison_summary import as_json, as_markdown
from t2.core.digests import sha256
from t2.core.errors import ArgumentError, ResultsError
from t2.core.record import ExpertRef
from t2.core.results import EvaluatedBase, Sample, Score, TaskResult, TaskRun, samples_digests
from t2.core.verdicts import Verdict


def result(
    values: Sequence[float],
    *,
    task: str = "arc",
    key: str = "acc,none",
    prompt: str = "",
    target: str = "",
    first: int = 0,
    **run: Any,
) -> TaskResult:
    """Results whose documents scored so."""
    samples = tuple(
        Sample(
            doc_hash=sha256(f"doc {place}".encode()),
            prompt_hash=sha256(f"prompt {place}{prompt}".encode()),
            target_hash=sha256(f"target {place}{target}".encode()),
            answers={"none": sha256(b"answer")},
            scores={key: value},
        )
        for place, value in enumerate(values, start=first)
    )
    metric, filter_ = key.split(",")
    docs, prompts, digest = samples_digests(samples)
    score = Score(
        metric=metric,
        filter=filter_,
        score=sum(values) / len(values),
        stderr=None,
        n=len(values),
        higher_is_better=run.pop("higher_is_better", True),
        aggregation=run.pop("aggregation", "mean"),
    )
    defaults: dict[str, Any] = {
        "task_version": "1.0",
        "n_shot": 0,
        "model": "t2",
        "base": EvaluatedBase(id="tiny"),
        "dtype": "float32",
        "strategy": "expert",
        "control": "none",
        "experts": (),
        "settings": {},
        "evaluation": {},
        "seeds": {},
        "record": None,
        "versions": {},
        "evaluated_at": None,
    }
    told = TaskRun(
        task=task,
        docs=len(samples),
        docs_digest=docs,
        prompts_digest=prompts,
        samples_digest=digest,
        scores=(score,),
        **{**defaults, **run},
    )
    return TaskResult(told, samples)


BASELINE = [1.0] * 150 + [0.0] * 150
WORSE = [0.0] * 15 + [1.0] * 135 + [0.0] * 150


def test_documents_are_paired_by_what_they_are_and_not_by_their_place() -> None:
    shuffled = result(WORSE)
    shuffled = replace(shuffled, samples=tuple(reversed(shuffled.samples)))
    found = compare_results([shuffled], [result(BASELINE)], margin=0.02)
    (task,) = found.tasks
    assert found.verdict is Verdict.REGRESSED
    assert (task.baseline, task.candidate) == (0.5, 0.45)
    assert (task.said.difference.wins, task.said.difference.losses) == (0, 15)
    same = compare_results([replace(shuffled, run=result(WORSE).run)], [result(WORSE)], margin=0.02)
    assert (same.tasks[0].said.difference.wins, same.tasks[0].said.difference.losses) == (0, 0)


def test_of_a_metric_where_lower_is_better_a_rise_is_a_regression() -> None:
    errors, more = [0.2] * 40, [0.2 + 0.01 * (place % 7) for place in range(40)]
    found = compare_results(
        [result(more, higher_is_better=False)], [result(errors, higher_is_better=False)], margin=0.01
    )
    assert found.verdict is Verdict.REGRESSED
    assert found.tasks[0].said.difference.difference < 0


def test_all_tasks_are_judged_together_or_those_that_are_named() -> None:
    candidate = [result(WORSE), result(BASELINE, task="gsm")]
    baseline = [result(BASELINE), result(BASELINE, task="gsm")]
    found = compare_results(candidate, baseline, margin=0.02)
    assert {task.task: task.said.verdict for task in found.tasks} == {"arc": "REGRESSED", "gsm": "NO CHANGE"}
    assert found.tasks[0].said.p == pytest.approx(2 * found.tasks[0].said.difference.p)
    assert compare_results(candidate, baseline, margin=0.02, tasks=["gsm"]).verdict is Verdict.NO_CHANGE
    with pytest.raises(ResultsError, match=r"the candidate has no results of 'gsm', which the other has; evaluate it"):
        compare_results(candidate[:1], baseline, margin=0.02)
    with pytest.raises(ResultsError, match=r"the baseline has no results of 'gsm'"):
        compare_results(candidate, baseline[:1], margin=0.02)
    with pytest.raises(ResultsError, match=r"the candidate has no results of 'gsmm'; did you mean 'gsm'\?$"):
        compare_results(candidate, baseline, margin=0.02, tasks=["gsmm"])
    with pytest.raises(ResultsError, match="the candidate has arc twice"):
        compare_results([candidate[0]] * 2, baseline[:1], margin=0.02)


def test_a_drop_within_the_spread_of_repeats_is_none() -> None:
    repeats = [[result(BASELINE)], [result([0.0] * 18 + BASELINE[18:])]]
    found = compare_results([result(WORSE)], [result(BASELINE)], margin=0.02, noise=repeats)
    assert found.verdict is Verdict.UNDERPOWERED
    assert found.tasks[0].said.noise == pytest.approx(0.06)
    assert "Noise floor: arc 0.0600." in as_markdown(found, "new", "old")
    with pytest.raises(ResultsError, match="noise run 2 is no repeat of the first"):
        compare_results(
            [result(WORSE)],
            [result(BASELINE)],
            margin=0.02,
            noise=[[result(BASELINE)], [result(BASELINE, strategy="none")]],
        )
    with pytest.raises(ResultsError, match="noise run 2 lacks 1 of the baseline's 300"):
        compare_results(
            [result(WORSE)], [result(BASELINE)], margin=0.02, noise=[[result(BASELINE)], [result(BASELINE[:-1])]]
        )


@pytest.mark.parametrize(
    ("candidate", "says"),
    [
        (result(WORSE, task_version="2.0"), "arc: the candidate has version 2.0 and the baseline 1.0"),
        (result(WORSE, n_shot=5), "arc: the candidate has number of few-shot examples 5 and the baseline 0"),
        (result(WORSE[:-3]), "lacks 3 of the baseline's 300 documents and has 0 others"),
        (result(WORSE, first=2), "lacks 2 of the baseline's 300 documents and has 2 others"),
        (result(WORSE, prompt="!"), "300 of 300 prompts of the candidate differ"),
        (result(WORSE, target="!"), "300 of 300 right answers of the candidate differ"),
        (result(WORSE, key="f1,none"), "the candidate has no score acc,none, which the baseline has; it has: f1,none"),
        (result(WORSE, key="acc,strict"), "the candidate has no score acc,none"),
        (result(WORSE, aggregation="other"), "acc,none is no mean over documents"),
        (result(WORSE, higher_is_better=False), "acc,none of the candidate has another direction"),
    ],
)
def test_what_differs_in_more_than_the_model_is_refused_with_the_reason(candidate: TaskResult, says: str) -> None:
    with pytest.raises(ResultsError) as refused:
        compare_results([candidate], [result(BASELINE)], margin=0.02)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_points_where_shares_are_meant_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"a margin of 2 is all that arc can drop, .*; 0\.02 is two points"):
        compare_results([result(WORSE)], [result(BASELINE)], margin=2)
    in_percent = compare_results([result([100 * each for each in WORSE])], [result([30.0] * 300)], margin=2)
    assert in_percent.verdict is Verdict.IMPROVED


def test_a_score_that_is_no_number_is_refused_and_called_so() -> None:
    unknown = result(WORSE)
    score = unknown.run.scores[0].model_copy(update={"score": None, "aggregation": "other"})
    unknown = replace(unknown, run=unknown.run.model_copy(update={"scores": (score,)}))
    for candidate, baseline, whose in ((unknown, result(WORSE), "candidate"), (result(WORSE), unknown, "baseline")):
        with pytest.raises(ResultsError, match=f"arc: the score acc,none of the {whose} is no finite number"):
            compare_results([candidate], [baseline], margin=0.02)


def test_a_document_without_a_score_is_refused() -> None:
    holed = result(WORSE)
    first = holed.samples[0].model_copy(update={"scores": {}})
    with pytest.raises(ResultsError, match="1 of 300 documents of the candidate have no score acc,none"):
        compare_results([replace(holed, samples=(first, *holed.samples[1:]))], [result(BASELINE)], margin=0.02)


def test_the_summary_holds_what_was_found() -> None:
    found = compare_results([result(WORSE, task="a|b")], [result(BASELINE, task="a|b")], margin=0.02)
    told = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert told["verdict"] == "REGRESSED"
    (task,) = told["tasks"]
    assert task["difference"] == pytest.approx(-0.05)
    assert task["interval"][0] < -0.05 < task["interval"][1] < 0
    assert task["p_holm"] == task["p"] == pytest.approx(2 / 2**15)
    text = as_markdown(found, "new`s", "old")
    assert text.startswith("## REGRESSED: the candidate is worse\n")
    assert r"| a\|b | REGRESSED | acc | 300 | 0.5000 | 0.4500 | -0.0500 |" in text
    assert "Candidate `new s`, baseline `old`" in text
    few = compare_results([result([1.0, 0.0])], [result([1.0, 1.0])], margin=0.02)
    assert few.tasks[0].said.smallest_drop == math.inf
    assert as_json(few)["tasks"][0]["smallest_drop"] is None


def test_experts_are_not_judged_across_models() -> None:
    """Runs of experts are refused if their models' identities differ; runs of bases are not."""
    expert = (ExpertRef(name="math", digest=sha256(b"expert")),)
    one, other = (EvaluatedBase(id="tiny", identity=sha256(text)) for text in (b"one", b"other"))
    values = [1.0, 0.0, 1.0]
    baseline = result(values, base=one, experts=expert)
    with pytest.raises(ResultsError, match=r"scored on another model \(tiny, identity .*evaluate both on one"):
        compare_results([result(values, base=other, experts=expert)], [baseline], margin=0.1)
    for candidate in (
        result(values, base=one, experts=expert),
        result(values, base=EvaluatedBase(id="tiny"), experts=expert),
        result(values, base=other, strategy="none"),
    ):
        compare_results([candidate], [baseline], margin=0.1)


def repeated(values: Sequence[float], times: Sequence[int], **run: Any) -> TaskResult:
    """Results of a data set with ``times[n]`` copies of document n, each with another prompt."""
    once = result(values, **run)
    samples = tuple(
        sample.model_copy(
            update={
                "prompt_hash": sha256(f"{sample.prompt_hash} {number}".encode()),
                "answers": {"none": sha256(f"{number} {sample.scores}".encode())},
            }
        )
        for sample, count in zip(once.samples, times, strict=True)
        for number in range(count)
    )
    docs, prompts, digest = samples_digests(samples)
    scores = [sample.scores["acc,none"] for sample in samples]
    score = once.run.scores[0].model_copy(update={"score": sum(scores) / len(scores), "n": len(scores)})
    update = {
        "docs": len(samples),
        "docs_digest": docs,
        "prompts_digest": prompts,
        "samples_digest": digest,
        "scores": (score,),
    }
    return TaskResult(once.run.model_copy(update=update), samples)


def test_a_repeated_document_is_one_pair_however_often_and_in_whatever_order_it_comes() -> None:
    times = [40, *[1] * 299]
    baseline, candidate = repeated([1.0] * 300, times), repeated([0.0, *[1.0] * 299], times)
    found = compare_results([candidate], [baseline], margin=0.02)
    difference = found.tasks[0].said.difference
    # Forty losses would be a regression, but they are of one document.
    assert (difference.n, difference.wins, difference.losses) == (300, 0, 1)
    assert found.verdict is not Verdict.REGRESSED
    shuffled = replace(candidate, samples=tuple(reversed(candidate.samples)))
    assert compare_results([shuffled], [baseline], margin=0.02) == found


def test_repeats_with_different_scores_count_by_their_mean() -> None:
    baseline = repeated([1.0] * 30, [2] * 30)
    samples = [
        sample.model_copy(update={"scores": {"acc,none": float(place % 2)}})
        for place, sample in enumerate(repeated([0.0] * 30, [2] * 30).samples)
    ]
    found = compare_results([replace(baseline, samples=tuple(samples))], [baseline], margin=0.02)
    assert (found.tasks[0].candidate, found.tasks[0].said.difference.n) == (0.5, 30)


def test_a_document_that_is_repeated_on_one_side_alone_is_not_paired() -> None:
    once, twice = repeated([1.0] * 30, [1] * 30), repeated([1.0] * 30, [2, *[1] * 29])
    with pytest.raises(ResultsError, match="lacks 1 of the baseline's 31 documents and has 0 others"):
        compare_results([once], [twice], margin=0.02)
    with pytest.raises(ResultsError, match="lacks 0 of the baseline's 30 documents and has 1 others"):
        compare_results([twice], [once], margin=0.02)
    other = twice.samples[0].model_copy(update={"prompt_hash": sha256(b"another")})
    with pytest.raises(ResultsError, match="1 of 31 prompts of the candidate differ"):
        compare_results([replace(twice, samples=(other, *twice.samples[1:]))], [twice], margin=0.02)


def without_scores(of: TaskResult, places: Sequence[int]) -> TaskResult:
    samples = [
        sample.model_copy(update={"scores": {}}) if place in places else sample
        for place, sample in enumerate(of.samples)
    ]
    return replace(of, samples=tuple(samples))


def test_documents_without_the_metric_on_both_sides_are_left_out() -> None:
    lacking = range(100)
    found = compare_results(
        [without_scores(result(WORSE), lacking)], [without_scores(result(BASELINE), lacking)], margin=0.02
    )
    assert (found.tasks[0].said.difference.n, found.tasks[0].baseline) == (200, 0.25)
    for whose, candidate, baseline in (
        ("candidate", [1, 2, 3], [1, 2]),
        ("baseline", [1, 2], [1, 2, 3, 4]),
    ):
        with pytest.raises(ResultsError, match=f"of 300 documents of the {whose} have no score acc,none, but have one"):
            compare_results(
                [without_scores(result(WORSE), candidate)], [without_scores(result(BASELINE), baseline)], margin=0.02
            )


def test_a_score_that_is_no_mean_blocks_no_other_task() -> None:
    perplexity = result(BASELINE, task="wikitext", aggregation="other")
    candidate, baseline = [result(WORSE)], [result(BASELINE), perplexity]
    for side in (candidate, [*candidate, perplexity]):
        found = compare_results(side, baseline, margin=0.02, skip_unpaired=True)
        assert ([task.task for task in found.tasks], found.unpaired) == (["arc"], ("wikitext",))
        assert as_json(found)["unpaired"] == ["wikitext"]
        assert "Left out: wikitext" in as_markdown(found, "new", "old")
    # The candidate's aggregation must not remove a task.
    claimed = [result(WORSE, aggregation="other"), result(WORSE, task="gsm")]
    with pytest.raises(ResultsError, match="arc: acc,none is no mean over documents"):
        compare_results(claimed, [result(BASELINE), result(BASELINE, task="gsm")], margin=0.02, skip_unpaired=True)
    for tasks, skip in ((["arc", "wikitext"], True), ([], False)):
        with pytest.raises(ResultsError, match="wikitext: acc,none is no mean over documents"):
            compare_results([*candidate, perplexity], baseline, margin=0.02, tasks=tasks, skip_unpaired=skip)


def test_two_first_metrics_are_not_compared_unless_one_is_named() -> None:
    def both(first: str) -> TaskResult:
        made = result(BASELINE)
        other = made.run.scores[0].model_copy(update={"metric": "f1"})
        scores = (other, made.run.scores[0]) if first == "f1" else (made.run.scores[0], other)
        samples = [
            sample.model_copy(update={"scores": dict.fromkeys(("acc,none", "f1,none"), sample.scores["acc,none"])})
            for sample in made.samples
        ]
        return TaskResult(made.run.model_copy(update={"scores": scores}), tuple(samples))

    with pytest.raises(ResultsError, match="the first metric of the candidate is f1, that of the baseline acc; name"):
        compare_results([both("f1")], [both("acc")], margin=0.02)
    assert compare_results([both("f1")], [both("acc")], margin=0.02, metric="acc").tasks[0].metric == "acc"
