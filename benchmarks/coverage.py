"""How often 95% intervals hold the truth, exactly: every outcome counted, with nothing drawn.

    python -m benchmarks.coverage

One mean of zeros and ones: the interval of t2 (Wilson's) beside others in use, for true means of 1% to 99%. The
difference of two runs: the interval of t2 (Tango's) beside others in use, for true differences from none to all changed
documents lost. Prints tables of docs/statistics.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats
from statsmodels.stats.proportion import proportion_confint

from t2.core.statistics import Array, mean_interval, tango

MEANS = np.linspace(0.01, 0.99, 981)
"""True means that a coverage is told of."""
DROPS = np.linspace(0, 1, 21)
"""True drops, as shares of the documents that change."""
_Z = 1.959963984540054
_NEGLIGIBLE = 1e-12

Ends = tuple[Array, Array]


def wilson(n: int) -> Ends:
    """The intervals of t2, for 0 … n right answers."""
    found = [mean_interval([1] * right + [0] * (n - right)) for right in range(n + 1)]
    return np.array([each.low for each in found]), np.array([each.high for each in found])


def mid_p(n: int) -> Ends:
    """Clopper and Pearson's with half of the observed outcome's probability (Lancaster 1961)."""
    right = np.arange(n + 1)

    def above(mean: Array) -> Array:
        return np.asarray(stats.binom.sf(right, n, mean) + stats.binom.pmf(right, n, mean) / 2)

    low, high = _where(lambda mean: above(mean) < 0.025, n + 1), _where(lambda mean: above(mean) < 0.975, n + 1)
    return np.where(right == 0, 0, low), np.where(right == n, 1, high)


def jeffreys(n: int) -> Ends:
    """Of the posterior under Jeffreys' prior."""
    low, high = proportion_confint(np.arange(n + 1), n, method="jeffreys")
    return low, high


def agresti_coull(n: int) -> Ends:
    """Normal, with z² more documents."""
    low, high = proportion_confint(np.arange(n + 1), n, method="agresti_coull")
    return low, high


def mean_coverage(n: int, ends: Ends, means: Array = MEANS) -> Array:
    """For each true mean the share of intervals that hold it."""
    low, high = ends
    outcomes = stats.binom.pmf(np.arange(n + 1), n, means[:, None])
    return np.asarray((outcomes * ((low <= means[:, None]) & (means[:, None] <= high))).sum(axis=1))


PairedInterval = Callable[[int, int, int], tuple[float, float]]
"""Of wins, losses and n."""


@cache
def tangos(wins: int, losses: int, n: int) -> tuple[float, float]:
    """The interval of t2."""
    found = tango(wins, losses, n)
    return found.low, found.high


def bonett_price(wins: int, losses: int, n: int) -> tuple[float, float]:
    """Normal, with one more document won and one lost (J. Educ. Behav. Stat. 37 (2012) 479)."""
    return _normal(wins + 1, losses + 1, n + 2)


def agresti_min(wins: int, losses: int, n: int) -> tuple[float, float]:
    """Normal, with half a document more in each of the four cells (Statistics in Medicine 24 (2005) 729)."""
    return _normal(wins + 0.5, losses + 0.5, n + 2)


def paired_coverage(n: int, discordance: float, interval: PairedInterval, drops: Array = DROPS) -> Array:
    """For each true drop, a share of the documents that change, the share of intervals that hold it."""
    found = []
    for drop in drops * discordance:
        chances = _outcomes(n, (discordance - drop) / 2, (discordance + drop) / 2)
        held = 0.0
        for wins, losses in np.argwhere(chances > _NEGLIGIBLE):
            low, high = interval(int(wins), int(losses), n)
            # The ends of t2's are bisected, to 1e-14.
            held += chances[wins, losses] * (low - 1e-12 <= -drop <= high + 1e-12)
        found.append(held)
    return np.array(found)


def _outcomes(n: int, won: float, lost: float) -> NDArray[np.float64]:
    """P(wins, losses), of as many rows and columns as either can have."""
    top = min(n, math.ceil(n * (won + lost) + 9 * math.sqrt(n * (won + lost)) + 9))
    wins, losses = np.meshgrid(np.arange(top + 1), np.arange(top + 1), indexing="ij")
    same = n - wins - losses
    kept = np.maximum(same, 0)
    logs = special.gammaln(n + 1) - sum(special.gammaln(each + 1) for each in (wins, losses, kept))
    powers = special.xlogy(wins, won) + special.xlogy(losses, lost) + special.xlog1py(kept, -won - lost)
    return np.where(same >= 0, np.exp(logs + powers), 0.0)


def _normal(wins: float, losses: float, n: float) -> tuple[float, float]:
    difference = (wins - losses) / n
    half = _Z * math.sqrt(max((wins + losses) / n - difference**2, 0.0) / n)
    return difference - half, difference + half


def _where(below: Callable[[Array], NDArray[np.bool_]], size: int) -> Array:
    """Where ``below`` turns from true to false, of many at once."""
    low, high = np.zeros(size), np.ones(size)
    for _ in range(50):
        middle = (low + high) / 2
        under = below(middle)
        low, high = np.where(under, middle, low), np.where(under, high, middle)
    return (low + high) / 2


def _told(coverage: Array) -> str:
    near = ((coverage >= 0.94) & (coverage <= 0.96)).mean()
    return f"{coverage.mean():.1%} ({100 * coverage.min():.1f}–{100 * coverage.max():.1f}), {near:.0%}"


def tables() -> Iterator[str]:
    """The rows of Markdown: the coverage in the mean, the least and the most, and the share of truths within 94–96%."""
    of_means = {"Wilson": wilson, "mid-p": mid_p, "Jeffreys": jeffreys, "Agresti-Coull": agresti_coull}
    yield f"| n | {' | '.join(of_means)} |\n|---|{'---|' * len(of_means)}"
    for n in (50, 100, 200, 300, 1000, 3000):
        yield f"| {n} | {' | '.join(_told(mean_coverage(n, ends(n))) for ends in of_means.values())} |"
    of_pairs: dict[str, PairedInterval] = {"Tango": tangos, "Bonett-Price": bonett_price, "Agresti-Min": agresti_min}
    yield f"\n| n | documents that change | {' | '.join(of_pairs)} |\n|---|---|{'---|' * len(of_pairs)}"
    for n in (50, 100, 300, 1000):
        for discordance in (0.02, 0.05, 0.1, 0.2, 0.4):
            cells = [_told(paired_coverage(n, discordance, interval)) for interval in of_pairs.values()]
            yield f"| {n} | {discordance:.0%} | {' | '.join(cells)} |"
        tangos.cache_clear()


def main() -> None:
    for line in tables():
        print(line, flush=True)


if __name__ == "__main__":
    main()
