"""Candidates that leave a generation before they have answered all docs.

:func:`race` is exact: a candidate leaves when no answer that it has yet to give could bring it among the best. For a
score that is the mean of n values in [a, b], a candidate whose k values sum to s ends between s + (n − k)·a and
s + (n − k)·b; it leaves when its upper end lies strictly below the ``best``-th largest lower end (Maron & Moore 1994,
Hoeffding Races, with certain bounds in place of probable ones).

:func:`halve` is not: the half that does worse on a few docs leaves (one round of successive halving, Jamieson &
Talwalkar 2016, Non-stochastic Best Arm Identification and Hyperparameter Optimization).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from t2.adapters.expert import Z
from t2.adapters.strategies.base import Scorer

BLOCKS = 4
"""Parts of the docs between which a candidate may leave a race."""
SHARE = 0.3
"""Of the docs, those that decide which half of a generation leaves."""
_TINY = 1e-9


@dataclass
class Runner:
    """A candidate in a race.

    Attributes:
        z: its mixture.
        copies: how often the generation holds it.
        total: sum of its docs' values so far.
        answered: number of docs so far.
    """

    z: Z | None
    copies: int = 1
    total: float = 0.0
    answered: int = 0


def race(
    runners: Sequence[Runner],
    scorer: Scorer,
    *,
    best: int,
    rivals: Sequence[float],
    order: Sequence[int],
    step: Callable[[int], None] = lambda done: None,
) -> list[bool]:
    """Let candidates answer until each has answered all docs or provably cannot be among the best.

    Args:
        runners: the candidates, the most promising first: the first ones answer everything and set the mark.
        scorer: one with bounds. Should it lose them on the way, everyone answers everything.
        best: so many must be known exactly, and who has as much as the last of them.
        rivals: sums over all docs of the generation's other candidates.
        order: all docs, in the order in which they are answered; the ones that are seldom right come first best, for
            a candidate leaves by what it gets wrong.
        step: told the number of candidates that are done with, after every block.

    Returns:
        For each candidate whether it has answered all docs.
    """
    docs = len(order)
    size = math.ceil(docs / BLOCKS)
    lead = max(0, best - len(rivals))
    for group, block in ((runners[:lead], docs), (runners[lead:], size)):
        alive = list(group)
        for start in range(0, docs, block):
            bounds = scorer.bounds
            if bounds is not None:
                mark = _mark(runners, rivals, best, bounds[0], docs)
                stay = [r for r in alive if r.total + bounds[1] * (docs - r.answered) >= mark - _TINY]
                step(len(alive) - len(stay))
                alive = stay
            if alive:
                _answer(alive, scorer, order[start : start + block])
        step(len(alive))
    if scorer.bounds is None:
        _answer([r for r in runners if r.answered < docs], scorer, order)
    return [runner.answered >= docs for runner in runners]


def _mark(runners: Sequence[Runner], rivals: Sequence[float], best: int, least: float, docs: int) -> float:
    """What the ``best``-th of a generation reaches at least."""
    floors = [*rivals, *(r.total + least * (docs - r.answered) for r in runners for _ in range(r.copies))]
    return sorted(floors, reverse=True)[best - 1] if len(floors) >= best else -math.inf


def _answer(runners: Sequence[Runner], scorer: Scorer, docs: Sequence[int]) -> None:
    for runner, score in zip(runners, scorer.evaluate([r.z for r in runners], docs), strict=True):
        runner.total += sum(score.per_doc)
        runner.answered += len(docs)


def halve(mixtures: Sequence[Z | None], scorer: Scorer, *, keep: int, docs: Sequence[int]) -> list[int]:
    """The positions of the ``keep`` mixtures that do best on some docs, by score, likelihood, and order."""
    values = [score.value for score in scorer.evaluate(mixtures, docs)]
    ranks = sorted(range(len(mixtures)), key=lambda i: -values[i])
    if keep >= len(ranks):
        return ranks
    edge = values[ranks[keep - 1]]
    tied = [i for i in ranks if values[i] == edge]
    sure = [i for i in ranks if values[i] > edge]
    ties = scorer.tie_break([mixtures[i] for i in tied], docs) if len(sure) + len(tied) > keep else [0.0] * len(tied)
    by_likelihood = sorted(range(len(tied)), key=lambda j: -math.inf if math.isnan(ties[j]) else ties[j], reverse=True)
    return sorted([*sure, *(tied[j] for j in by_likelihood[: keep - len(sure)])])
