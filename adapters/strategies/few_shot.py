"""``adapt=cem``: few-shot adaptation. A search looks for the mixture that does best on labelled docs.

Transformer², section 3.2 C and A.4, where the search is the cross-entropy method; ``search=`` chooses another one.
"""

from __future__ import annotations

import math
from dataclasses import replace

from tqdm import tqdm

from t2.adapters.expert import Z
from t2.adapters.search import Candidate, Key, Meter, Search, make_search
from t2.adapters.strategies.base import Choice, Job, Plan
from t2.adapters.strategies.mixing import choose, groups_of
from t2.adapters.strategies.preselect import alone, cost, preselect, rounds
from t2.adapters.strategies.scorers import Metered
from t2.core.errors import ArgumentError
from t2.core.record import Generation, HeldOut, Preselection, SearchReport
from t2.core.seeds import derive_seed

_BASE: Candidate = ()


class FewShotStrategy:
    """Search α on the adaptation docs once per task, then answer every prompt with the best mixture.

    Of many experts the search first picks some (:mod:`t2.adapters.strategies.preselect`). The base model is a candidate
    too: where no mixture beats it, it stays. When every candidate of the whole search scores the same there is NO
    SIGNAL to follow, and the base stays as well.
    """

    needs_experts = True
    needs_labels = True

    def plan(self, job: Job) -> Plan:
        """Search, and one choice.

        Raises:
            ArgumentError: a search setting is out of range, the budget is too small, or the job has no scorer.
        """
        if job.scorer is None:
            raise ArgumentError("adapt=cem needs labelled adaptation docs")
        check_search(job)
        job.engine.bases(dict.fromkeys(name for expert in job.experts for name in expert.z))
        meter = Meter(job.options.budget, job.clock)
        meter.pace = job.pace
        scorer = Metered(job.scorer, meter)
        job.say(estimate(job, seconds_of_one(job, scorer, meter)))
        preselected = None
        if job.options.preselect is not None and len(job.experts) > job.options.preselect:
            selected = preselect(job, scorer, meter)
            job, preselected = replace(job, experts=selected.experts), selected.report
        return _search(job, _Memory(job, scorer), meter, preselected)


def seconds_of_one(job: Job, scorer: Metered, meter: Meter) -> float:
    """Seconds that the first expert takes on all adaptation docs, after the base, which the search also needs."""
    scorer.evaluate([None])
    if meter.allowed() == 0:
        return meter.seconds
    before = meter.seconds
    try:
        scorer.evaluate([alone(job, 0)])
    except ArgumentError:
        return before
    return meter.seconds - before


def estimate(job: Job, once: float) -> str:
    """What a search may cost, as told before it begins."""
    options, count = job.options, len(job.experts)
    assert job.scorer is not None
    wanted = options.preselect
    of = f"{count} experts" if wanted is None or count <= wanted else f"the best {wanted} of {count} experts"
    most = once * options.population * options.generations
    text = (
        f"{job.task}: searching mixtures of {of} on {job.scorer.docs} adaptation docs by {options.search}; "
        f"about {seconds_text(once)} a mixture, {seconds_text(once * options.population)} a generation of "
        f"{options.population}, at most {seconds_text(most)} for {options.generations} generations"
    )
    if wanted is not None and count > wanted:
        look = cost(rounds(job.scorer.docs, count, wanted), job.scorer.docs)
        text += f", and before them {seconds_text(once * look)} to choose the experts"
    budget = options.budget
    if budget.seconds is not None:
        text += f"; the budget of {budget.describe()} allows about {budget.seconds / max(once, 1e-9):.0f} mixtures"
    elif budget.evaluations is not None:
        text += f"; the budget of {budget.describe()} allows about {seconds_text(once * budget.evaluations)}"
    return text


def seconds_text(value: float) -> str:
    """A duration for people."""
    return f"{value:.1f} s" if value < 10 else f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min"


def check_search(job: Job) -> None:
    """Tell settings out of range before anything is scored.

    Raises:
        ArgumentError: there is one.
    """
    make(replace(job, experts=job.experts[:1]))


