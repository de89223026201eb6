"""``adapt=cem``: few-shot adaptation. A search looks for the mixture that does best on labelled docs.

Transformer², section 3.2 C and A.4, where the search is the cross-entropy method; ``search=`` chooses another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from t2.adapters.progress import SearchBar
from t2.adapters.search import Candidate, Meter, Needs, Search, make_search
from t2.adapters.strategies.base import Choice, Job, Plan
from t2.adapters.strategies.mixing import groups_of
from t2.adapters.strategies.preselect import alone, cost, preselect, rounds
from t2.adapters.strategies.scorers import Metered
from t2.adapters.strategies.standings import BASE, Standings
from t2.core.errors import ArgumentError
from t2.core.record import Generation, HeldOut, Preselection, SearchReport
from t2.core.seeds import derive_seed

REPEATED = 3
"""Generations without a new candidate after which every search ends."""


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
        preselected, wanted = None, job.options.preselect
        with SearchBar(job.task, job.progress) as bar:
            bar.begin("first mixtures", 2)
            job.say(estimate(job, seconds_of_one(job, scorer, meter)))
            if wanted is not None and len(job.experts) > wanted:
                looks = sum(entering for _, entering in rounds(scorer.docs, len(job.experts), wanted))
                bar.begin("choosing experts", looks)
                selected = preselect(job, scorer, meter, bar.update)
                job, preselected = replace(job, experts=selected.experts), selected.report
            return _search(job, Standings(job, scorer), meter, preselected, bar)


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


def _search(job: Job, memory: Standings, meter: Meter, preselected: Preselection | None, bar: SearchBar) -> Plan:
    search, patience = make(job), _Patience(job, memory)
    history: list[Generation] = []
    base = memory.values([BASE])[0]
    stopped: str | None = None
    options = job.options

    def step(done: int) -> None:
        bar.update(done)
        bar.limit(meter.allowed())

    bar.begin("searching", options.population * options.generations)
    while stopped is None and (candidates := search.ask()):
        bar.tell(
            generation=f"{len(history) + 1}/{options.generations}",
            best=f"{memory.top * memory.sign:.4g}",
            base=f"{base * memory.sign:.4g}",
        )
        before, needs = memory.spent, search.needs(len(candidates))
        done = _afford(candidates, memory, meter, needs, len(history), step)
        bar.tell(best=f"{memory.top * memory.sign:.4g}")
        if done:
            evaluations = round(memory.spent - before, 3)
            history.append(
                Generation(
                    best=memory.top * memory.sign,
                    mean=_mean(memory.finished(done)) * memory.sign,
                    evaluations=int(evaluations) if evaluations == int(evaluations) else evaluations,
                )
            )
        if len(done) < len(candidates):
            stopped = meter.spent()
            break
        search.tell(candidates, memory.keys(candidates, needs))
        if search.stopped is None:
            stopped = patience.over()
        if search.stopped is None and stopped is None and meter.allowed() == 0:
            stopped = meter.spent()
    return _outcome(job, memory, history, stopped or search.stopped or "", meter, preselected)


def early(dimensions: int) -> int:
    """Generations without a higher score after which ``economy=early`` ends a search that learns: 2 + ⌈√D⌉."""
    return 2 + math.ceil(math.sqrt(dimensions))


class _Patience:
    """When a search that has not ended by itself should, after a generation."""

    def __init__(self, job: Job, memory: Standings) -> None:
        self._economy = job.options.economy
        # What learns nothing does not converge: its next sample is as likely to be better as its last.
        learns = self._economy in ("early", "halving") and job.options.search != "random"
        self._early = early(len(job.experts) * len(groups_of(job))) if learns else None
        self._memory = memory
        self._top, self._spent = -math.inf, 0.0
        self._stale = self._repeated = 0

    def over(self) -> str | None:
        """Why the search ends here, or None."""
        memory = self._memory
        self._stale = 0 if memory.top > self._top else self._stale + 1
        self._repeated = 0 if memory.spent > self._spent else self._repeated + 1
        self._top, self._spent = memory.top, memory.spent
        if memory.flat():
            return "all of them tied, likelihoods too"
        if self._economy != "none" and memory.unbeatable:
            return f"no mixture can score higher than {memory.top:.4g}"
        if self._early is not None and self._stale >= self._early:
            return f"no higher score in {self._early} generations"
        return "its candidates repeat themselves" if self._repeated >= REPEATED else None


def _afford(
    candidates: list[Candidate],
    memory: Standings,
    meter: Meter,
    needs: Needs,
    number: int,
    step: Callable[[int], None],
) -> list[Candidate]:
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
        memory.compare(candidates[done:end], candidates, needs, number, step)
        done = end
    return candidates[:done]


def _outcome(
    job: Job,
    memory: Standings,
    history: list[Generation],
    stopped: str,
    meter: Meter,
    preselected: Preselection | None,
) -> Plan:
    sign, base, rows, top = memory.sign, memory.scores[BASE], (0,) * len(job.prompts), memory.top
    compared = len(memory.scores) > 1
    flat = compared and len(set(memory.scores.values())) == 1
    spent = f"{memory.seen} mixtures in {len(history)} generations; {stopped}"
    if not compared:
        choice = Choice()
        note = f"{stopped} before any mixture could be compared with the base, which stays"
    elif flat:
        choice = Choice()
        tied = f"every mixture scores {base * sign:.4g} on the adaptation docs"
        note = f"NO SIGNAL: {tied}, so the base stays ({spent})"
    else:
        winner = memory.winner()
        choice = memory.choice(winner)
        note = f"best of {spent}" if winner != BASE else f"no mixture beats the base ({spent})"
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
