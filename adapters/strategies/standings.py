"""What a search knows of its candidates: none is evaluated twice, and none further than the search needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from t2.adapters.expert import Z
from t2.adapters.search import Candidate, Key, Needs
from t2.adapters.strategies.base import Choice, Job
from t2.adapters.strategies.mixing import choose
from t2.adapters.strategies.racing import SHARE, Runner, halve, race
from t2.adapters.strategies.scorers import Metered
from t2.core.errors import ArgumentError
from t2.core.seeds import generator

BASE: Candidate = ()
_LAST: Key = (-math.inf, -math.inf)
_FEW = 4
"""With fewer docs there is no part of them to halve by."""


class Standings:
    """Scores and tie-breaks of the candidates of one search.

    Args:
        job: what is searched.
        scorer: scores mixtures, and counts.

    Attributes:
        scores: of the candidates that have answered all adaptation docs, higher is better, in the order in which they
            were asked for; −inf for a metric that is no number and for coefficients that give no mixture.
        sign: −1 where the task's own metric is the better the lower it is.
    """

    def __init__(self, job: Job, scorer: Metered) -> None:
        self.job = job
        self.scorer = scorer
        self.scores: dict[Candidate, float] = {}
        self.sign = 1.0 if scorer.higher_is_better else -1.0
        self._totals: dict[Candidate, float] = {}
        self._right = [0.0] * scorer.docs
        self._ties: dict[Candidate, float] = {}
        self._told = -math.inf
        self._left: dict[Candidate, float] = {}

    @property
    def seen(self) -> int:
        """Mixtures so far, those that left before they had answered all docs among them."""
        return len(self.scores) + len(self._left)

    @property
    def spent(self) -> float:
        """Evaluations so far; a mixture that left counts as the part of the docs that it answered."""
        return len(self.scores) + sum(self._left.values())

    @property
    def top(self) -> float:
        """The best score so far."""
        return max(self.scores.values())

    @property
    def unbeatable(self) -> bool:
        """Whether no mixture could score better than the best one so far."""
        bounds = self.scorer.bounds
        return bounds is not None and self.top >= bounds[1]

    def choice(self, candidate: Candidate) -> Choice:
        """The mixture of a candidate.

        Raises:
            ArgumentError: its coefficients give none.
        """
        if candidate == BASE:
            return Choice()
        count = len(self.job.experts)
        return choose(self.job, [candidate[i : i + count] for i in range(0, len(candidate), count)])

    def flat(self) -> bool:
        """Whether nothing distinguishes the candidates so far, not even the likelihood of right answers."""
        if len(set(self.scores.values())) > 1:
            return False
        every = list(self.scores)
        self._break_ties(every)
        return len({self._key(candidate) for candidate in every}) == 1

    def free(self, candidate: Candidate) -> bool:
        """Whether its score costs nothing: it is known, was asked for before the search, or gives no mixture."""
        if candidate in self.scores:
            return True
        try:
            return self.scorer.knows(self.choice(candidate).z)
        except ArgumentError:
            return True

    def values(self, candidates: Sequence[Candidate]) -> list[float]:
        """Scores of candidates, all of which answer all docs."""
        self._evaluate(self._new(candidates))
        return [self.scores[candidate] for candidate in candidates]

    def compare(
        self,
        candidates: Sequence[Candidate],
        generation: Sequence[Candidate],
        needs: Needs,
        number: int,
        step: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Evaluate candidates of a generation as far as a search needs it; see :data:`Options.economy`.

        Args:
            candidates: the ones to evaluate now.
            generation: all that compete.
            needs: of the search.
            number: of the generation.
            step: told how many more candidates are done with, as it goes.
        """
        new = self._new(candidates)
        step(len(candidates) - len(new))
        economy, docs = self.job.options.economy, self.scorer.docs
        if economy == "halving" and docs >= _FEW:
            stay = self._halved(new, generation, needs, number)
            step(len(new) - len(stay))
            new = stay
        elif economy != "none" and self.scorer.bounds is not None and needs.best < len(generation):
            self._race(new, generation, needs.best, step)
            return
        self._evaluate(new)
        step(len(new))

    def finished(self, candidates: Sequence[Candidate]) -> list[float]:
        """Scores of those that answered all docs."""
        return [self.scores[candidate] for candidate in candidates if candidate in self.scores]

    def keys(self, candidates: Sequence[Candidate], needs: Needs) -> list[Key]:
        """What a search is told of a generation; candidates that have left it come last.

        Likelihoods are asked for only where they decide: who is the best, who is among the best, and their order where
        the search needs it.
        """
        values = [self.scores.get(candidate, -math.inf) for candidate in candidates]
        ranked = sorted(values, reverse=True)
        edge = ranked[min(needs.best, len(ranked)) - 1]
        decided = {value for value in ranked[: needs.best] if ranked.count(value) > 1} if needs.ordered else set()
        if sum(value >= edge for value in values) > needs.best:
            decided.add(edge)
        if ranked[0] >= self._told:
            decided.add(ranked[0])
        self._told = max(self._told, ranked[0])
        asked = [c for c, value in zip(candidates, values, strict=True) if value in decided - {-math.inf}]
        self._break_ties(asked)
        return [self._key(candidate) if candidate in self.scores else _LAST for candidate in candidates]

    def winner(self) -> Candidate:
        """The best candidate; among equal ones the first."""
        finalists = [candidate for candidate, value in self.scores.items() if value == self.top]
        if self.top > -math.inf:
            self._break_ties(finalists)
        return max(finalists, key=lambda candidate: (self._key(candidate), -finalists.index(candidate)))

    def _key(self, candidate: Candidate) -> Key:
        return self.scores[candidate], self._ties.get(candidate, 0.0)

    def _new(self, candidates: Sequence[Candidate]) -> dict[Candidate, Z | None]:
        """The mixtures of those that are not known yet; those that give none are known to be last."""
        new: dict[Candidate, Z | None] = {}
        for candidate in candidates:
            if candidate not in self.scores and candidate not in new:
                try:
                    new[candidate] = self.choice(candidate).z
                except ArgumentError:
                    self.scores[candidate] = -math.inf
        return new

    def _evaluate(self, new: dict[Candidate, Z | None]) -> None:
        if not new:
            return
        for candidate, score in zip(new, self.scorer.evaluate(list(new.values())), strict=True):
            self._left.pop(candidate, None)
            self.scores[candidate] = score.value if math.isfinite(score.value) else -math.inf
            if score.per_doc:
                self._totals[candidate] = sum(score.per_doc)
                self._right = [total + value for total, value in zip(self._right, score.per_doc, strict=True)]

    def _race(
        self,
        new: dict[Candidate, Z | None],
        generation: Sequence[Candidate],
        best: int,
        step: Callable[[int], None],
    ) -> None:
        copies = {candidate: generation.count(candidate) for candidate in dict.fromkeys(generation)}
        rivals = [self._totals[c] for c, times in copies.items() if c in self._totals for _ in range(times)]
        entered = sorted(new, key=self._distance)
        runners = [Runner(new[candidate], copies[candidate]) for candidate in entered]
        order = sorted(range(self.scorer.docs), key=lambda doc: (self._right[doc], doc))
        finished = race(runners, self.scorer, best=best, rivals=rivals, order=order, step=step)
        self._left.update((c, runner.answered / len(order)) for c, runner in zip(entered, runners, strict=True))
        through = {candidate for candidate, done in zip(entered, finished, strict=True) if done}
        self._evaluate({candidate: z for candidate, z in new.items() if candidate in through})

    def _distance(self, candidate: Candidate) -> float:
        """How far a candidate lies from the middle of the best so far; those near it are likely to do well."""
        best = [known for known, value in self.scores.items() if value == self.top and known != BASE]
        if not best:
            return 0.0
        middle = [sum(values) / len(best) for values in zip(*best, strict=True)]
        return math.dist(middle, candidate)

    def _halved(
        self, new: dict[Candidate, Z | None], generation: Sequence[Candidate], needs: Needs, number: int
    ) -> dict[Candidate, Z | None]:
        known = {c: self.choice(c).z for c in dict.fromkeys(generation) if self.scores.get(c, -math.inf) > -math.inf}
        every = {**known, **new}
        # The full CMA-ES learns from the worst as well; those that leave share the last place then.
        keep = max(math.ceil(len(every) / 2), needs.best if needs.best < len(generation) else 0)
        if not new or keep >= len(every):
            return new
        rng = generator(self.job.options.seed, "halving", self.job.task, number)
        docs = sorted(rng.permutation(self.scorer.docs)[: math.ceil(SHARE * self.scorer.docs)].tolist())
        names = list(every)
        stay = {names[i] for i in halve(list(every.values()), self.scorer, keep=keep, docs=docs)}
        self._left.update((candidate, len(docs) / self.scorer.docs) for candidate in new if candidate not in stay)
        return {candidate: z for candidate, z in new.items() if candidate in stay}

    def _break_ties(self, candidates: Sequence[Candidate]) -> None:
        new = [c for c in dict.fromkeys(candidates) if c not in self._ties and self.scores[c] > -math.inf]
        if new:
            ties = self.scorer.tie_break([self.choice(candidate).z for candidate in new])
            self._ties.update((c, -math.inf if math.isnan(tie) else tie) for c, tie in zip(new, ties, strict=True))
