from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from t2.adapters.engine import Scored, ScoreRequest
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z
from t2.harness.scorer import TaskScorer
from t2.harness.tasks import TaskDocs
from tests.harness import tiny


class Counting(TransformersEngine):
    """The engine, counting the rows it is asked for."""

    asked = 0

    def score(self, requests: Any, *args: Any, **kwargs: Any) -> list[Scored]:
        self.asked += len(requests)
        return super().score(requests, *args, **kwargs)

    def generate(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        self.asked += len(requests)
        return super().generate(requests, *args, **kwargs)


@pytest.fixture
def engine(tiny_lm: HFLM) -> Counting:
    return Counting(tiny_lm.model, tiny_lm.tokenizer, "tiny")


@pytest.fixture
def mixtures(tiny_engine: TransformersEngine) -> list[Z | None]:
    generator = torch.Generator().manual_seed(1)
    ranks = tiny_engine.ranks()
    return [None, *({n: 1 + 0.4 * torch.randn(r, generator=generator) for n, r in ranks.items()} for _ in range(4))]


def _scorer(task: Any, lm: HFLM, engine: Counting, **kwargs: Any) -> TaskScorer:
    return TaskScorer(TaskDocs(task, lm, **kwargs), tiny.questions(8, 100), engine, progress=False)


@pytest.mark.parametrize("make", [tiny.choice_task, tiny.text_task, tiny.rolling_task])
def test_a_mixture_is_evaluated_once_and_as_if_alone(
    make: Any, tiny_lm: HFLM, engine: Counting, mixtures: list[Z | None]
) -> None:
    scorer = _scorer(make(), tiny_lm, engine)
    together = scorer.evaluate(mixtures)
    asked = engine.asked
    assert scorer.evaluate([mixtures[2], None, mixtures[2]]) == [together[2], together[0], together[2]]
    assert engine.asked == asked
    alone = [_scorer(make(), tiny_lm, engine).evaluate([z])[0] for z in mixtures]
    assert [score.value for score in together] == pytest.approx([score.value for score in alone], rel=1e-3)
    assert len({score.value for score in together}) > 1


def test_the_score_is_what_lm_eval_computes(tiny_lm: HFLM, engine: Counting, mixtures: list[Z | None]) -> None:
    rows = tiny.questions(8, 100)
    for make, name in ((tiny.choice_task, "acc"), (tiny.text_task, "vowel")):
        scores = _scorer(make(), tiny_lm, engine).evaluate(mixtures)
        for z, score in zip(mixtures, scores, strict=True):
            with engine.applied(z):
                results = tiny.evaluate(tiny_lm, [make(data=tiny.splits(test=rows))])
            task = next(iter(results["results"]))
            assert score.value == pytest.approx(results["results"][task][f"{name},none"])
            assert score.per_doc == tuple(sample[name] for sample in results["samples"][task])


def test_ties_are_broken_by_the_likelihood_of_right_choices(
    tiny_lm: HFLM, engine: Counting, mixtures: list[Z | None]
) -> None:
    scorer = _scorer(tiny.choice_task(), tiny_lm, engine)
    scores = scorer.evaluate(mixtures)
    asked = engine.asked
    ties = scorer.tie_break(mixtures)
    assert engine.asked == asked
    rows = tiny.questions(8, 100)
    for z, score, tie in zip(mixtures, scores, ties, strict=True):
        total, tokens = 0.0, 0
        for row, right in zip(rows, score.per_doc, strict=True):
            if right:
                pair = tiny_lm._encode_pair(f"Q: {row['q']}\nA:", f" {row['choices'][row['gold']]}")
                total += engine.score([ScoreRequest(*map(tuple, pair))], [z])[0].loglikelihood
                tokens += len(pair[1])
        assert tie == pytest.approx(total / tokens if tokens else -math.inf, rel=1e-3)


def test_no_right_answer_loses_every_tie(tiny_lm: HFLM, engine: Counting) -> None:
    never = tiny.text_task(process_results=lambda doc, results: {"vowel": 0.0})
    scorer = _scorer(never, tiny_lm, engine)
    scorer.evaluate([None])
    assert scorer.tie_break([None]) == [-math.inf]


def test_only_right_generated_answers_are_asked_about(
    tiny_lm: HFLM, engine: Counting, mixtures: list[Z | None]
) -> None:
    scorer = _scorer(tiny.text_task(), tiny_lm, engine)
    scores = scorer.evaluate(mixtures)
    engine.asked = 0
    ties = scorer.tie_break(mixtures)
    assert engine.asked == sum(sum(score.per_doc) for score in scores) > 0
    assert all((tie > -math.inf) == (score.value > 0) for tie, score in zip(ties, scores, strict=True))
    assert scorer.tie_break(mixtures) == ties
    assert engine.asked == sum(sum(score.per_doc) for score in scores)


def test_a_graded_metric_ties_by_the_gold_answer(tiny_lm: HFLM, engine: Counting, mixtures: list[Z | None]) -> None:
    graded = tiny.text_task(process_results=lambda doc, results: {"vowel": len(results[0]) / 10 + 0.01})
    scorer = _scorer(graded, tiny_lm, engine)
    scorer.evaluate(mixtures[:2])
    ties = scorer.tie_break(mixtures[:2])
    rows = tiny.questions(8, 100)
    for z, tie in zip(mixtures[:2], ties, strict=True):
        pairs = [tiny_lm._encode_pair(f"Q: {r['q']}\nA:", f" {r['choices'][r['gold']]}") for r in rows]
        scored = engine.score([ScoreRequest(*map(tuple, pair)) for pair in pairs], [z])
        tokens = sum(len(pair[1]) for pair in pairs)
        assert tie == pytest.approx(sum(s.loglikelihood for s in scored) / tokens, rel=1e-3)


def test_an_answer_is_checked_once_however_many_mixtures_give_it(
    tiny_lm: HFLM, engine: Counting, tmp_path: Path
) -> None:
    checked: list[tuple[str, str]] = []

    def check(doc: Any, results: list[str]) -> dict[str, float]:
        checked.append((doc["q"], results[0]))
        return {"vowel": 1.0}

    scorer = _scorer(tiny.text_task(process_results=check), tiny_lm, engine)
    nearly = {name: torch.full((rank,), 1.00001) for name, rank in engine.ranks().items()}
    scorer.evaluate([None, nearly])
    assert len(checked) == len(set(checked))
