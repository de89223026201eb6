"""The metric of searches and of run files, and metrics that only some documents have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z
from t2.core.errors import TaskError
from t2.core.results import from_lm_eval
from t2.harness import discovery
from t2.harness.scorer import TaskScorer
from t2.harness.tasks import TaskDocs
from tests.harness import tiny

ROWS = tiny.questions(8, 100)


@pytest.fixture
def engine(tiny_lm: HFLM) -> TransformersEngine:
    return TransformersEngine(tiny_lm.model, tiny_lm.tokenizer, "tiny")


@pytest.fixture
def mixtures(engine: TransformersEngine) -> list[Z | None]:
    generator = torch.Generator().manual_seed(1)
    ranks = engine.ranks()
    return [None, *({n: 1 + 0.4 * torch.randn(r, generator=generator) for n, r in ranks.items()} for _ in range(4))]


def scorer(task: Any, lm: HFLM, engine: TransformersEngine, **asked: Any) -> TaskScorer:
    return TaskScorer(TaskDocs(task, lm, **asked), ROWS, engine, progress=False)


def has_metric(doc: dict[str, Any]) -> bool:
    return int(doc["q"].split()[0]) % 2 == 0


def of_some_docs(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """``vowel`` for every other document, an unlisted metric for the others."""
    return tiny.vowel_early(doc, results) if has_metric(doc) else {"other": 0.0}


def of_some_answers(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """``vowel`` if the answer begins with a letter before n, as if others could not be parsed."""
    return {"vowel": 1.0, "extra": 1.0} if results[0][:1].lower() < "n" else {"extra": 0.0}


@pytest.mark.parametrize("aggregation", ["mean", "median"])
def test_a_metric_of_some_documents_is_aggregated_as_lm_eval_does(
    aggregation: str, tiny_lm: HFLM, engine: TransformersEngine, mixtures: list[Z | None]
) -> None:
    def make(**more: Any) -> Any:
        metrics = [tiny.metric("vowel", aggregation=aggregation)]
        return tiny.text_task(process_results=of_some_docs, metric_list=metrics, **more)

    scores = scorer(make(), tiny_lm, engine).evaluate(mixtures)
    for z, score in zip(mixtures, scores, strict=True):
        with engine.applied(z):
            results = tiny.evaluate(tiny_lm, [make(data=tiny.splits(test=ROWS))])
        assert score.value == pytest.approx(results["results"]["tiny_text"]["vowel,none"])
        read = from_lm_eval({**results, "config": {"model": "hf"}}, "tiny_text", results["samples"]["tiny_text"], "x")
        assert (read.run.score().metric, read.run.score().n) == ("vowel", sum(map(has_metric, ROWS)))
        assert read.run.score().score == pytest.approx(score.value)
    assert len({score.value for score in scores}) > 1 or aggregation == "median"


def test_documents_without_the_metric_break_no_ties(
    tiny_lm: HFLM, engine: TransformersEngine, mixtures: list[Z | None]
) -> None:
    some = scorer(tiny.text_task(process_results=of_some_docs), tiny_lm, engine)
    some.evaluate(mixtures)
    every = scorer(tiny.text_task(), tiny_lm, engine)
    every.evaluate(mixtures)
    docs = [place for place, row in enumerate(ROWS) if has_metric(row)]
    assert some.tie_break(mixtures) == pytest.approx(every.tie_break(mixtures, docs), rel=1e-3)


def test_a_mixture_with_the_metric_on_other_documents_than_the_base_cannot_win(
    tiny_lm: HFLM, engine: TransformersEngine, mixtures: list[Z | None]
) -> None:
    metrics = [tiny.metric("vowel"), tiny.metric("extra")]
    task = tiny.text_task(process_results=of_some_answers, metric_list=metrics)
    found = scorer(task, tiny_lm, engine)
    scores = found.evaluate(mixtures)
    there = [
        [found.task.has_value(found._metrics_of((key, doc))) for doc in range(len(ROWS))]
        for key in dict.fromkeys(key for key, _ in found._answers)
    ]
    assert scores[0].value == 1.0
    assert [score.value for score in scores] == [1.0 if one == there[0] else -math.inf for one in there]
    assert found.incomparable == sum(one != there[0] for one in there) > 0


def test_a_metric_that_no_document_has_is_refused_in_one_line(tiny_lm: HFLM, engine: TransformersEngine) -> None:
    metrics = [tiny.metric("absent"), tiny.metric("vowel")]
    never = scorer(tiny.text_task(metric_list=metrics), tiny_lm, engine)
    with pytest.raises(
        TaskError, match="metric absent for any of 8 docs; it computed: vowel; choose another with metric="
    ):
        never.evaluate([None])


def test_a_search_a_run_and_its_filter_go_by_the_first_of_metric_list(tmp_path: Path) -> None:
    """``process_results`` has another order, and lm-eval parses the filter ``none`` as None."""
    discovery.install()
    base = tiny.save_model(tmp_path / "tiny")
    expert = tiny.save_expert(tmp_path / "alpha.safetensors", tiny.engine_of(base), 0)

    def swapped(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        return {"length": float(len(results[0])), **tiny.vowel_early(doc, results)}

    def task() -> Any:
        return tiny.text_task(
            process_results=swapped,
            metric_list=[tiny.metric("vowel"), tiny.metric("length")],
            filter_list=[
                {"name": "strict", "filter": [{"function": "lowercase"}, {"function": "take_first"}]},
                {"name": "none", "filter": [{"function": "take_first"}]},
            ],
        )

    search = "adapt=cem,population=2,generations=1,shots=2"
    for given, filter_ in (("", "strict"), (",filter=none", "none")):
        args = f"pretrained={base},device=cpu,{search},experts={expert}{given}"
        results = tiny.evaluate("t2", [task()], model_args=args, limit=3)
        (record,) = results["config"]["t2"]["records"]
        assert (record["objective"]["metric"], record["objective"]["filter"]) == ("vowel", filter_)
        run = from_lm_eval(results, "tiny_text", results["samples"]["tiny_text"], "here").run
        assert run.score().key == "vowel,strict"
