"""From a task's metric to a reward."""

from __future__ import annotations

import math


def reward_of(score: float, higher_is_better: bool = True, *, right: float = 1.0, wrong: float = -1.0) -> float:
    """The reward of one answer: ``wrong + (right − wrong)·s``, with s the score clipped to [0, 1].

    With the defaults a right answer earns +1, a wrong one −1 (Transformer², arXiv 2501.06252, section 3.1), and a score
    s between them 2s − 1. Where lower is better, s counts as 1 − s. A score that is not a number earns ``wrong``.

    Args:
        score: the task's metric for the answer.
        higher_is_better: direction of the metric.
        right: reward of s = 1.
        wrong: reward of s = 0.
    """
    if math.isnan(score):
        return wrong
    s = min(1.0, max(0.0, score))
    return wrong + (right - wrong) * (s if higher_is_better else 1.0 - s)
