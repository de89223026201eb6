"""How often the intervals and verdicts of t2 are right, on simulated pairs of runs.

    python -m benchmarks.verdicts [--pairs 10000] [--resamples 2000] [--seed 0]

Each row simulates pairs of runs over the same documents and judges every pair. Scores of 0 and 1: a share of the
documents changes between the runs. Other scores: the changes have the shape that the row names. A planted drop is the
one that a comparison of this size should find with power 0.8. Prints tables of docs/statistics.md.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from t2.core.seeds import generator
from t2.core.statistics import (
    FEW,
    RESAMPLES,
    Array,
    Interval,
    PairedDifference,
    bootstrap_t,
    paired,
    smallest_detectable,
)
from t2.core.verdicts import Verdict, judge

Shape = Callable[[np.random.Generator, tuple[int, int], float], Array]
"""Of a generator, (pairs, n) and a true drop: the differences of the documents' scores."""

_FOUND = 1.959964 + 0.841621
"""Standard errors that a drop must have to be found with power 0.8 at level 0.95."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Of the simulated pairs: how many were called worse and better, and how many intervals held the truth."""

    regressed: float
    improved: float
    no_change: float
    covered: float


def binary_pairs(
    pairs: int, n: int, discordance: float, drop: float, rng: np.random.Generator
) -> Counter[tuple[int, int]]:
    """Pairs of runs with scores of 0 and 1: how often each (wins, losses) comes."""
    won, lost = (discordance - drop) / 2, (discordance + drop) / 2
    drawn = rng.multinomial(n, [won, lost, 1 - won - lost], size=pairs)
    return Counter((int(wins), int(losses)) for wins, losses, _ in drawn)


def compare_binary(n: int, wins: int, losses: int) -> PairedDifference:
    """A pair of runs that differ so; on the other documents both are right or both wrong, which tells nothing."""
    same = [1, 0] * n
    agree = same[: n - wins - losses]
    return paired([1] * wins + [0] * losses + agree, [0] * wins + [1] * losses + agree)


def judge_binary(
    n: int, discordance: float, drop: float, *, pairs: int, rng: np.random.Generator, margin: float = 0.0
) -> Shares:
    """The shares of simulated pairs whose true difference is ``-drop``."""
    said: Counter[Verdict] = Counter()
    covered = 0
    for (wins, losses), count in binary_pairs(pairs, n, discordance, drop, rng).items():
        difference = compare_binary(n, wins, losses)
        said[judge(difference, difference.p, margin=margin)] += count
        covered += count * (-drop in difference.interval)
    return _shares(said, covered, pairs)


def judge_shaped(
    n: int, shape: Shape, drop: float, *, pairs: int, rng: np.random.Generator, resamples: int = RESAMPLES
) -> Shares:
    """The same for differences of a shape."""
    said: Counter[Verdict] = Counter()
    covered = 0
    step = 500
    for start in range(0, pairs, step):
        differences = shape(rng, (min(step, pairs - start), n), drop)
        few = (differences != 0).sum(axis=1) <= FEW
        compared = [paired(row.tolist(), [0.0] * n) for row in differences[few]]
        if not few.all():
            means, halves, ps = bootstrap_t(differences[~few], resamples=resamples)
            compared += [
                PairedDifference(n, mean, Interval(mean - half, mean + half, 0.95), p, 0, 0, "bootstrap", half / 2, 0.0)
                for mean, half, p in zip(means.tolist(), halves.tolist(), ps.tolist(), strict=True)
            ]
        for difference in compared:
            said[judge(difference, difference.p, margin=0.0)] += 1
            covered += -drop in difference.interval
    return _shares(said, covered, pairs)


def detectable(n: int, discordance: float) -> float:
    """The smallest drop that runs over n documents find with power 0.8, when this share of them changes."""
    changed = round(n * discordance)
    return smallest_detectable(compare_binary(n, changed // 2, changed - changed // 2))


def normal(rng: np.random.Generator, size: tuple[int, int], drop: float) -> Array:
    """Every document's score moves, symmetrically."""
    return rng.normal(-drop, 0.2, size)


def skewed(rng: np.random.Generator, size: tuple[int, int], drop: float) -> Array:
    """Every document's score moves, most a little and some far, the far ones all upwards."""
    return rng.exponential(0.2, size) - 0.2 - drop


def graded(rng: np.random.Generator, size: tuple[int, int], drop: float) -> Array:
    """Scores between 0 and 1 as F1 gives them, mostly near the ends, drawn anew for each run."""
    return rng.beta(0.3, 0.5, size) - rng.beta(0.3, 0.5, size) - drop


def quarter(rng: np.random.Generator, size: tuple[int, int], drop: float) -> Array:
    """One document in four changes its score, by up to 1; a drop has more of them fall."""
    sign = np.where(rng.random(size) < 0.5 + 4 * drop, -1, 1)
    return np.where(rng.random(size) < 0.25, rng.random(size) * sign, 0.0)


SHAPES: tuple[Shape, ...] = (normal, skewed, graded, quarter)


def tables(pairs: int, resamples: int, seed: int) -> Iterator[str]:
    """The rows of Markdown."""
    yield f"Scores of 0 and 1, {pairs:,} pairs of runs a row: exact McNemar and Tango's interval.\n"
    yield _header("documents that change")
    for n in (100, 300, 1000, 3000):
        for discordance in (0.02, 0.05, 0.1, 0.2, 0.4):
            rng = generator(seed, "binary", n, str(discordance))
            null = judge_binary(n, discordance, 0.0, pairs=pairs, rng=rng)
            drop = detectable(n, discordance)
            truth = max(drop, discordance)
            found = judge_binary(n, truth, drop, pairs=pairs, rng=rng)
            yield (
                f"| {n} | {discordance:.0%} | {null.regressed:.2%} | {null.improved:.2%} | {null.covered:.1%} "
                f"| {drop:.1%} | {found.regressed:.1%} | {found.covered:.1%} |"
            )
    yield f"\nOther scores, {pairs:,} pairs of runs a row: studentised bootstrap, {resamples:,} resamples.\n"
    yield _header("changes")
    for n in (50, 100, 200, 400):
        for shape in SHAPES:
            rng = generator(seed, shape.__name__, n)
            null = judge_shaped(n, shape, 0.0, pairs=pairs, rng=rng, resamples=resamples)
            drop = _FOUND * float(shape(rng, (1, 200_000), 0.0).std()) / math.sqrt(n)
            found = judge_shaped(n, shape, drop, pairs=pairs, rng=rng, resamples=resamples)
            yield (
                f"| {n} | {shape.__name__} | {null.regressed:.2%} | {null.improved:.2%} | {null.covered:.1%} "
                f"| {drop:.3f} | {found.regressed:.1%} | {found.covered:.1%} |"
            )


def _header(kind: str) -> str:
    columns = (
        "n",
        kind,
        "REGRESSED, no difference",
        "IMPROVED, no difference",
        "interval holds 0",
        "smallest drop at power 0.8",
        "REGRESSED, that drop",
        "interval holds it",
    )
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def _shares(said: Counter[Verdict], covered: int, pairs: int) -> Shares:
    return Shares(
        said[Verdict.REGRESSED] / pairs,
        said[Verdict.IMPROVED] / pairs,
        said[Verdict.NO_CHANGE] / pairs,
        covered / pairs,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000, help="simulated pairs of runs for each figure")
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap, whose own default is 10,000")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for line in tables(args.pairs, args.resamples, args.seed):
        print(line, flush=True)


if __name__ == "__main__":
    main()
