"""``adapt=best``: for each task the one expert that does best alone on its adaptation docs.

What a user without a search would do, and so the row beside which a mixture has to show what it adds.
"""

from __future__ import annotations

from dataclasses import replace

from t2.adapters.search import Meter
from t2.adapters.search.budget import NO_BUDGET
from t2.adapters.strategies.base import Job, Plan
from t2.adapters.strategies.mixing import choose
from t2.adapters.strategies.preselect import keys_alone
from t2.adapters.strategies.scorers import Metered
from t2.core.errors import ArgumentError
from t2.core.record import HeldOut, Preselected, Preselection


class BestStrategy:
    """Let every expert alone answer the adaptation docs, and take the best of them."""

    needs_experts = True
    needs_labels = True

    def plan(self, job: Job) -> Plan:
        """One choice, α = 1 on an expert; among equal scores the likelihood of right answers decides, then the order.

        Raises:
            ArgumentError: there are no labelled adaptation docs.
        """
        if job.scorer is None:
            raise ArgumentError("adapt=best needs labelled adaptation docs")
        job.engine.bases(dict.fromkeys(name for expert in job.experts for name in expert.z))
        meter = Meter(NO_BUDGET, job.clock)
        scorer = Metered(job.scorer, meter)
        sign = 1.0 if scorer.higher_is_better else -1.0
        before = scorer.evaluate([None])[0].value * sign
        keys = keys_alone(job, scorer, range(len(job.experts)), range(scorer.docs))
        best = max(keys, key=lambda i: (keys[i], -i))
        expert = job.experts[best]
        after = keys[best][0] * sign
        report = Preselection(
            of=len(job.experts),
            experts=(Preselected(name=expert.name, score=after),),
            evaluations=round(meter.evaluations, 3),
        )
        return Plan(
            (choose(replace(job, experts=[expert]), [(1.0,)]),),
            (0,) * len(job.prompts),
            f"the expert {expert.name}, best of {len(job.experts)} alone on {scorer.docs} adaptation docs",
            HeldOut(docs=scorer.docs, before=before, after=after),
            preselected=report,
        )
