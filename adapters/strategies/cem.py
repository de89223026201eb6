"""``adapt=cem``: few-shot adaptation. The cross-entropy method looks for the mixture that does best on labelled docs.

Transformer², section 3.2 C and A.4.
"""

from __future__ import annotations

import math

from tqdm import tqdm

from t2.adapters.expert import Z
from t2.adapters.search import CEM, Candidate, Key
from t2.adapters.strategies.base import Choice, Job, Plan, Scorer
from t2.adapters.strategies.mixing import choose, groups_of
from t2.core.errors import ArgumentError
from t2.core.record import Generation, HeldOut
from t2.core.seeds import derive_seed

_BASE: Candidate = ()


class CemStrategy:
    """Search α on the adaptation docs once per task, then answer every prompt with the best mixture.

    The base model is a candidate too: where no mixture beats it, it stays. When every candidate of the whole search
    scores the same there is NO SIGNAL to follow, and the base stays as well.
    """

    needs_experts = True
    needs_labels = True

    def plan(self, job: Job) -> Plan:
        """Search, and one choice.

        Raises:
            ArgumentError: a search setting is out of range, or the job has no scorer.
        """
        if job.scorer is None:
            raise ArgumentError("adapt=cem needs labelled adaptation docs")
        memory = _Memory(job, job.scorer)
        options, count, width = job.options, len(job.experts), len(groups_of(job))
        starts = [[1.0 if i == k else 0.0 for i in range(count)] * width for k in range(count)]
        mean = [1 / count] * (count * width)
        search = CEM(
            mean,
            population=options.population,
            generations=options.generations,
            elite=options.elite,
            seed=derive_seed(options.seed, "search", job.task),
            starts=starts if count == 1 else [*starts, mean],
        )
        history = []
        base = memory.values([_BASE])[0]
        bar = tqdm(
            total=options.generations, desc=f"{job.task}: searching", unit="generation", disable=not job.progress
        )
        with bar:
            while candidates := search.ask():
                before = len(memory.scores)
                values = memory.values(candidates)
                search.tell(candidates, memory.keys(candidates))
                best = max(memory.scores.values())
                history.append(
                    Generation(
                        best=best * memory.sign,
                        mean=_mean(values) * memory.sign,
                        evaluations=len(memory.scores) - before,
                    )
                )
                bar.set_postfix(best=f"{best * memory.sign:.4g}", base=f"{base * memory.sign:.4g}")
                bar.update()
                if memory.flat():
                    break
        stopped = search.stopped or "all of them tied, likelihoods too"
        spent = f"{len(memory.scores)} mixtures in {len(history)} generations; {stopped}"
        if len(set(memory.scores.values())) == 1:
            held_out = HeldOut(docs=job.scorer.docs, before=base * memory.sign, after=base * memory.sign)
            tied = f"every mixture scores {base * memory.sign:.4g} on the adaptation docs"
            note = f"NO SIGNAL: {tied}, so the base stays ({spent})"
            return Plan((Choice(),), (0,) * len(job.prompts), note, held_out, tuple(history), no_signal=True)
        top = max(memory.scores.values())
        finalists = [candidate for candidate, value in memory.scores.items() if value == top]
        keys = memory.keys(finalists)
        winner = finalists[max(range(len(finalists)), key=lambda i: (keys[i], -i))]
        held_out = HeldOut(docs=job.scorer.docs, before=base * memory.sign, after=top * memory.sign)
        note = f"best of {spent}" if winner != _BASE else f"no mixture beats the base ({spent})"
        return Plan((memory.choice(winner),), (0,) * len(job.prompts), note, held_out, tuple(history))


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


class _Memory:
    """Every candidate's score, so that none is evaluated twice; tie-breaks only for those that tie."""

    def __init__(self, job: Job, scorer: Scorer) -> None:
        self.job = job
        self.scorer = scorer
        self.scores: dict[Candidate, float] = {}
        self.sign = 1.0 if scorer.higher_is_better else -1.0
        self._ties: dict[Candidate, float] = {}

    def choice(self, candidate: Candidate) -> Choice:
        if candidate == _BASE:
            return Choice()
        count = len(self.job.experts)
        return choose(self.job, [candidate[i : i + count] for i in range(0, len(candidate), count)])

    def flat(self) -> bool:
        """Whether nothing distinguishes the candidates so far, not even the likelihood of right answers."""
        return len(set(self.scores.values())) == 1 and len(set(self.keys(list(self.scores)))) == 1

    def values(self, candidates: list[Candidate]) -> list[float]:
        """Scores, higher is better; −inf for a metric that is no number and for coefficients that give no mixture."""
        new: dict[Candidate, Z | None] = {}
        for candidate in candidates:
            if candidate not in self.scores and candidate not in new:
                try:
                    new[candidate] = self.choice(candidate).z
                except ArgumentError:
                    self.scores[candidate] = -math.inf
        if new:
            scores = self.scorer.evaluate(list(new.values()))
            for candidate, score in zip(new, scores, strict=True):
                self.scores[candidate] = score.value if math.isfinite(score.value) else -math.inf
        return [self.scores[candidate] for candidate in candidates]

    def keys(self, candidates: list[Candidate]) -> list[Key]:
        """Keys of candidates that have a score; the top ones get a tie-break too, since a later generation may tie."""
        values = [self.scores[candidate] for candidate in candidates]
        top = max(values)
        shared = {value for value in values if value == top or values.count(value) > 1} - {-math.inf}
        new = [
            candidate
            for candidate in dict.fromkeys(candidates)
            if self.scores[candidate] in shared and candidate not in self._ties
        ]
        if new:
            ties = self.scorer.tie_break([self.choice(candidate).z for candidate in new])
            self._ties.update((c, -math.inf if math.isnan(tie) else tie) for c, tie in zip(new, ties, strict=True))
        return [(self.scores[candidate], self._ties.get(candidate, 0.0)) for candidate in candidates]
