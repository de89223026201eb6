"""Reward curves survive a kill and name a bad line."""

from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

from t2.core.curve import CurvePoint, append_point, read_curve
from t2.core.errors import DataError

POINTS = [
    CurvePoint(step=0, split="validation", reward=-0.5, score=0.25, seconds=1.5),
    CurvePoint(
        step=1, split="train", reward=0.1, score=0.3, kl=1e-3, learning_rate=2e-3, gradient_norm=0.7, seconds=2.25
    ),
]


@pytest.fixture
def curve(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "curve.jsonl"
    for point in POINTS:
        append_point(path, point)
    return path


def test_points_come_back_as_they_were(curve: Path) -> None:
    assert read_curve(curve) == POINTS
    assert len(curve.read_text().splitlines()) == len(POINTS)


def test_a_cut_last_line_is_left_out_wherever_it_is_cut(curve: Path) -> None:
    whole = curve.read_bytes()
    border = whole.index(b"\n") + 1
    for length in range(border, len(whole)):
        curve.write_bytes(whole[:length])
        assert read_curve(curve) == POINTS[:1], length


def test_after_a_cut_line_the_curve_goes_on(curve: Path) -> None:
    curve.write_bytes(curve.read_bytes()[:-20])
    append_point(curve, POINTS[1])
    assert read_curve(curve) == POINTS


@pytest.mark.parametrize(
    "line",
    [b"", b"{}", b"nonsense", b"[1]", b"\xff\xfe", b'{"step":1,"split":"test","reward":0,"score":0,"seconds":0}'],
)
def test_another_bad_line_is_named(line: bytes, curve: Path) -> None:
    first, second = curve.read_bytes().splitlines()
    curve.write_bytes(b"\n".join([first, line, second, b""]))
    with pytest.raises(DataError) as caught:
        read_curve(curve)
    assert str(caught.value) == f"{curve}, line 2 is not a point of a reward curve"


def test_an_absent_curve_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the curve .*curve\.jsonl: No such file"):
        read_curve(tmp_path / "curve.jsonl")


def test_a_point_holds_numbers_only() -> None:
    with pytest.raises(pydantic.ValidationError):
        CurvePoint(step=0, split="train", reward=float("nan"), score=0, seconds=0)
