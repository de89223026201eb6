"""``adapt=prompt``: ask the base model for each prompt's domain, then answer with that domain's expert.

Transformer², section 3.2 A.
"""

from __future__ import annotations

from dataclasses import replace

from t2.adapters.strategies.base import Job, Plan
from t2.adapters.strategies.dispatch import plan


class PromptStrategy:
    """Dispatch each prompt to the expert of the domain that the base model names for it."""

    needs_experts = True
    needs_labels = False

    def plan(self, job: Job) -> Plan:
        """See :func:`t2.adapters.strategies.dispatch.plan`."""
        return plan(replace(job, classifier=None))
