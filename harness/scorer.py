"""Scores mixtures on a task's adaptation docs, many mixtures in one batched run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

from t2.adapters.engine import Engine, ScoreRequest
from t2.adapters.expert import Z
from t2.adapters.strategies.base import Score
from t2.core.seeds import derive_seed
from t2.harness.tasks import Response, TaskDocs, encode_pair


class TaskScorer:
    """A scorer (:class:`t2.adapters.strategies.Scorer`) over labelled docs of an lm-eval task.

    Every mixture is evaluated once, however often it is asked for.

    Args:
        task: the task as docs, requests and metrics.
        docs: the adaptation docs.
        engine: runs the model.
        seed: of sampling, where the task samples its answers.
        progress: show a progress bar per call that takes longer than a second.
    """

    def __init__(
        self, task: TaskDocs, docs: Sequence[Any], engine: Engine, *, seed: int = 0, progress: bool = True
    ) -> None:
        self.task = task
        self.docs = len(docs)
        self.higher_is_better = task.objective.higher_is_better
        self.requests = task.instances(docs)
        self._docs = list(docs)
        self._engine = engine
        self._seed = derive_seed(seed, "adaptation answers", task.name)
        self._progress = progress
        self._answers: dict[str, list[list[Response]]] = {}
        self._metrics: dict[str, list[dict[str, Any]]] = {}
        self._ties: dict[str, float] = {}
        self._seen: dict[tuple[int, tuple[Response, ...]], dict[str, Any]] = {}
        self._binary: bool | None = None

    def evaluate(self, mixtures: Sequence[Z | None]) -> list[Score]:
        """Answer the adaptation docs under each mixture (None is the base) and score the answers."""
        keys = [_digest(z) for z in mixtures]
        new = {key: z for key, z in zip(keys, mixtures, strict=True) if key not in self._answers}
        if new:
            count = len(self._docs)
            answers = self.task.answer(
                self._engine,
                self.requests * len(new),
                list(new.values()),
                [row for row in range(len(new)) for _ in range(count)],
                seed=self._seed,
                progress=f"{self.task.name}: adaptation docs" if self._progress else None,
            )
            for row, key in enumerate(new):
                self._answers[key] = answers[row * count : (row + 1) * count]
                self._metrics[key] = [self._metric(i, found) for i, found in enumerate(self._answers[key])]
        return [self._score(key) for key in keys]

    def _score(self, key: str) -> Score:
        metrics = self._metrics[key]
        numbers = [self.task.number(m) for m in metrics]
        per_doc = tuple(number for number in numbers if number is not None)
        if self._binary is None:
            whole = len(per_doc) == len(numbers) and all(number in (0.0, 1.0) for number in per_doc)
            self._binary = whole and self.higher_is_better
        return Score(self.task.aggregate(metrics), per_doc if len(per_doc) == len(numbers) else ())

    def _metric(self, index: int, responses: list[Response]) -> dict[str, Any]:
        # Candidates often give the same answer, and checking one may run a program.
        seen = (index, tuple(responses))
        if seen not in self._seen:
            self._seen[seen] = self.task.metrics(self._docs[index], self.requests[index], responses)
        return self._seen[seen]

    def tie_break(self, mixtures: Sequence[Z | None]) -> list[float]:
        """Mean log-likelihood per token of each mixture's own right answers, in nats; −inf when it has none.

        For metrics that are not 0/1, of the gold answers. Only mixtures that :meth:`evaluate` has seen.
        """
        keys = [_digest(z) for z in mixtures]
        new = {key: z for key, z in zip(keys, mixtures, strict=True) if key not in self._ties}
        totals = {key: [0.0, 0] for key in new}
        asked: list[tuple[str, ScoreRequest]] = []
        for key in new:
            for index in range(len(self._docs)):
                if self._binary and not self.task.right(self._metrics[key][index]):
                    continue
                if self.task.output_type == "generate_until":
                    request = self._right_text(key, index)
                    if request is not None:
                        asked.append((key, request))
                else:
                    loglikelihood, tokens = self._gold(key, index)
                    totals[key][0] += loglikelihood
                    totals[key][1] += tokens
        if asked:
            rows = {key: row for row, key in enumerate(new)}
            scored = self._engine.score(
                [request for _, request in asked],
                list(new.values()),
                [rows[key] for key, _ in asked],
                progress=f"{self.task.name}: breaking ties" if self._progress else None,
            )
            for (key, request), result in zip(asked, scored, strict=True):
                totals[key][0] += result.loglikelihood
                totals[key][1] += len(request.continuation)
        for key, (total, count) in totals.items():
            self._ties[key] = total / count if count else -math.inf
        return [self._ties[key] for key in keys]

    def _gold(self, key: str, index: int) -> tuple[float, int]:
        """Log-likelihood and tokens of a doc's gold answer, the likeliest where it has several."""
        found = [(-math.inf, 0)]
        for gold in self.task.gold_index(self._docs[index]):
            response = self._answers[key][index][gold]
            loglikelihood = response[0] if isinstance(response, tuple) else float(response)
            parts = self.task.continuations(self.requests[index][gold])
            found.append((loglikelihood, sum(len(part.continuation) for part in parts)))
        best = max(found)
        return best if best[1] else (0.0, 0)

    def _right_text(self, key: str, index: int) -> ScoreRequest | None:
        answer = self._answers[key][index][0] if self._binary else self.task.gold_text(self._docs[index])
        if not answer:
            return None
        pair = encode_pair(self.task.lm, str(self.requests[index][0].args[0]), str(answer))
        return self.task.window(*pair) if pair[1] else None


def _digest(z: Z | None) -> str:
    if z is None:
        return ""
    digest = hashlib.sha256()
    for name in sorted(z):
        digest.update(name.encode())
        digest.update(z[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
