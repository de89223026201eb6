"""Intervals and tests of scores: against closed forms, statsmodels, and simulated runs whose truth is known."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, special, stats
from statsmodels.stats import contingency_tables, multitest, proportion

from benchmarks.coverage import agresti_coull, bonett_price, jeffreys, mean_coverage, paired_coverage, tangos, wilson
from benchmarks.verdicts import (
    SHAPES,
    binary_pairs,
    compare_binary,
    detectable,
    judge_binary,
    judge_shaped,
    skewed,
)
from t2.core.errors import ArgumentError, DataError
from t2.core.seeds import generator
from t2.core.statistics import (
    bootstrap_t,
    holm,
    mcnemar,
    mcnemar_power,
    mean_interval,
    paired,
    smallest_detectable,
    tango,
)

PAIRS = 10_000


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_that_of_statsmodels(wins: int, losses: int) -> None:
    theirs = contingency_tables.mcnemar([[7, wins], [losses, 3]], exact=True).pvalue
    assert mcnemar(wins, losses) == pytest.approx(theirs, rel=1e-9)


def test_holm_is_that_of_statsmodels() -> None:
    rng = generator(0, "holm")
    for count in range(1, 13):
        p_values = np.round(rng.random(count) ** 2, 2).tolist()
        assert holm(p_values) == pytest.approx(multitest.multipletests(p_values, method="holm")[1].tolist(), abs=1e-12)


@given(st.integers(1, 2000), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_the_interval_of_a_share_is_that_of_statsmodels(n: int, share: float, level: float) -> None:
    right = round(share * n)
    ours = mean_interval([1] * right + [0] * (n - right), level=level)
    assert (ours.low, ours.high) == pytest.approx(
        proportion.proportion_confint(right, n, 1 - level, method="wilson"), abs=1e-9
    )


@pytest.mark.parametrize(("n", "wins", "losses"), [(44, 0, 1), (50, 3, 12), (200, 0, 9), (1000, 80, 61), (30, 15, 15)])
def test_the_ends_of_the_paired_interval_are_where_the_score_test_turns(n: int, wins: int, losses: int) -> None:
    interval = tango(wins, losses, n)
    for delta, z in [(interval.low, 1.959964), (interval.high, -1.959964)]:

        def unlikely(share: float, delta: float = delta) -> float:
            cells = [wins, losses, n - wins - losses]
            return -float(special.xlogy(cells, [share + delta, share, 1 - 2 * share - delta]).sum())

        share = optimize.minimize_scalar(
            unlikely, bounds=(max(0.0, -delta), (1 - delta) / 2), method="bounded", options={"xatol": 1e-12}
        ).x
        error = math.sqrt((2 * share + delta - delta**2) / n)
        assert ((wins - losses) / n - delta) / error == pytest.approx(z, abs=1e-3)


def test_the_paired_interval_at_its_edges() -> None:
    # Nobody's answers changed: z² / (n + z²) to each side.
    z2 = stats.norm.ppf(0.975) ** 2
    same = tango(0, 0, 100)
    assert (same.low, same.high) == pytest.approx((-z2 / (100 + z2), z2 / (100 + z2)), abs=1e-9)
    assert tango(20, 0, 20).high == 1.0
    assert tango(0, 20, 20).low == -1.0


@pytest.mark.parametrize(("wins", "losses"), [(0, 5), (2, 9), (6, 6), (0, 0)])
def test_trying_all_signs_is_mcnemar_where_all_documents_change_by_the_same(wins: int, losses: int) -> None:
    baseline = [0.5] * 40
    candidate = [0.75] * wins + [0.25] * losses + [0.5] * (40 - wins - losses)
    found = paired(candidate, baseline)
    assert (found.test, found.wins, found.losses) == ("signs", wins, losses)
    assert found.p == pytest.approx(mcnemar(wins, losses))


def test_the_bootstrap_is_the_t_test_where_that_is_right() -> None:
    rng = generator(1, "normal")
    baseline = rng.normal(0.4, 0.2, 400)
    candidate = baseline + rng.normal(0.025, 0.2, 400)
    found = paired(candidate.tolist(), baseline.tolist())
    theirs = stats.ttest_rel(candidate, baseline)
    low, high = theirs.confidence_interval(0.95)
    assert found.test == "bootstrap"
    assert found.p == pytest.approx(theirs.pvalue, abs=0.006)
    assert (found.interval.low, found.interval.high) == pytest.approx((low, high), abs=0.0015)
    mean = mean_interval(candidate.tolist())
    assert (mean.low, mean.high) == pytest.approx(
        stats.t.interval(0.95, 399, candidate.mean(), stats.sem(candidate)), abs=0.0015
    )


def test_the_same_seed_gives_the_same_interval_and_another_one_nearly() -> None:
    rng = generator(2, "seeds")
    candidate, baseline = rng.random(80).tolist(), rng.random(80).tolist()
    first, again, other = (paired(candidate, baseline, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.interval != other.interval
    assert first.interval.low == pytest.approx(other.interval.low, abs=0.01)


def test_turning_the_sides_turns_the_sign_and_nothing_else() -> None:
    rng = random.Random(0)
    for draw in (lambda: float(rng.random() < 0.5), rng.random):
        candidate, baseline = [draw() for _ in range(60)], [draw() for _ in range(60)]
        one, other = paired(candidate, baseline), paired(baseline, candidate)
        lower = paired(candidate, baseline, higher_is_better=False)
        assert (one.difference, one.wins, one.losses) == pytest.approx((-other.difference, other.losses, other.wins))
        assert (one.interval.low, one.interval.high) == pytest.approx((-other.interval.high, -other.interval.low))
        assert one.p == pytest.approx(other.p)
        assert lower == other


@pytest.mark.parametrize("n", [200, 1000])
@pytest.mark.parametrize("discordance", [0.05, 0.2])
def test_runs_that_do_not_differ_are_called_worse_no_more_often_than_stated(n: int, discordance: float) -> None:
    found = judge_binary(n, discordance, 0.0, pairs=PAIRS, rng=generator(3, n, str(discordance)))
    # 2.5% on each side, plus three standard errors of the simulation.
    assert found.regressed <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / PAIRS)
    assert found.regressed + found.improved <= 0.05
    assert 0.94 <= found.covered <= 0.965


@pytest.mark.parametrize("n", [20, 100, 300, 1000, 3000])
def test_no_share_of_changed_documents_lets_regressed_be_said_more_often_than_stated(n: int) -> None:
    said = [mcnemar_power(n, share, 0.0) for share in np.linspace(0.002, 1, 250)]
    assert 0.01 < max(said) <= 0.025


@pytest.mark.parametrize("n", [200, 1000])
@pytest.mark.parametrize("discordance", [0.05, 0.2])
def test_the_smallest_drop_is_found_with_the_power_stated(n: int, discordance: float) -> None:
    drop = detectable(n, discordance)
    found = judge_binary(n, max(discordance, drop), drop, pairs=PAIRS, rng=generator(4, n, str(discordance)))
    assert found.regressed == pytest.approx(0.8, abs=0.02)
    assert found.improved < 0.001
    assert 0.94 <= found.covered <= 0.965


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_scores_of_other_kinds_are_judged_as_stated(shape) -> None:
    n, resamples = 100, 500
    null = judge_shaped(n, shape, 0.0, pairs=PAIRS, rng=generator(5, shape.__name__), resamples=resamples)
    assert null.regressed <= 0.05
    assert null.regressed + null.improved <= 0.055
    assert 0.94 <= null.covered <= 0.965
    drop = (1.959964 + 0.841621) * shape(generator(6), (1, 100_000), 0.0).std() / math.sqrt(n)
    found = judge_shaped(n, shape, drop, pairs=2000, rng=generator(7, shape.__name__), resamples=resamples)
    # Far changes that all go upwards hide some of a drop at so few documents.
    assert (0.7 if shape is skewed else 0.76) <= found.regressed <= 0.88
    assert found.improved < 0.001


def test_a_coverage_is_that_of_counting_by_hand() -> None:
    # Of two documents: where none is right, or both, the interval holds 1/2, and so it does where one is.
    assert mean_coverage(2, wilson(2), np.array([0.5, 0.9])).tolist() == pytest.approx([1.0, 1 - 0.01])
    # Of three documents all of which change, fairly: no outcome excludes 0.
    assert paired_coverage(3, 1.0, tangos, np.array([0.0])).tolist() == pytest.approx([1.0])
    # Of four, 4:0 and 0:4 do, at |t| = 2.
    assert paired_coverage(4, 1.0, tangos, np.array([0.0])).tolist() == pytest.approx([1 - 2 / 16])


@pytest.mark.parametrize("n", [50, 100, 300])
def test_intervals_of_means_hold_the_truth_in_95_of_100_runs_and_come_as_near_as_any(n: int) -> None:
    ours = mean_coverage(n, wilson(n))
    assert 0.949 <= ours.mean() <= 0.953
    near = np.abs(ours - 0.95) <= 0.01
    assert near.mean() >= {50: 0.69, 100: 0.85, 300: 0.97}[n]
    for other in (jeffreys, agresti_coull):
        theirs = mean_coverage(n, other(n))
        assert near.mean() >= (np.abs(theirs - 0.95) <= 0.01).mean()
        assert ours.min() >= theirs.min() or abs(ours.mean() - 0.95) < abs(theirs.mean() - 0.95)


@pytest.mark.parametrize(("n", "discordance"), [(50, 0.4), (100, 0.2), (200, 0.1), (300, 0.05), (400, 0.05)])
def test_where_15_documents_change_every_difference_is_in_94_to_96_of_100_intervals(n: int, discordance: float) -> None:
    ours = paired_coverage(n, discordance, tangos, np.linspace(0, 1, 6))
    assert 0.94 <= ours.min() <= ours.max() <= 0.96
    theirs = paired_coverage(n, discordance, bonett_price, np.linspace(0, 1, 6))
    assert abs(ours.mean() - 0.95) <= abs(theirs.mean() - 0.95)


def test_the_power_is_that_of_counting_every_outcome() -> None:
    n, discordance, drop = 30, 0.4, 0.25
    won, lost = (discordance - drop) / 2, (discordance + drop) / 2
    for threshold in (0.0, 0.25, 0.3):
        exact = sum(
            stats.multinomial.pmf([wins, losses, n - wins - losses], n, [won, lost, 1 - discordance])
            for wins in range(n + 1)
            for losses in range(wins + 1, n + 1 - wins)
            if mcnemar(wins, losses) <= 0.05 and (losses - wins) / n > threshold + 1e-12
        )
        assert mcnemar_power(n, discordance, drop, threshold=threshold) == pytest.approx(exact, abs=1e-9)


def test_the_smallest_drop_shrinks_with_documents_and_grows_with_changes_threshold_and_power() -> None:
    def smallest(n: int, wins: int, losses: int, **how: float) -> float:
        return smallest_detectable(compare_binary(n, wins, losses), **how)

    assert smallest(4000, 200, 200) < smallest(1000, 50, 50) < smallest(1000, 150, 150)
    assert smallest(1000, 50, 50) < smallest(1000, 50, 50, power=0.95)
    assert smallest(1000, 50, 50) < smallest(1000, 50, 50, alpha=0.01)
    assert smallest(1000, 50, 50, threshold=0.05) > 0.05
    # Five documents: all lost, p is still 1/16.
    assert smallest(5, 1, 1) == math.inf
    assert smallest(6, 0, 0) < 1
    rng = generator(9)
    graded = paired(rng.random(100).tolist(), rng.random(100).tolist())
    assert smallest_detectable(graded) == pytest.approx((1.95996 + 0.84162) * graded.standard_error, rel=1e-4)


def test_a_few_changed_documents_of_many_are_judged_without_resampling() -> None:
    rng = generator(10)
    covered = called = 0
    for _ in range(200):
        changed = np.where(rng.random(300) < 0.02, rng.uniform(-1, 1, 300), 0.0)
        baseline = np.where(changed > 0, 0.0, 1.0)
        found = paired((baseline + changed).tolist(), baseline.tolist())
        assert math.isfinite(found.interval.low)
        covered += 0 in found.interval
        called += found.p <= 0.05
    assert covered >= 0.94 * 200
    assert called <= 0.05 * 200


def test_scores_without_spread_have_an_interval_of_no_width() -> None:
    assert mean_interval([0.3] * 5).low == pytest.approx(0.3)
    assert mean_interval([0.3] * 5).high == pytest.approx(0.3)
    _, halves, p = bootstrap_t([[0.0, 0.0, 0.0], [0.1, 0.2, 0.3]], resamples=200)
    assert halves[0] == 0
    assert p[0] == 1


def test_simulated_pairs_have_the_difference_that_was_asked_for() -> None:
    drawn = binary_pairs(PAIRS, 100, 0.2, 0.05, generator(11))
    assert sum(drawn.values()) == PAIRS
    assert sum((losses - wins) * count for (wins, losses), count in drawn.items()) / PAIRS == pytest.approx(5, abs=0.2)


@pytest.mark.parametrize(
    ("candidate", "baseline", "says"),
    [
        ([], [], "the candidate has no scores"),
        ([1, 0], [1], "the candidate has 2 scores and the baseline 1"),
        ([1, float("nan")], [1, 0], "the candidate has a score that is not finite, document 1"),
        ([0.5], [1], "at least 2"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(candidate: list[float], baseline: list[float], says: str) -> None:
    with pytest.raises(DataError, match=says):
        paired(candidate, baseline)


def test_shares_out_of_range_are_refused() -> None:
    with pytest.raises(ArgumentError, match="level is a share between 0 and 1"):
        mean_interval([0, 1], level=95)
    # The nearest to 1 that there is below it.
    assert mean_interval([0, 1], level=math.nextafter(1, 0)).low < mean_interval([0, 1], level=0.999).low
    with pytest.raises(ArgumentError, match=r"power is a share between 0.5 and 1"):
        smallest_detectable(compare_binary(10, 1, 1), power=80)
