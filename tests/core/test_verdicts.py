"""What is said of a candidate beside a baseline."""

from __future__ import annotations

import math

import pytest

from benchmarks.verdicts import binary_pairs, compare_binary
from t2.core.errors import ArgumentError, DataError
from t2.core.seeds import generator
from t2.core.statistics import paired
from t2.core.verdicts import Verdict, decide, noise_floor


def verdict(n: int, wins: int, losses: int, margin: float, noise: float = 0.0) -> Verdict:
    return decide({"task": compare_binary(n, wins, losses)}, margin=margin, noise={"task": noise}).verdict


def test_each_answer_where_it_is_due() -> None:
    assert verdict(1000, 10, 60, 0.02) is Verdict.REGRESSED
    assert verdict(1000, 60, 10, 0.02) is Verdict.IMPROVED
    assert verdict(1000, 10, 12, 0.02) is Verdict.NO_CHANGE
    assert verdict(100, 5, 6, 0.02) is Verdict.UNDERPOWERED


def test_a_drop_within_the_margin_is_not_called() -> None:
    # 3 points, p below 1e-4.
    assert verdict(1000, 5, 35, 0.02) is Verdict.REGRESSED
    assert verdict(1000, 5, 35, 0.03) is Verdict.UNDERPOWERED
    assert verdict(1000, 5, 35, 0.05) is Verdict.NO_CHANGE


def test_a_drop_within_the_noise_floor_is_not_called_and_not_cleared() -> None:
    assert verdict(1000, 5, 35, 0.01, noise=0.029) is Verdict.REGRESSED
    assert verdict(1000, 5, 35, 0.01, noise=0.031) is Verdict.UNDERPOWERED


def test_a_better_candidate_needs_no_proof_that_it_is_not_much_better() -> None:
    assert verdict(100, 5, 1, 0.03) is Verdict.NO_CHANGE


def test_without_a_margin_nothing_is_called_unchanged() -> None:
    assert verdict(100_000, 0, 0, 0.0) is Verdict.UNDERPOWERED


def test_one_task_decides_for_all_in_the_order_of_what_matters() -> None:
    worse, better = compare_binary(1000, 10, 60), compare_binary(1000, 60, 10)
    same, unknown = compare_binary(1000, 10, 12), compare_binary(50, 5, 6)
    for tasks, said in [
        ((worse, better, same, unknown), Verdict.REGRESSED),
        ((better, same, unknown), Verdict.UNDERPOWERED),
        ((better, same), Verdict.IMPROVED),
        ((same, same), Verdict.NO_CHANGE),
    ]:
        decision = decide({str(place): task for place, task in enumerate(tasks)}, margin=0.02)
        assert decision.verdict is said
        assert len(decision.tasks) == len(tasks)


def test_several_tasks_share_the_risk() -> None:
    # p = 0.021 alone; of three tasks the smallest p counts three times.
    worse, same = compare_binary(200, 3, 13), compare_binary(200, 8, 8)
    assert decide({"a": worse}, margin=0.0).verdict is Verdict.REGRESSED
    together = decide({"a": worse, "b": same, "c": same}, margin=0.0)
    assert together.verdict is Verdict.UNDERPOWERED
    assert together.tasks["a"].p == pytest.approx(3 * worse.p)
    assert together.tasks["b"].smallest_drop > decide({"b": same}, margin=0.0).tasks["b"].smallest_drop


def test_of_five_tasks_that_do_not_differ_any_is_called_worse_no_more_often_than_stated() -> None:
    rng, rounds = generator(0, "tasks"), 1000
    draws = [list(binary_pairs(rounds, 300, 0.1, 0.0, rng).elements()) for _ in range(5)]
    for drawn in draws:
        rng.shuffle(drawn)
    compared = {pair: compare_binary(300, *pair) for drawn in draws for pair in drawn}
    called = sum(
        decide({str(task): compared[pair] for task, pair in enumerate(pairs)}, margin=0.0).verdict is Verdict.REGRESSED
        for pairs in zip(*draws, strict=True)
    )
    # Plus three standard errors of the simulation.
    assert 0 < called <= (0.05 + 0.021) * rounds


def test_the_smallest_drop_is_above_what_is_not_called() -> None:
    decision = decide({"task": compare_binary(1000, 10, 12)}, margin=0.02)
    assert decision.tasks["task"].smallest_drop > 0.02
    assert decide({"task": compare_binary(5, 1, 1)}, margin=0.02).tasks["task"].smallest_drop == math.inf


def test_a_noise_floor_is_the_spread_of_repeated_runs() -> None:
    assert noise_floor([[1, 0, 1, 1], [1, 0, 0, 1], [0, 0, 0, 1]]) == pytest.approx(0.5)
    assert noise_floor([[1, 0], [1, 0]]) == 0
    refused: list[list[list[int]]] = [[[1, 0]], [[1, 0], [1]], [[], []]]
    for runs in refused:
        with pytest.raises(DataError, match="at least two runs over the same documents"):
            noise_floor(runs)


def test_what_cannot_be_judged_is_refused() -> None:
    one = compare_binary(10, 1, 1)
    with pytest.raises(DataError, match="no task to judge"):
        decide({}, margin=0.01)
    for margin in (-0.01, math.inf, math.nan):
        with pytest.raises(ArgumentError, match="a margin is a drop"):
            decide({"task": one}, margin=margin)
    with pytest.raises(ArgumentError, match="did you mean 'arc_easy'"):
        decide({"arc_easy": one}, margin=0.01, noise={"arc_eazy": 0.1})
    with pytest.raises(ArgumentError, match=r"one level; got 0.9, 0.95"):
        decide({"a": one, "b": paired([1, 0], [0, 0], level=0.9)}, margin=0.01)
