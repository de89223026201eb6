"""``adapt=classifier``: ask the model under a classification expert for each prompt's domain.

Transformer², section 3.2 B: pass 1 runs under the classifier's z alone, pass 2 under that of the domain's expert.
"""

from __future__ import annotations

from t2.adapters.strategies.base import Job, Plan
from t2.adapters.strategies.dispatch import plan
from t2.core.errors import ArgumentError


class ClassifierStrategy:
    """Dispatch each prompt to the expert of the domain that a classifier names for it."""

    needs_experts = True
    needs_labels = False

    def plan(self, job: Job) -> Plan:
        """See :func:`t2.adapters.strategies.dispatch.plan`.

        Raises:
            ArgumentError: the job has no classifier, or an expert is for a domain that it cannot name.
        """
        if job.classifier is None:
            raise ArgumentError("adapt=classifier needs an expert of kind classifier; train one on t2_domains")
        return plan(job)
