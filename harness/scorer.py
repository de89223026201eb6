"""Scores mixtures on a task's adaptation docs, many mixtures in one batched run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance

from t2.adapters.engine import Engine
from t2.adapters.expert import Z, z_digest
from t2.adapters.strategies.base import Score
from t2.core.seeds import derive_seed
from t2.harness.journal import Journal
from t2.harness.tasks import Response, TaskDocs

SHARES = frozenset(
    ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "pass_at_1", "pass@1", "f1", "accuracy")
)
"""Metrics that by their name lie between 0 and 1 for every doc."""
_BASE = z_digest(None)


class TaskScorer:
    """A scorer (:class:`t2.adapters.strategies.Scorer`) over labelled docs of an lm-eval task.

    Every mixture answers every doc once, however often it is asked for.

    A metric that only some docs have is aggregated over these, as in lm-eval. If the answer determines whether a doc
    has the metric, only mixtures that have it on the same docs as the base are comparable; others score −inf.

    Args:
        task: the task as docs, requests and metrics.
        docs: the adaptation docs.
        engine: runs the model.
        prompts: the text of each doc, for a dispatch.
        seed: of sampling, where the task samples its answers.
        progress: show a progress bar per call that takes longer than a second.
    """

    def __init__(
        self,
        task: TaskDocs,
        docs: Sequence[Any],
        engine: Engine,
        *,
        prompts: Sequence[str] = (),
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        self.task = task
        self.docs = len(docs)
        self.prompts = prompts
        self.higher_is_better = task.objective.higher_is_better
        self.requests = task.instances(docs)
        self._docs = list(docs)
        self._engine = engine
        self._seed = derive_seed(seed, "adaptation answers", task.name)
        self._progress = progress
        self._answers: dict[tuple[str, int], list[Response]] = {}
        self._metrics: dict[tuple[str, int], dict[str, Any]] = {}
        self._ties: dict[tuple[str, int], tuple[float, int]] = {}
        self._seen: dict[tuple[int, tuple[Response, ...]], dict[str, Any]] = {}
        self._binary: bool | None = None
        self._incomparable: set[str] = set()
        bounded = task.averages and task.objective.metric in SHARES and task.objective.higher_is_better
        # What samples gives other answers in other batches, so nothing about it is certain.
        self._bounded = bounded and not any(task.samples(request) for requests in self.requests for request in requests)

        self._journal: Journal | None = None

    def keep(self, journal: Journal) -> int:
        """Keep answers in a journal from now on; what it holds already is not asked again, and is counted here."""
        self._journal = journal
        for kind, cell, value in journal.read():
            if not 0 <= cell[1] < self.docs:
                continue
            if kind == "tie":
                self._ties[cell] = (float(value[0]), int(value[1]))
            elif kind == "answer" and len(value) == len(self.requests[cell[1]]):
                self._answers[cell] = [(float(r[0]), bool(r[1])) if isinstance(r, list) else r for r in value]
        return len(self._answers)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """0 and 1 for a mean of a known metric, until a value outside of them is seen."""
        return (0.0, 1.0) if self._bounded else None

    def evaluate(self, mixtures: Sequence[Z | None], docs: Sequence[int] | None = None) -> list[Score]:
        """Answer adaptation docs, by default all, under each mixture (None is the base) and score the answers."""
        shown = range(self.docs) if docs is None else docs
        keys = [z_digest(z) for z in mixtures]
        self._answer(dict(zip(keys, mixtures, strict=True)), [(key, doc) for key in keys for doc in shown])
        return [self._score([(key, doc) for doc in shown]) for key in keys]

    def combine(self, mixtures: Sequence[Z | None], rows: Sequence[int], docs: Sequence[int] | None = None) -> Score:
        """The score of answering each doc under the mixture that ``rows`` gives for it."""
        shown = range(self.docs) if docs is None else docs
        keys = [z_digest(z) for z in mixtures]
        cells = [(keys[row], doc) for row, doc in zip(rows, shown, strict=True)]
        self._answer(dict(zip(keys, mixtures, strict=True)), cells)
        return self._score(cells)

    def _answer(self, mixtures: dict[str, Z | None], cells: Sequence[tuple[str, int]]) -> None:
        new = [cell for cell in dict.fromkeys(cells) if cell not in self._answers]
        if not new:
            return
        used = {key: row for row, key in enumerate(dict.fromkeys(key for key, _ in new))}
        answers = self.task.answer(
            self._engine,
            [self.requests[doc] for _, doc in new],
            [mixtures[key] for key in used],
            [used[key] for key, _ in new],
            seed=self._seed,
            progress=f"{self.task.name}: adaptation docs" if self._progress else None,
        )
        for cell, responses in zip(new, answers, strict=True):
            self._answers[cell] = responses
        if self._journal is not None:
            self._journal.add("answer", zip(new, answers, strict=True))

    @property
    def incomparable(self) -> int:
        """Number of mixtures that have the metric on other docs than the base."""
        return len(self._incomparable)

    def _has_value(self, cell: tuple[str, int]) -> bool:
        return self.task.has_value(self._metrics_of(cell))

    def _differs_from_base(self, cells: Sequence[tuple[str, int]]) -> bool:
        """Whether cells have the metric on other docs than the base, which answers docs without it."""
        lacking = [(_BASE, doc) for key, doc in cells if not self._has_value((key, doc))]
        self._answer({_BASE: None}, lacking)
        different = {
            key
            for key, doc in cells
            if (_BASE, doc) in self._answers and self._has_value((key, doc)) != self._has_value((_BASE, doc))
        }
        self._incomparable |= different
        return bool(different)

    def _score(self, cells: Sequence[tuple[str, int]]) -> Score:
        metrics = [self._metrics_of(cell) for cell in cells]
        numbers = [self.task.number(m) for m in metrics]
        scored = [self.task.has_value(m) for m in metrics]
        per_doc = tuple(number for number in numbers if number is not None)
        if len(per_doc) < len(numbers) or not all(0 <= number <= 1 for number in per_doc):
            self._bounded = False
        if self._binary is None and per_doc:
            whole = len(per_doc) == sum(scored) and all(number in (0.0, 1.0) for number in per_doc)
            self._binary = whole and self.higher_is_better
        if self._differs_from_base(cells) or (not any(scored) and len(cells) < self.docs):
            return Score(-math.inf)
        return Score(self.task.aggregate(metrics), per_doc if len(per_doc) == len(numbers) else ())

    def _metrics_of(self, cell: tuple[str, int]) -> dict[str, Any]:
        if cell not in self._metrics:
            # Candidates often give the same answer, and checking one may run a program.
            index, responses = cell[1], self._answers[cell]
            seen = (index, tuple(responses))
            if seen not in self._seen:
                self._seen[seen] = self.task.metrics(self._docs[index], self.requests[index], responses)
            self._metrics[cell] = self._seen[seen]
        return self._metrics[cell]

    def tie_break(self, mixtures: Sequence[Z | None], docs: Sequence[int] | None = None) -> list[float]:
        """Mean log-likelihood per token of each mixture's own right answers, in nats; −inf when it has none.

        For metrics that are not 0/1, of the gold answers. Only mixtures that :meth:`evaluate` has seen on these docs.
        """
        shown = range(self.docs) if docs is None else docs
        keys = [z_digest(z) for z in mixtures]
        zs = dict(zip(keys, mixtures, strict=True))
        asked: list[tuple[tuple[str, int], tuple[Instance, str]]] = []
        for cell in dict.fromkeys((key, doc) for key in keys for doc in shown):
            if cell in self._ties:
                continue
            self._ties[cell] = (0.0, 0)
            if not self._has_value(cell):
                continue
            if self._binary and not self.task.right(self._metrics_of(cell)):
                continue
            if self.task.output_type != "generate_until":
                self._ties[cell] = self._gold(cell)
            elif text := self._right_text(cell):
                asked.append((cell, (self.requests[cell[1]][0], text)))
        if asked:
            used = {key: row for row, key in enumerate(dict.fromkeys(cell[0] for cell, _ in asked))}
            found = self.task.likelihoods(
                self._engine,
                [pair for _, pair in asked],
                [zs[key] for key in used],
                [used[cell[0]] for cell, _ in asked],
                progress=f"{self.task.name}: breaking ties" if self._progress else None,
            )
            ties = dict(zip((cell for cell, _ in asked), found, strict=True))
            self._ties.update(ties)
            if self._journal is not None:
                self._journal.add("tie", ties.items())
        return [self._mean_tie(key, shown) for key in keys]

    def _mean_tie(self, key: str, docs: Sequence[int]) -> float:
        found = [self._ties[key, doc] for doc in docs]
        count = sum(tokens for _, tokens in found)
        return sum(loglikelihood for loglikelihood, _ in found) / count if count else -math.inf

    def _gold(self, cell: tuple[str, int]) -> tuple[float, int]:
        """Log-likelihood and tokens of a doc's gold answer, the likeliest where it has several."""
        index = cell[1]
        found = [(-math.inf, 0)]
        for gold in self.task.gold_index(self._docs[index]):
            response = self._answers[cell][gold]
            loglikelihood = response[0] if isinstance(response, tuple) else float(response)
            parts = self.task.continuations(self.requests[index][gold])
            found.append((loglikelihood, sum(len(part.continuation) for part in parts)))
        best = max(found)
        return best if best[1] else (0.0, 0)

    def _right_text(self, cell: tuple[str, int]) -> str:
        answer = self._answers[cell][0] if self._binary else self.task.gold_text(self._docs[cell[1]])
        return str(answer or "")
