"""Intervals and tests for scores of documents, and what two runs over the same documents say of their difference.

Scores that are all 0 or 1 have closed forms; any others are resampled, which needs no assumption on their shape.
docs/statistics.md tells why these tests, with the simulations that they were chosen by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from t2.core.errors import ArgumentError, DataError
from t2.core.seeds import generator

Array = NDArray[np.float64]

RESAMPLES = 10_000
FEW = 12
"""Changed documents up to which all 2^k signs are tried instead of resampling."""
_CHUNK = 2_000_000
"""Drawn indices that are held in memory at once."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval.

    Attributes:
        low, high: its ends, in the unit of the scores; both are in it.
        level: the share of such intervals that hold the true value.
    """

    low: float
    high: float
    level: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """What two runs over the same documents say of their difference.

    Attributes:
        n: documents.
        difference: mean of the candidate's scores less the baseline's; above 0 the candidate is better, also for
            metrics where lower is better.
        interval: of the difference.
        p: two-sided, of no difference.
        wins, losses: documents on which the candidate scores better, and worse.
        test: how ``p`` was found: ``mcnemar`` for scores of 0 and 1, ``bootstrap``, or ``signs`` where at most 12
            documents differ, too few to resample.
        standard_error: of the difference.
        step: how far a document's score moves where it does, in the mean; 1 for scores of 0 and 1, and the range of the
            scores where none moves.
    """

    n: int
    difference: float
    interval: Interval
    p: float
    wins: int
    losses: int
    test: Literal["mcnemar", "bootstrap", "signs"]
    standard_error: float
    step: float


def mean_interval(scores: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Interval:
    """Interval of the mean of a run's scores.

    Wilson's for scores of 0 and 1 (JASA 22 (1927) 209, as Brown, Cai and DasGupta recommend it, Statistical Science 16
    (2001) 101), else of the studentised bootstrap (:func:`bootstrap_t`).

    Args:
        scores: one of each document.

    Raises:
        ArgumentError: ``level`` is not between 0 and 1.
        DataError: there is no score, only one that is not 0 or 1, or one that is not finite.
    """
    values = _scores(scores, "the run")
    n = len(values)
    z = _z(level)
    if _binary(values):
        share = float(values.mean())
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        # The ends are 0 and 1 exactly where no, or every, score is 1.
        return Interval(0.0 if share == 0 else middle - half, 1.0 if share == 1 else middle + half, level)
    _at_least_two(n)
    means, halves, _ = bootstrap_t(values[None], level=level, seed=seed)
    if not math.isfinite(halves[0]):
        return _padded(values, float(values.min()), float(values.max()), level)
    return Interval(float(means[0] - halves[0]), float(means[0] + halves[0]), level)


def paired(
    candidate: Sequence[float],
    baseline: Sequence[float],
    *,
    higher_is_better: bool = True,
    level: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """The difference of two runs, document by document.

    Scores of 0 and 1: exact McNemar (:func:`mcnemar`), and Tango's score interval (Statistics in Medicine 17 (1998)
    891). Others: studentised bootstrap of the differences (:func:`bootstrap_t`). Where at most 12 documents differ, p
    is that of all their signs (Fisher's randomisation, which is McNemar's where all differ by the same amount);
    where these are less than half of the documents, the interval supposes one more document that wins and one that
    loses the whole range of the scores (as Bonett and Price do for 0 and 1, J. Educ. Behav. Stat. 37 (2012) 479).

    Args:
        candidate, baseline: scores of the same documents in the same order.
        higher_is_better: false turns the sign.
        seed: of the bootstrap.

    Raises:
        ArgumentError: ``level`` is not between 0 and 1.
        DataError: the runs differ in length, are empty, hold a score that is not finite, or a single
            one that is not 0 or 1.
    """
    better, worse = _scores(candidate, "the candidate"), _scores(baseline, "the baseline")
    if len(better) != len(worse):
        raise DataError(
            f"the candidate has {len(better)} scores and the baseline {len(worse)}; give one of each for every document"
        )
    if not higher_is_better:
        better, worse = worse, better
    n = len(better)
    differences = better - worse
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    if _binary(better) and _binary(worse):
        difference = (wins - losses) / n
        error = math.sqrt(max(wins + losses - n * difference**2, 0.0)) / n
        return PairedDifference(
            n, difference, tango(wins, losses, n, level), mcnemar(wins, losses), wins, losses, "mcnemar", error, 1.0
        )
    _at_least_two(n)
    difference, error = float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(n))
    changed = wins + losses
    few = changed <= FEW
    spread = float(max(better.max(), worse.max()) - min(better.min(), worse.min()))
    step = float(np.abs(differences).sum()) / changed if changed else spread
    half, p = math.inf, 0.0
    if not few or 2 * changed >= n:
        _, halves, ps = bootstrap_t(differences[None], level=level, seed=seed)
        half, p = float(halves[0]), float(ps[0])
    if few:
        p = _signs(differences[differences != 0])
    interval = Interval(difference - half, difference + half, level)
    if half == math.inf:
        interval = _padded(differences, -spread, spread, level)
    return PairedDifference(n, difference, interval, p, wins, losses, "signs" if few else "bootstrap", error, step)


@lru_cache(4096)
def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p of McNemar's test: of ``wins`` + ``losses`` fair coins, twice the smaller tail, at most 1."""
    n = wins + losses
    term = tail = 1
    for k in range(min(wins, losses)):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, tail / (1 << n) * 2)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several, in their order (Holm, Scand. J. Statistics 6 (1979) 65)."""
    count, highest = len(p_values), 0.0
    adjusted = [0.0] * count
    for rank, place in enumerate(sorted(range(count), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (count - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def tango(wins: int, losses: int, n: int, level: float = 0.95) -> Interval:
    """Score interval of the difference of two paired proportions, (wins − losses) / n (Tango 1998, equation 3).

    Its ends are the differences whose score test has just p = 1 − level.
    """
    z = _z(level)

    def score(delta: float) -> float:
        a, b = 2 * n, -wins - losses + (2 * n - wins + losses) * delta
        share = (math.sqrt(max(b * b + 4 * a * losses * delta * (1 - delta), 0.0)) - b) / (2 * a)
        variance = n * (2 * share + delta * (1 - delta))
        return (wins - losses - n * delta) / math.sqrt(max(variance, 1e-300))

    return Interval(
        _bisect(lambda delta: score(delta) > z, -1.0, 1.0) if losses < n else -1.0,
        _bisect(lambda delta: score(delta) > -z, -1.0, 1.0) if wins < n else 1.0,
        level,
    )


def bootstrap_t(
    values: ArrayLike, *, level: float = 0.95, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[Array, Array, Array]:
    """Symmetric studentised bootstrap of means (Hall, J. R. Statist. Soc. B 50 (1988) 35), of many samples at once.

    A sample's documents are drawn anew ``resamples`` times; the 1 − level quantile of |t| over these takes the place of
    the normal's. All samples share the draws, which depend on ``seed`` and n alone.

    Args:
        values: (samples, n), n ≥ 2.

    Returns:
        The means, half the widths of their intervals, and the two-sided p of mean 0, each (samples,). A half is
        infinite where more than 1 − level of the draws have no spread; where a sample has none, its half is 0.
    """
    data = np.asarray(values, dtype=np.float64)
    samples, n = data.shape
    means = data.mean(axis=1)
    centred = data - means[:, None]
    squares = centred * centred
    variances = squares.mean(axis=1)
    # Below this a spread is rounding.
    variances[variances <= 1e-24 * np.abs(data).max(axis=1) ** 2] = 0
    errors = np.sqrt(variances / (n - 1))
    drawn = np.empty((samples, resamples))
    rng = generator(seed, "bootstrap")
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        places = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        counts = np.bincount(places.ravel(), minlength=rows * n).reshape(rows, n).T / n
        shifts = centred @ counts
        spreads = squares @ counts - shifts * shifts
        spreads[spreads <= 1e-12 * variances[:, None]] = 0
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn[:, start : start + rows] = np.abs(shifts) / np.sqrt(spreads / (n - 1))
    drawn[np.isnan(drawn)] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        observed = np.where(means == 0, 0.0, np.abs(means) / errors)
        # Rounding must not make a draw that equals the sample smaller than it.
        p = (1 + (drawn >= observed[:, None] * (1 - 1e-9)).sum(axis=1)) / (resamples + 1)
        halves = np.where(errors == 0, 0.0, np.quantile(drawn, level, axis=1, method="higher") * errors)
    return means, halves, p


@lru_cache(4096)
def smallest_detectable(
    difference: PairedDifference, *, threshold: float = 0.0, alpha: float | None = None, power: float = 0.8
) -> float:
    """The smallest drop that a comparison of this size, as noisy as it was, finds with this power.

    For scores of 0 and 1 the power is exact: of n documents the share that was seen to differ does so, or more where
    the drop needs more, and found is what exact McNemar finds. Where few documents differ in other scores it is the
    same, each by the mean step; else a normal mean has the standard error that was seen.

    Args:
        threshold: a drop that is not above it does not count as found.
        alpha: two-sided, 1 − the interval's level if not told.

    Returns:
        A drop, above 0, in the unit of the scores; infinite where n documents cannot find any.

    Raises:
        ArgumentError: ``power`` or ``alpha`` is not between 0 and 1.
    """
    alpha = 1 - difference.interval.level if alpha is None else alpha
    if not 0.5 < power < 1:
        raise ArgumentError(f"a power is a share between 0.5 and 1, such as 0.8; got {power}")
    z, z_power = _z(1 - alpha), _z(2 * power - 1)
    if difference.test == "bootstrap":
        error = difference.standard_error
        return max((z + z_power) * error, threshold + z_power * error)
    n, discordance, step = difference.n, (difference.wins + difference.losses) / difference.n, difference.step
    if step == 0:
        return math.inf
    threshold /= step
    if mcnemar_power(n, 1.0, 1.0, alpha=alpha, threshold=threshold) < power:
        return math.inf

    def missed(drop: float) -> bool:
        return mcnemar_power(n, max(discordance, drop), drop, alpha=alpha, threshold=threshold) < power

    return step * _bisect(missed, 0.0, 1.0, halvings=20)


def mcnemar_power(n: int, discordance: float, drop: float, *, alpha: float = 0.05, threshold: float = 0.0) -> float:
    """Probability that exact McNemar says of n documents that the candidate is worse.

    Args:
        discordance: the share of documents on which the runs differ, in truth.
        drop: the share that is lost less the share that is won, in truth; at most ``discordance``.
        threshold: the drop seen must be above it besides.
    """
    lost = (discordance + drop) / (2 * discordance)
    logs = _log_factorials(n)
    changed = np.arange(n + 1)
    above = np.floor((changed + threshold * n * (1 + 1e-12)) / 2).astype(np.int64) + 1
    needed = np.maximum(_critical_losses(n, alpha), above)
    # P(losses ≥ needed | changed) from one number of changed documents to the next: `needed` grows by 0 or 1 at a time.
    before, bar = changed[:-1], needed[:-1]
    steps = lost * _binomial(logs, before, bar - 1, lost) - np.where(
        needed[1:] > bar, _binomial(logs, changed[1:], bar, lost), 0.0
    )
    tail = np.concatenate([[0.0], np.cumsum(steps)])
    return float(np.clip(tail, 0, 1) @ _binomial(logs, np.full(n + 1, n), changed, discordance))


@lru_cache(64)
def _critical_losses(n: int, alpha: float) -> NDArray[np.int64]:
    """For 0 … n changed documents, the fewest losses among them that exact McNemar calls worse."""
    logs = _log_factorials(n)
    halves = -math.log(2) * np.arange(n + 1)
    needed = np.empty(n + 1, dtype=np.int64)
    bar, tail = 1, 0.0
    for changed in range(n + 1):
        needed[changed] = bar
        # tail = P(losses ≥ bar) of as many fair coins; it must stay at or below half of alpha.
        if changed == n:
            break
        if bar - 1 <= changed:
            tail += 0.5 * math.exp(logs[changed] - logs[bar - 1] - logs[changed - bar + 1] + halves[changed])
        if tail > alpha / 2 * (1 + 1e-9):
            tail -= math.exp(logs[changed + 1] - logs[bar] - logs[changed + 1 - bar] + halves[changed + 1])
            bar += 1
    return needed


def _binomial(logs: Array, n: NDArray[np.int64], k: NDArray[np.int64], share: float) -> Array:
    """P(k of n), 0 where k is outside of 0 … n."""
    inside = (k >= 0) & (k <= n)
    n, k = np.where(inside, n, 0), np.where(inside, k, 0)
    right = k * math.log(share) if share > 0 else np.where(k > 0, -np.inf, 0.0)
    wrong = (n - k) * math.log1p(-share) if share < 1 else np.where(n > k, -np.inf, 0.0)
    return np.where(inside, np.exp(logs[n] - logs[k] - logs[n - k] + right + wrong), 0.0)


@lru_cache(64)
def _log_factorials(n: int) -> Array:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])


def _signs(differences: Array) -> float:
    """Two-sided p of their sum among the sums of all choices of their signs."""
    count = len(differences)
    signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
    sums = np.abs(signs @ differences)
    return float((sums >= abs(differences.sum()) - 1e-9 * np.abs(differences).sum()).mean())


def _padded(values: Array, low: float, high: float, level: float) -> Interval:
    """Normal interval of the mean with two more documents, one at each extreme."""
    more = np.concatenate([values, [low, high]])
    middle, half = float(more.mean()), _z(level) * float(more.std()) / math.sqrt(len(more))
    return Interval(middle - half, middle + half, level)


def _bisect(below: Callable[[float], bool], low: float, high: float, halvings: int = 48) -> float:
    """Where ``below`` turns from true to false."""
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return (low + high) / 2


def _z(level: float) -> float:
    """The normal's two-sided quantile."""
    if not 0 < level < 1:
        raise ArgumentError(f"a level is a share between 0 and 1, such as 0.95; got {level}")
    # The other tail: (1 + level) / 2 may round to 1.
    return -NormalDist().inv_cdf((1 - level) / 2)


def _scores(scores: Sequence[float], whose: str) -> Array:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise DataError(f"{whose} has no scores; give one for each document")
    if not np.isfinite(values).all():
        place = int(np.flatnonzero(~np.isfinite(values))[0])
        raise DataError(f"{whose} has a score that is not finite, document {place}; give one number for each document")
    return values


def _binary(values: Array) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _at_least_two(n: int) -> None:
    if n < 2:
        raise DataError("one document tells nothing of a mean; give at least 2")
