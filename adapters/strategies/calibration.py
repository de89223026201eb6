"""How far a dispatch may be trusted: one temperature and one threshold, from prompts of known domain."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_SCALES = (0.05, 20.0)
"""The temperatures that are looked among: beyond them a posterior is flat or one-hot anyway."""


def fit_temperature(scores: torch.Tensor, right: Sequence[int]) -> float:
    """The temperature τ under which softmax(s/τ) gives the right labels the highest likelihood.

    Temperature scaling (Guo et al. 2017, arXiv 1706.04599), with Platt's targets (Platt 1999): over n prompts and K
    labels the right one counts (n + 1)/(n + K) and each other one 1/(n + K). Without them few prompts, all of them
    named right, would ask for complete certainty. The loss is convex in 1/τ; τ is searched for between 0.05 and 20.

    Args:
        scores: log-likelihoods, shape (n, K).
        right: for each prompt the index of its label.
    """
    n, k = scores.shape
    targets = torch.full((n, k), 1 / (n + k), dtype=torch.float64)
    targets[torch.arange(n), torch.tensor(list(right))] = (n + 1) / (n + k)

    def loss(log_temperature: float) -> float:
        return -float((targets * torch.log_softmax(scores.double() / math.exp(log_temperature), dim=1)).sum())

    low, high = map(math.log, _SCALES)
    golden = (math.sqrt(5) - 1) / 2
    while high - low > 1e-4:
        left, middle = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, middle) if loss(left) <= loss(middle) else (left, high)
    return math.exp((low + high) / 2)


def fit_threshold(confidences: Sequence[float], right: Sequence[bool]) -> float:
    """The confidence from which on a decision stands, by Chow's rule.

    Chow (1970, "On optimum recognition error and reject tradeoff"): where a right decision is worth 1, a wrong one −1
    and none 0, the best threshold keeps as many more right than wrong ones as can be. It is taken on these decisions
    as they are, without trust in what a confidence claims. Of equally good ones it is the lowest.

    Args:
        confidences: of each decision.
        right: whether it was right.

    Returns:
        0 where all decisions should stand, 1 where none should, else a value halfway between two confidences.
    """
    order = sorted(zip(confidences, right, strict=True), reverse=True)
    best, kept, gain = 0, 0, 0
    for position, (confidence, hit) in enumerate(order, start=1):
        gain += 1 if hit else -1
        tied = position < len(order) and order[position][0] == confidence
        if not tied and gain >= best:
            best, kept = gain, position
    if kept == len(order):
        return 0.0
    return 1.0 if kept == 0 else (order[kept - 1][0] + order[kept][0]) / 2


def tenths(posterior: Sequence[float]) -> tuple[int, ...]:
    """The posterior in tenths that sum to ten, by largest remainders.

    A held-out set of twenty prompts a domain tells no more than that, and the mixtures stay few: each distinct one
    costs a composition of all weights and a pass of its own.
    """
    parts = [10 * p for p in posterior]
    whole = [math.floor(part + 1e-9) for part in parts]
    order = sorted(range(len(parts)), key=lambda i: (whole[i] - parts[i], i))
    for i in order[: 10 - sum(whole)]:
        whole[i] += 1
    return tuple(whole)
