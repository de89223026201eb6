"""The report says what the samples say, and its page stands by itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from xml.etree import ElementTree

import pytest

from t2.core.statistics import holm, mean_interval, paired
from t2.harness.compare.report import Report
from t2.harness.compare.running import compare
from t2.harness.compare.svg import Line, Point, bars, intervals, lines, number, shades, ticks
from tests.harness.compare.grids import request


def scores(folder: Path, metric: str) -> list[float]:
    (file,) = folder.glob("samples_*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [float(row[metric]) for row in sorted(rows, key=lambda row: row["doc_hash"])]


def test_the_report_says_what_the_samples_say(tiny_folder: Path, experts: str, tmp_path: Path) -> None:
    asked = request(tiny_folder, "base,mix,best,prompt,cem(per=layer)", seeds="0,1")
    output = tmp_path / "grid"
    report = compare(asked, output)
    assert Report.model_validate_json((output / "report.json").read_bytes()) == report
    raw: dict[tuple[str, str], list[float]] = {}
    for task, metric in zip(report.tasks, ("acc", "vowel"), strict=True):
        assert (task.metric, task.docs) == (metric, 12)
        assert [row.label for row in task.rows][:4] == ["base", "mix", "mix, shuffle", "best"]
        base = scores(output / task.rows[0].folders[0], metric)
        for row in task.rows:
            columns = [scores(output / folder, metric) for folder in row.folders]
            values = [fmean(column) for column in zip(*columns, strict=True)]
            assert row.score.value == pytest.approx(fmean(values))
            interval = mean_interval(values)
            assert (row.score.low, row.score.high) == pytest.approx((interval.low, interval.high))
            assert row.relative == (pytest.approx(fmean(values) / fmean(base)) if fmean(base) else None)
            assert len(row.seeds) == (2 if row.control != "none" or row.method.startswith(("best", "cem")) else 1)
            if row.method != "base":
                assert row.to_base is not None
                expected = paired(values, base)
                assert (row.to_base.value, row.to_base.p) == pytest.approx((expected.difference, expected.p))
                raw.setdefault((row.label, "base"), []).append(expected.p)
            twin = next((each for each in task.rows if each.label == f"{row.method}, shuffle"), None)
            if row.control == "none" and twin is not None:
                columns = [scores(output / folder, metric) for folder in twin.folders]
                expected = paired(values, [fmean(column) for column in zip(*columns, strict=True)])
                assert row.to_controls["shuffle"].p == pytest.approx(expected.p)
    for (label, _), values in raw.items():
        rows = [next(row for row in task.rows if row.label == label) for task in report.tasks]
        assert [row.to_base.p_holm for row in rows if row.to_base] == pytest.approx(holm(values))

    page = (output / "report.html").read_text()
    assert not re.search(r"<script|src=|href=|url\(|@import", page)
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    titles = [chart.get("aria-label") or "" for chart in charts]
    for wanted in (
        "tiny_choice: scores with 95% intervals",
        "tiny_text: less the base, with 95% intervals",
        "prompt: domains that prompts were given",
        "cem(per=layer), seed 1: the search",
        "cem(per=layer), seed 1: α per expert and layer",
        "prompt: α, mean over requests",
        "beta: how components move",
        "How far experts move by layer",
        "Spectra: Σσ in the top r components, by module",
        "Spectra: Σσ in the top quarter of the components, by layer",
    ):
        assert wanted in titles, titles
    text = (output / "report.md").read_text()
    assert "| cem(per=layer), shuffle | 0,1 |" in text
    assert all(row.samples[0][:12] in text for task in report.tasks for row in task.rows)


def test_ticks_are_round_and_hold_their_interval() -> None:
    assert ticks(0.13, 0.58) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert ticks(-3, 40) == [-10, 0, 10, 20, 30, 40]
    assert [number(tick, ticks(0, 0.02)) for tick in ticks(0, 0.02)] == ["0.000", "0.005", "0.010", "0.015", "0.020"]
    low, *_, high = ticks(7.0, 7.0)
    assert low < 7 < high


def test_charts_of_little_are_charts_too() -> None:
    charts = (
        lines("a < b", "x", "y", [Line("one", [(1.0, 0.5)])]),
        intervals("few", "x", [Point("base & more", 0.5)], percent=True),
        bars("none", "x", {"alpha": 0.0}),
        shades("none", "x", "y", ["a"], {"b": [0.0]}),
    )
    for chart in charts:
        root = ElementTree.fromstring(chart)
        assert float(root.get("width", 0)) > 0
        assert "nan" not in chart
