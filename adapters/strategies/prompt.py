"""``adapt=prompt``: ask the model for each prompt's domain, then answer with that domain's expert.

Transformer², section 3.2 A. The domain is decided by the likelihood of its label after the question, with "others" for
the base. A model prefers some labels whatever it is asked, so each label's log-likelihood is taken relative to the one
it has after an empty question (contextual calibration, Zhao et al. 2021, arXiv 2102.09690).
"""

from __future__ import annotations

from collections import Counter

from t2.adapters.engine.base import ScoreRequest
from t2.adapters.strategies.base import Choice, Job, Plan
from t2.adapters.strategies.mixing import choose
from t2.core.errors import ArgumentError

OTHERS = "others"

TEMPLATE = """Decide which kind of problem the text below is.
{descriptions}
- others: anything else

Text: {text}

The kind of problem is:"""

DESCRIPTIONS = {
    "math": "a calculation or a word problem whose answer is a number or a formula",
    "code": "a program or a function to write",
    "reasoning": "a question about science or the world with an answer to choose",
}


class PromptStrategy:
    """Dispatch each prompt to the expert of its domain."""

    needs_experts = True
    needs_labels = False

    def plan(self, job: Job) -> Plan:
        """One choice per domain and the base; several experts of one domain count as their mean.

        Raises:
            ArgumentError: an expert has no domain.
        """
        domains: dict[str, list[int]] = {}
        for index, expert in enumerate(job.experts):
            if not expert.domain:
                raise ArgumentError(f"adapt=prompt needs experts with a domain, {expert.name} has none")
            if expert.domain == OTHERS:
                raise ArgumentError(f"expert {expert.name}: the domain 'others' stands for the base model")
            domains.setdefault(expert.domain, []).append(index)
        labels = [*sorted(domains), OTHERS]
        choices = [
            choose(job, [tuple(1 / len(domains[d]) if i in domains[d] else 0.0 for i in range(len(job.experts)))])
            for d in labels[:-1]
        ]
        choices.append(Choice())
        rows = self._classify(job, labels)
        counts = Counter(labels[row] for row in rows)
        dispatch = {label: counts[label] for label in labels}
        shown = ", ".join(f"{count} {label}" for label, count in dispatch.items() if count)
        return Plan(tuple(choices), tuple(rows), f"prompts by domain: {shown}", dispatch=dispatch)

    def _classify(self, job: Job, labels: list[str]) -> list[int]:
        described = "\n".join(f"- {d}: {DESCRIPTIONS.get(d, f'a problem of the field {d}')}" for d in labels[:-1])
        texts = list(dict.fromkeys(["", *job.prompts]))
        requests = []
        for text in texts:
            context = job.render(TEMPLATE.format(descriptions=described, text=text))
            for label in labels:
                left, right = job.encode_pair(context, f" {label}")
                requests.append(ScoreRequest(tuple(left), tuple(right)))
        scored = job.engine.score(requests, progress=f"{job.task}: asking for domains" if job.progress else None)
        width = len(labels)
        table = {text: [scored[i * width + j].loglikelihood for j in range(width)] for i, text in enumerate(texts)}
        prior = table[""]
        return [max(range(width), key=lambda j: (table[text][j] - prior[j], -j)) for text in job.prompts]
