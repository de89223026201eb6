"""``adapt=expert``: one expert for every prompt."""

from __future__ import annotations

from t2.adapters.strategies.base import Job, Plan
from t2.adapters.strategies.mixing import choose, single
from t2.core.errors import ArgumentError


class ExpertStrategy:
    """Answer every prompt with the one expert that was named."""

    needs_experts = True
    needs_labels = False

    def plan(self, job: Job) -> Plan:
        """One choice, α = 1 on the expert.

        Raises:
            ArgumentError: not exactly one expert was given.
        """
        if len(job.experts) != 1:
            names = "+".join(expert.name for expert in job.experts)
            raise ArgumentError(
                f"adapt=expert applies one expert, experts={names} are {len(job.experts)}; name one, "
                "or use adapt=mix, prompt or cem"
            )
        choice = choose(job, single(job, 0))
        return Plan((choice,), (0,) * len(job.prompts), f"the expert {job.experts[0].name}")
