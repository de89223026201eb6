"""``adapt=mix``: a fixed mixture for every prompt."""

from __future__ import annotations

from t2.adapters.strategies.base import Job, Plan
from t2.adapters.strategies.mixing import choose
from t2.core.errors import ArgumentError


class MixStrategy:
    """Answer every prompt with the mixture given by ``alpha``, by default the mean of the experts."""

    needs_experts = True
    needs_labels = False

    def plan(self, job: Job) -> Plan:
        """One choice.

        Raises:
            ArgumentError: as many coefficients as experts are needed.
        """
        count = len(job.experts)
        alpha = job.options.alpha if job.options.alpha is not None else (1 / count,) * count
        if len(alpha) != count:
            names = "+".join(expert.name for expert in job.experts)
            raise ArgumentError(
                f"alpha has {len(alpha)} coefficients for the {count} experts {names}; give one for each"
            )
        note = "the given mixture" if job.options.alpha is not None else "the uniform mixture"
        return Plan((choose(job, [alpha]),), (0,) * len(job.prompts), note)
