"""``adapt=auto``: of the other strategies the one that pays, by its score on docs it was not fitted on and its cost.

What is fitted is judged by two-fold cross-fitting: fitted on every other adaptation doc, it answers the rest, and the
other way round. So every strategy answers every adaptation doc once without having seen its label, and differences can
be paired by doc. The decision is the one-standard-error rule (Breiman et al. 1984, Classification and Regression Trees,
section 3.4.3): of those whose score is within one standard error of the best, the cheapest.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from t2.adapters.expert import Z
from t2.adapters.search import Budget, Meter
from t2.adapters.strategies.base import Job, Plan, Score, Strategy
from t2.adapters.strategies.classifier import ClassifierStrategy
from t2.adapters.strategies.dispatch import questions
from t2.adapters.strategies.few_shot import FewShotStrategy, check_search, seconds_of_one, seconds_text
from t2.adapters.strategies.mix import MixStrategy
from t2.adapters.strategies.mixing import choose
from t2.adapters.strategies.none import NoneStrategy
from t2.adapters.strategies.preselect import alone, cost, keys_alone, preselect, rounds
from t2.adapters.strategies.prompt import PromptStrategy
from t2.adapters.strategies.scorers import Metered, Part
from t2.core.errors import ArgumentError
from t2.core.record import Considered, HeldOut, Preselection, SearchReport

_APPLY = 1.0
"""Evaluations that applying a mixture to answer with it counts for."""
_TOLERANCE = 1e-9
"""One doc of difference is often exactly one standard error; rounding must not decide then."""


@dataclass
class Judged:
    """A strategy and how it did.

    Attributes:
        name: its value of ``adapt``.
        run: makes its plan from all adaptation docs.
        score: of docs it was not fitted on; None where it was not judged.
        cost: predicted, in evaluations.
        reason: why it was not judged, or was chosen, or not.
    """

    name: str
    run: Callable[[], Plan]
    score: Score | None = None
    cost: float | None = None
    reason: str = ""
    no_signal: bool = True


class AutoStrategy:
    """Judge the base, the best expert, the uniform mixture, dispatch and few-shot search; adapt by one of them."""

    needs_experts = True
    needs_labels = True

    def plan(self, job: Job) -> Plan:
        """The plan of the strategy that was chosen, with all that were considered.

        Raises:
            ArgumentError: fewer than two adaptation docs, or a search setting is out of range.
        """
        if job.scorer is None or job.scorer.docs < 2:
            raise ArgumentError("adapt=auto needs at least 2 labelled adaptation docs: one to fit on, one to judge by")
        check_search(job)
        job.engine.bases(dict.fromkeys(name for expert in job.experts for name in expert.z))
        meter = Meter(job.options.budget, job.clock)
        scorer = Metered(job.scorer, meter)
        once = meter.pace = seconds_of_one(job, scorer, meter)
        judging = _Judging(replace(job, scorer=scorer, pace=once), scorer, meter)
        job.say(judging.estimate(once))
        judged = judging.all()
        chosen = decide(judged, job.scorer.higher_is_better)
        plan = chosen.run()
        return _explained(plan, judged, chosen, judging, once)


def decide(judged: Sequence[Judged], higher_is_better: bool = True) -> Judged:
    """The one-standard-error rule; it also gives every strategy its reason.

    With s the scores, d the paired differences by doc and n docs, a strategy c is as good as the best b where
    s_b − s_c ≤ sd(d)/√n. Where the set's score is not the mean over its docs there is no standard error, and only equal
    scores are as good. Among equally cheap ones the higher score decides, then the order.

    Args:
        judged: in order of simplicity; those without a score are left out.
        higher_is_better: direction of the metric's values by doc.
    """
    scored = [one for one in judged if one.score is not None]
    best = max(scored, key=lambda one: (_value(one), -scored.index(one)))
    gaps = {one.name: _gap(best, one, 1.0 if higher_is_better else -1.0) for one in scored}
    good = [one for one in scored if gaps[one.name][0] <= gaps[one.name][1] * (1 + _TOLERANCE) + _TOLERANCE]
    chosen = min(good, key=lambda one: (one.cost or 0.0, -_value(one), scored.index(one)))
    if len(scored) == 1:
        chosen.reason = "the only one that could be judged"
        return chosen
    for one in scored:
        gap, error = gaps[one.name]
        if one is chosen:
            within = f"within one standard error ({error:.3g}) of {best.name}, and the cheapest of such"
            one.reason = "the highest score" if one is best else within if gap else f"ties with {best.name}, cheaper"
        elif one in good:
            one.reason = f"not better than {chosen.name} by more than one standard error, and dearer"
            if _value(one) == _value(chosen):
                one.reason = f"ties with {chosen.name}, not cheaper"
        else:
            one.reason = f"lower than {best.name} by {gap:.3g}, one standard error is {error:.3g}"
    return chosen


def _value(one: Judged) -> float:
    assert one.score is not None
    return one.score.value if math.isfinite(one.score.value) else -math.inf


def _gap(best: Judged, other: Judged, sign: float) -> tuple[float, float]:
    """How much lower another strategy scores than the best, and the standard error of that."""
    assert best.score is not None
    assert other.score is not None
    gap = 0.0 if _value(best) == _value(other) else _value(best) - _value(other)
    pairs = list(zip(best.score.per_doc, other.score.per_doc, strict=False))
    if len(pairs) < 2 or not all(_is_mean(score, sign) for score in (best.score, other.score)):
        return gap, 0.0
    differences = [a - b for a, b in pairs]
    mean = sum(differences) / len(pairs)
    variance = sum((d - mean) ** 2 for d in differences) / (len(pairs) - 1)
    return gap, math.sqrt(variance / len(pairs))


def _is_mean(score: Score, sign: float) -> bool:
    if not score.per_doc:
        return False
    return math.isclose(sign * sum(score.per_doc) / len(score.per_doc), score.value, rel_tol=1e-6, abs_tol=1e-9)


class _Judging:
    """Judges every strategy once, within the budget."""

    def __init__(self, job: Job, scorer: Metered, meter: Meter) -> None:
        self.job = job
        self.scorer = scorer
        self.meter = meter
        self.preselected: Preselection | None = None
        docs = range(scorer.docs)
        self.halves = (list(docs[::2]), list(docs[1::2]))

    @property
    def wanted(self) -> int | None:
        """Experts to preselect; None where all take part."""
        wanted = self.job.options.preselect
        return wanted if wanted is not None and len(self.job.experts) > wanted else None

    def estimate(self, once: float) -> str:
        """What judging may cost, as told before it begins."""
        options, count = self.job.options, len(self.job.experts)
        search = options.population * options.generations
        most = options.budget.evaluations if options.budget else 2 * search + self._alone_cost() + 2 + self._asking()
        text = (
            f"{self.job.task}: judging the base, single experts, the uniform mixture, dispatch and the search "
            f"{options.search} of {count} experts on {self.scorer.docs} adaptation docs; about {seconds_text(once)} a "
            "mixture, "
        )
        if options.budget.seconds is not None:
            return text + f"within the budget of {options.budget.describe()}"
        assert most is not None
        budget = f" by the budget of {options.budget.describe()}" if options.budget else ""
        return text + f"at most {seconds_text(once * most)}{budget}"

    def all(self) -> list[Judged]:
        """The strategies, simplest first."""
        judged = [self._base()]
        if len(self.job.experts) > 1:
            judged.append(self._uniform())
        judged.append(self._single())
        judged += self._dispatches()
        judged.append(self._search())
        return judged

    def _base(self) -> Judged:
        return Judged("none", lambda: NoneStrategy().plan(self.job), self.scorer.evaluate([None])[0], 0.0)

    def _uniform(self) -> Judged:
        plain = replace(self.job, options=replace(self.job.options, alpha=None))
        one = Judged("mix", lambda: MixStrategy().plan(plain), cost=_APPLY)
        if not self._room(1):
            return _no_room(one)
        try:
            one.score = self.scorer.evaluate([MixStrategy().plan(plain).choices[0].z])[0]
        except ArgumentError as error:
            one.reason = str(error)
        return one

    def _single(self) -> Judged:
        one = Judged("expert", self._run_single, cost=_APPLY + (self._alone_cost() if len(self.job.experts) > 1 else 0))
        if not self._room(self._alone_cost()):
            return _no_room(one)
        try:
            fitted = [alone(self.job, self._best_alone(Part(self.scorer, half))[0]) for half in self.halves]
        except ArgumentError as error:
            one.reason = str(error)
            return one
        one.score = self._crossed(fitted)
        return one

    def _dispatches(self) -> list[Judged]:
        return [self._dispatch(name, strategy, job) for name, strategy, job in self._dispatching()]

    def _dispatching(self) -> list[tuple[str, Strategy, Job]]:
        found: list[tuple[str, Strategy, Job]] = [("prompt", PromptStrategy(), replace(self.job, classifier=None))]
        if self.job.classifier is not None:
            found.append(("classifier", ClassifierStrategy(), self.job))
        return found

    def _dispatch(self, name: str, strategy: Strategy, job: Job) -> Judged:
        one = Judged(name, partial(strategy.plan, job))
        docs = self.scorer.docs
        try:
            calibration = questions(job) / docs
            asking = len(job.prompts) / docs + calibration
            one.cost = asking + _APPLY
            # The questions about the adaptation docs, and then their answers.
            if not self._room(calibration + 2):
                return _no_room(one)
            plan = strategy.plan(replace(job, prompts=self.scorer.prompts))
        except ArgumentError as error:
            one.reason = str(error)
            return one
        self.meter.spend(calibration + 1)
        moving = {row for row in plan.rows if plan.choices[row].z is not None}
        one.cost = asking + _APPLY * len(moving)
        one.score = self.scorer.combine([choice.z for choice in plan.choices], plan.rows)
        return one

    def _asking(self) -> float:
        """Evaluations that judging the dispatches takes."""
        total = 0.0
        for _, _, job in self._dispatching():
            with contextlib.suppress(ArgumentError):
                total += questions(job) / self.scorer.docs + 2
        return total

    def _search(self) -> Judged:
        total = self.job.options.budget
        judging, final = total, total
        left = self.meter.left()
        if total.evaluations is not None and left is not None:
            judging = final = Budget(evaluations=math.floor((left - 1) / 2))
        elif total.seconds is not None:
            judging = Budget(seconds=max(0.0, (total.seconds - self.meter.seconds) / 4))

        def run() -> Plan:
            rest = final
            if total.seconds is not None:
                rest = Budget(seconds=max(1e-3, total.seconds - self.meter.seconds))
            return FewShotStrategy().plan(replace(self._quiet(), options=replace(self.job.options, budget=rest)))

        one = Judged("cem", run)
        if (judging.evaluations is not None and judging.evaluations < 2) or judging.seconds == 0:
            return _no_room(one)
        fitted: list[Z | None] = []
        evaluations = []
        for half in self.halves:
            options = replace(self.job.options, budget=judging)
            try:
                plan = FewShotStrategy().plan(replace(self._quiet(), scorer=Part(self.scorer, half), options=options))
            except ArgumentError as error:
                one.reason = str(error)
                return one
            fitted.append(plan.choices[0].z)
            one.no_signal &= plan.no_signal
            evaluations.append(plan.search.evaluations if plan.search is not None else 0.0)
        one.cost = _APPLY + sum(evaluations) / len(evaluations)
        one.score = self._crossed(fitted)
        return one

    def _quiet(self) -> Job:
        return replace(self.job, say=lambda text: None)

    def _crossed(self, fitted: Sequence[Z | None]) -> Score:
        """Each half answered by what was fitted on the other."""
        first = set(self.halves[0])
        return self.scorer.combine(fitted, [1 if doc in first else 0 for doc in range(self.scorer.docs)])

    def _alone_cost(self) -> float:
        """Evaluations that choosing a single expert takes."""
        count = len(self.job.experts)
        return (
            float(count)
            if self.wanted is None
            else cost(rounds(self.scorer.docs, count, self.wanted), self.scorer.docs)
        )

    def _best_alone(self, scorer: Part | Metered) -> tuple[int, Preselection | None]:
        if self.wanted is None:
            keys = keys_alone(self.job, scorer, range(len(self.job.experts)), range(scorer.docs))
            return max(keys, key=lambda i: (keys[i], -i)), None
        selected = preselect(self.job, scorer, self.meter)
        names = [expert.name for expert in self.job.experts]
        return names.index(selected.report.experts[0].name), selected.report

    def _run_single(self) -> Plan:
        index, self.preselected = self._best_alone(self.scorer)
        expert = self.job.experts[index]
        choice = choose(replace(self.job, experts=[expert]), [(1.0,)])
        return Plan((choice,), (0,) * len(self.job.prompts), f"the expert {expert.name}", preselected=self.preselected)

    def _room(self, evaluations: float) -> bool:
        left = self.meter.left()
        return left is None or left >= evaluations


def _no_room(one: Judged) -> Judged:
    one.reason = "the budget leaves no room to judge it"
    return one


def _explained(plan: Plan, judged: Sequence[Judged], chosen: Judged, judging: _Judging, once: float) -> Plan:
    job, scorer = judging.job, judging.scorer
    sign = 1.0 if scorer.higher_is_better else -1.0
    considered = tuple(
        Considered(
            strategy=one.name,
            score=None if one.score is None else _value(one) * sign,
            docs=0 if one.score is None else scorer.docs,
            cost=None if one.cost is None else round(one.cost, 3),
            seconds=None if one.cost is None else round(one.cost * once, 3),
            chosen=one is chosen,
            reason=one.reason,
        )
        for one in judged
    )
    values = {_value(one) for one in judged if one.score is not None}
    compared = sum(one.score is not None for one in judged) > 1
    flat = compared and len(values) == 1 and all(one.no_signal for one in judged)
    score = f"{_value(chosen) * sign:.4g} on {scorer.docs} adaptation docs"
    note = f"auto chose {chosen.name}, {score} ({chosen.reason}): {plan.note}"
    if flat:
        note = f"NO SIGNAL: every strategy scores {score}, so the base stays"
    before = scorer.evaluate([None])[0].value
    after = scorer.evaluate([plan.choices[0].z])[0].value if len(plan.choices) == 1 else _value(chosen)
    spent = judging.meter.evaluations
    stopped = "all strategies judged" if plan.search is None else f"{plan.search.stopped}, after judging"
    return replace(
        plan,
        note=note,
        held_out=HeldOut(docs=scorer.docs, before=before * sign, after=after * sign),
        search=SearchReport(algorithm=job.options.search, evaluations=round(spent, 3), stopped=stopped),
        considered=considered,
        no_signal=flat,
    )
