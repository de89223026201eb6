"""``adapt=none``: the base model."""

from __future__ import annotations

from t2.adapters.strategies.base import Choice, Job, Plan


class NoneStrategy:
    """Answer every prompt with the base model."""

    needs_experts = False
    needs_labels = False

    def plan(self, job: Job) -> Plan:
        """One choice, the base."""
        return Plan((Choice(),), (0,) * len(job.prompts), "the base model")