def make(job: Job) -> Search:
    """The search over a job's coefficients, which begins with each expert alone and their mean."""
    options, count, width = job.options, len(job.experts), len(groups_of(job))
    starts = [[1.0 if i == k else 0.0 for i in range(count)] * width for k in range(count)]
    mean = [1 / count] * (count * width)
    return make_search(
        options.search,
        mean,
        population=options.population,
        generations=options.generations,
        elite=options.elite,
        seed=derive_seed(options.seed, "search", job.task),
        starts=starts if count == 1 else [*starts, mean],
    )


def _search(job: Job, memory: _Memory, meter: Meter, preselected: Preselection | None) -> Plan:
    search = make(job)
    history: list[Generation] = []
    base = memory.values([_BASE])[0]
    stopped: str | None = None
    bar = tqdm(
        total=job.options.generations, desc=f"{job.task}: searching", unit="generation", disable=not job.progress
    )
    with bar:
        while stopped is None and (candidates := search.ask()):
            before = len(memory.scores)
            done = _afford(candidates, memory, meter)
            if done:
                best = max(memory.scores.values())
                history.append(
                    Generation(
                        best=best * memory.sign,
                        mean=_mean(memory.values(done)) * memory.sign,
                        evaluations=len(memory.scores) - before,
                    )
                )
                bar.set_postfix(best=f"{best * memory.sign:.4g}", base=f"{base * memory.sign:.4g}")
                bar.update()
            if len(done) < len(candidates):
                stopped = meter.spent()
                break
            search.tell(candidates, memory.keys(candidates))
            if search.stopped is None and memory.flat():
                stopped = "all of them tied, likelihoods too"
            elif search.stopped is None and meter.allowed() == 0:
                stopped = meter.spent()
    return _outcome(job, memory, history, stopped or search.stopped or "", meter, preselected)


def _afford(candidates: list[Candidate], memory: _Memory, meter: Meter) -> list[Candidate]:
    """Evaluate candidates in their order as far as the budget goes, and return those.

    Under a time limit several smaller batches, each as large as seems to fit.
    """
    done = 0
    while done < len(candidates):
        allowed = meter.allowed()
        end, new = done, set()
        while end < len(candidates):
            if allowed is not None and not memory.free(candidates[end]):
                new.add(candidates[end])
                if len(new) > allowed:
                    break
            end += 1
        if end == done:
            break
        memory.values(candidates[done:end])
        done = end
    return candidates[:done]


def _outcome(
    job: Job,
    memory: _Memory,
    history: list[Generation],
    stopped: str,
    meter: Meter,
    preselected: Preselection | None,
) -> Plan:
    sign, base, rows = memory.sign, memory.scores[_BASE], (0,) * len(job.prompts)
    top = max(memory.scores.values())
    compared = len(memory.scores) > 1
    flat = compared and len(set(memory.scores.values())) == 1
    spent = f"{len(memory.scores)} mixtures in {len(history)} generations; {stopped}"
    if not compared:
        choice = Choice()
        note = f"{stopped} before any mixture could be compared with the base, which stays"
    elif flat:
        choice = Choice()
        tied = f"every mixture scores {base * sign:.4g} on the adaptation docs"
        note = f"NO SIGNAL: {tied}, so the base stays ({spent})"
    else:
        finalists = [candidate for candidate, value in memory.scores.items() if value == top]
        keys = memory.keys(finalists)
        winner = finalists[max(range(len(finalists)), key=lambda i: (keys[i], -i))]
        choice = memory.choice(winner)
        note = f"best of {spent}" if winner != _BASE else f"no mixture beats the base ({spent})"
    return Plan(
        (choice,),
        rows,
        note,
        HeldOut(docs=memory.scorer.docs, before=base * sign, after=top * sign),
        tuple(history),
        SearchReport(algorithm=job.options.search, evaluations=round(meter.evaluations, 3), stopped=stopped),
        preselected,
        no_signal=flat,
    )


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


class _Memory:
    """Every candidate's score, so that none is evaluated twice; tie-breaks only for those that tie."""

    def __init__(self, job: Job, scorer: Metered) -> None:
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

    def free(self, candidate: Candidate) -> bool:
        """Whether its score costs nothing: it is known, was asked for before the search, or gives no mixture."""
        if candidate in self.scores:
            return True
        try:
            return self.scorer.knows(self.choice(candidate).z)
        except ArgumentError:
            return True

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
