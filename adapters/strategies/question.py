"""The question that a dispatch asks about a prompt: of which kind is this text?

``adapt=prompt`` asks the base model, ``adapt=classifier`` a classifier, and the task ``t2_domains`` trains one on the
very same words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

OTHERS = "others"
"""The label of the base model."""

TEMPLATE = """Decide which kind of problem the text below is.
{descriptions}

Text: {text}

The kind of problem is:"""

DESCRIPTIONS = {
    "math": "a calculation or a word problem whose answer is a number or a formula",
    "code": "a program or a function to write",
    "reasoning": "a question about science or the world with an answer to choose",
    OTHERS: "anything else",
}

HEAD, TAIL = 320, 160
"""Characters of a long text's beginning and end that are asked about; what a text wants stands at either."""


def question(text: str, labels: Sequence[str]) -> str:
    """The question about a text, with a line for each label in their order.

    Args:
        text: a prompt; of one longer than ``HEAD + TAIL`` characters the middle is left out.
        labels: the domains.
    """
    described = "\n".join(
        f"- {label}: {DESCRIPTIONS.get(label, f'a problem of the field {label}')}" for label in labels
    )
    return TEMPLATE.format(descriptions=described, text=clip(text))


def clip(text: str) -> str:
    """The text without surrounding white space, and without its middle where it is long."""
    text = text.strip()
    return text if len(text) <= HEAD + TAIL else f"{text[:HEAD].rstrip()} … {text[-TAIL:].lstrip()}"


def parse(answer: str, labels: Sequence[str]) -> str | None:
    r"""The label that a generated answer names: the one in ``\boxed{}``, else the first that stands in it as a word.

    Upper and lower case count as one. None when it names none.
    """
    named = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    match = re.search(rf"\\boxed\{{\s*({named})\s*\}}", answer, re.IGNORECASE) or re.search(
        rf"(?<!\w)({named})(?!\w)", answer, re.IGNORECASE
    )
    return next(label for label in labels if label.lower() == match[1].lower()) if match else None
