"""A task's first metric is the first that it lists, in results, runs and boards."""

from __future__ import annotations

from typing import Any

import pytest

from t2.core.errors import ResultsError
from t2.core.results import TaskResult, first_metric, from_lm_eval
from t2.core.runfile import decode_run, encode_run

DOCS = 4


def lm_eval_results(
    metrics: list[dict[str, float]],
    *,
    listed: list[dict[str, Any]] | None,
    directions: dict[str, bool],
    filters: tuple[str, ...] = ("none",),
) -> TaskResult:
    """Results of lm-eval for a task whose documents have these metrics, as t2 reads them."""
    samples = [
        {
            "doc_id": place,
            "doc_hash": f"{place:064x}",
            "prompt_hash": "b" * 64,
            "target_hash": "c" * 64,
            "filter": filter_,
            "filtered_resps": ["x"],
            "metrics": list(found),
            **found,
        }
        for filter_ in filters
        for place, found in enumerate(metrics)
    ]
    stated: dict[str, Any] = {"alias": "t"}
    for filter_ in filters:
        for name in dict.fromkeys(name for found in metrics for name in found):
            values = [found[name] for found in metrics if name in found]
            stated[f"{name},{filter_}"] = sum(values) / len(values)
            stated[f"{name}_stderr,{filter_}"] = "N/A"
    most = max(sum(name in found for found in metrics) for name in {name for found in metrics for name in found})
    return from_lm_eval(
        {
            "results": {"t": stated},
            "configs": {"t": {"metric_list": listed} if listed is not None else {}},
            "config": {"model": "hf", "model_args": "pretrained=x"},
            "versions": {"t": 1},
            "n-shot": {"t": 0},
            "n-samples": {"t": {"original": len(metrics), "effective": most}},
            "higher_is_better": {"t": directions},
        },
        "t",
        samples,
        "here",
    )


def metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


@pytest.mark.parametrize(
    ("listed", "computed", "first"),
    [
        (["a", "b"], ["b", "a"], "a"),
        (["a", "b"], ["b"], "b"),
        (["pass_at_k", "b"], ["pass@1", "pass@10", "b"], "pass@1"),
        (["pass_at_k"], ["pass@1"], "pass@1"),
        (["a", "b"], ["b", "c"], "b"),
        ([], ["c"], "c"),
    ],
)
def test_the_first_listed_metric_that_was_computed_is_the_first(
    listed: list[str], computed: list[str], first: str
) -> None:
    assert first_metric(listed, computed) == first


@pytest.mark.parametrize(
    ("listed", "directions"),
    [
        ([metric("wanted"), metric("extra")], {"wanted": True, "extra": True}),
        (None, {"wanted": True, "extra": True}),
        # lm-eval writes a function as its source.
        ([metric("def wanted(items):\n    return items\n"), metric("extra")], {"wanted": True, "extra": True}),
    ],
    ids=["metric_list", "no metric_list", "a function"],
)
def test_the_first_score_is_of_the_first_metric_whatever_order_process_results_has(
    listed: list[dict[str, Any]] | None, directions: dict[str, bool]
) -> None:
    metrics = [{"extra": 1.0, "wanted": 0.0}] * DOCS
    result = lm_eval_results(metrics, listed=listed, directions=directions, filters=("strict", "none"))
    keys = ["wanted,strict", "extra,strict", "wanted,none", "extra,none"]
    assert [score.key for score in result.run.scores] == keys
    assert result.run.score(filter="none").key == "wanted,none"
    file = decode_run(encode_run(result), "here")
    assert file.run.score().key == "wanted,strict"
    assert file.confirmed == set(keys)


def test_the_order_of_a_file_without_a_metric_list_stands_and_so_does_its_digest() -> None:
    result = lm_eval_results([{"a": 1.0, "b": 0.0}] * DOCS, listed=None, directions={"a": True, "b": True})
    assert [score.key for score in result.run.scores] == ["a,none", "b,none"]
    assert result.run.digest() == "82d4955c1b091635ba7aa363957bb0f01e4d33c7d83da702d9b554cbf125277d"
    swapped = result.run.model_copy(update={"scores": result.run.scores[::-1]})
    assert decode_run(encode_run(TaskResult(swapped, result.samples)), "here").run.score().key == "b,none"


def test_a_metric_of_some_documents_is_read_as_lm_eval_aggregated_it() -> None:
    metrics = [{"m": 1.0}, {"n": 0.0}, {"m": 1.0}, {"n": 1.0}, {"n": 0.0}]
    result = lm_eval_results(metrics, listed=[metric("m"), metric("n")], directions={"m": True, "n": True})
    assert [(score.key, score.score, score.n) for score in result.run.scores] == [
        ("m,none", 1.0, 2),
        ("n,none", pytest.approx(1 / 3), 3),
    ]
    assert decode_run(encode_run(result), "here").confirmed == {"m,none", "n,none"}


def test_predict_only_has_no_score() -> None:
    with pytest.raises(ResultsError, match="here, task t: evaluated with --predict_only, so it has no score"):
        lm_eval_results([{"bypass": 999.0}] * DOCS, listed=[{"metric": "bypass"}], directions={"bypass": True})
    # The task's process_results still computes its metrics, but lm-eval does not have their directions.
    with pytest.raises(ResultsError, match="--predict_only"):
        lm_eval_results([{"acc": 0.5}] * DOCS, listed=[{"metric": "bypass"}], directions={"bypass": True})
    both = lm_eval_results(
        [{"bypass": 999.0, "acc": 1.0}] * DOCS, listed=[metric("acc")], directions={"acc": True, "bypass": True}
    )
    assert [score.key for score in both.run.scores] == ["acc,none"]
