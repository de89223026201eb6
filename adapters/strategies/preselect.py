"""Of many experts a few that are worth a search: successive halving over the adaptation docs.

Jamieson & Talwalkar 2016, Non-stochastic Best Arm Identification and Hyperparameter Optimization. Each expert alone
answers a few docs; the better part of them answers more, until as many as wanted have answered all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from t2.adapters.expert import Expert, Z
from t2.adapters.search import Key, Meter
from t2.adapters.strategies.base import Job, Scorer
from t2.adapters.strategies.mixing import choose
from t2.core.errors import ArgumentError
from t2.core.record import Preselected, Preselection

ROUNDS = 4
"""Rounds at most; each one has about twice the docs of the one before, and the last one all of them."""
SHARE = 0.5
"""Of a budget, what the preselection may spend."""


@dataclass(frozen=True)
class Selected:
    """The outcome.

    Attributes:
        experts: the chosen ones, in the order in which they were given.
        report: for the record, best first.
    """

    experts: tuple[Expert, ...]
    report: Preselection


def rounds(docs: int, experts: int, wanted: int) -> list[tuple[int, int]]:
    """For each round the docs answered and the experts that enter it.

    With R + 1 rounds, round i of them has ⌈n / 2^(R−i)⌉ of n docs; the number of experts falls by the same factor from
    each round to the next, so that ``wanted`` of K leave the last one.

    Args:
        docs: n.
        experts: K.
        wanted: experts to be left.
    """
    last = min(ROUNDS - 1, max(0, math.ceil(math.log2(docs)))) if docs > 1 else 0
    shrink = (wanted / experts) ** (1 / (last + 1))
    return [(math.ceil(docs / 2 ** (last - i)), max(wanted, math.ceil(experts * shrink**i))) for i in range(last + 1)]


def preselect(job: Job, scorer: Scorer, meter: Meter, step: Callable[[int], None] = lambda done: None) -> Selected:
    """Choose ``job.options.preselect`` of the job's experts.

    Args:
        job: with more experts than that.
        scorer: over the adaptation docs; it must count into ``meter``.
        meter: what may be spent.
        step: told after each round how many experts entered it.

    Raises:
        ArgumentError: half of the budget does not suffice for a first look at all experts.
    """
    count, wanted = len(job.experts), job.options.preselect
    assert wanted is not None
    left = meter.left()
    plan = _affordable(rounds(scorer.docs, count, wanted), scorer.docs, None if left is None else SHARE * left, job)
    before = meter.evaluations
    ranked = list(range(count))
    keys: dict[int, Key] = {}
    for docs, entering in plan:
        keys = keys_alone(job, scorer, sorted(ranked[:entering]), range(docs))
        ranked = sorted(keys, key=lambda i: (keys[i], -i), reverse=True)
        step(entering)
    best = ranked[:wanted]
    sign = 1.0 if scorer.higher_is_better else -1.0
    report = Preselection(
        of=count,
        experts=tuple(Preselected(name=job.experts[i].name, score=keys[i][0] * sign) for i in best),
        evaluations=round(meter.evaluations - before, 3),
    )
    return Selected(tuple(job.experts[i] for i in sorted(best)), report)


def cost(plan: Sequence[tuple[int, int]], docs: int) -> float:
    """Evaluations that rounds of (docs, experts) need; no expert answers a doc twice."""
    seen = [0, *(answered for answered, _ in plan)]
    return sum(experts * (answered - before) for (answered, experts), before in zip(plan, seen, strict=False)) / docs


def _affordable(plan: list[tuple[int, int]], docs: int, left: float | None, job: Job) -> list[tuple[int, int]]:
    """The first rounds of a plan, as many as may be spent on; at least one doc for every expert."""
    if left is None:
        return plan
    for end in range(len(plan), 0, -1):
        if cost(plan[:end], docs) <= left:
            return plan[:end]
    first = [(1, len(job.experts))]
    if cost(first, docs) > left:
        raise ArgumentError(
            f"budget={job.options.budget} is too small for a first look at {len(job.experts)} experts, one adaptation "
            f"doc each, on half of it; raise it, or name fewer experts"
        )
    return first


def alone(job: Job, index: int) -> Z | None:
    """The effective z of one expert alone, under the job's options."""
    return choose(replace(job, experts=[job.experts[index]]), [(1.0,)]).z


def keys_alone(job: Job, scorer: Scorer, indices: Sequence[int], docs: Sequence[int]) -> dict[int, Key]:
    """The keys of single experts on some docs, by position; one that gives no mixture comes last."""
    zs: dict[int, Z | None] = {}
    keys = {}
    for index in indices:
        try:
            zs[index] = alone(job, index)
        except ArgumentError:
            keys[index] = (-math.inf, -math.inf)
    if zs:
        scores = scorer.evaluate(list(zs.values()), docs)
        ties = scorer.tie_break(list(zs.values()), docs)
        for index, score, tie in zip(zs, scores, ties, strict=True):
            value = score.value if math.isfinite(score.value) else -math.inf
            keys[index] = (value, -math.inf if math.isnan(tie) else tie)
    return keys
