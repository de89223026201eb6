"""Which configuration is reported is decided by held-out scores alone."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import pytest

from t2.core.digests import doc_hash
from t2.core.errors import ArgumentError, ResultsError
from t2.core.record import AdaptationRecord, HeldOut, ModelRef, Objective
from t2.harness.compare.groups import choose
from t2.harness.compare.methods import parse_methods
from t2.harness.compare.report import Report
from t2.harness.compare.running import compare
from t2.harness.pool import find_pool
from tests.harness import tiny
from tests.harness.compare.grids import request

PAPER = "cem(per=expert|layer,normalise=none|sum)"


def record(score: float | None, *, docs: tuple[str, ...] = ("a", "b"), higher: bool = True) -> AdaptationRecord:
    return AdaptationRecord(
        key="k",
        task="t",
        task_version="1",
        strategy="cem",
        base=ModelRef(id="b", fingerprint="f" * 64),
        dtype="float32",
        objective=Objective(metric="acc", filter="none", higher_is_better=higher),
        adaptation_docs=docs,
        held_out=None if score is None else HeldOut(docs=2, before=0.0, after=score),
    )


@pytest.mark.parametrize(
    ("scores", "higher", "taken"),
    [
        ([0.2, 0.7, 0.7], True, 1),
        ([0.2, 0.7, 0.1], False, 2),
        ([None, 0.0], True, 1),
        ([None, float("nan"), 3.0], False, 2),
        ([None, None], True, 0),
    ],
)
def test_the_best_held_out_score_wins_and_the_first_of_equals(
    scores: list[float | None], higher: bool, taken: int
) -> None:
    assert choose([record(score, higher=higher) for score in scores]) == taken


def test_scores_on_different_documents_are_not_compared() -> None:
    with pytest.raises(ResultsError, match="were fitted to different documents"):
        choose([record(0.5), record(0.7, docs=("a", "c"))])


@pytest.mark.parametrize(
    ("methods", "rows"),
    [
        (
            "cem(per=expert|layer)",
            {"cem(per=expert)": "cem(per=expert|layer)", "cem(per=layer)": "cem(per=expert|layer)"},
        ),
        (
            "cem(shots=3|5,search=cem|cma)",
            {
                "cem(shots=3,search=cem)": "cem(shots=3,search=cem|cma)",
                "cem(shots=3,search=cma)": "cem(shots=3,search=cem|cma)",
                "cem(shots=5,search=cem)": "cem(shots=5,search=cem|cma)",
                "cem(shots=5,search=cma)": "cem(shots=5,search=cem|cma)",
            },
        ),
        (
            "cem(shots=3|20),cem(light=true)",
            {"cem(shots=3)": None, "cem(shots=20)": None, "cem(light=true)": None},
        ),
        # What draws no documents has no held-out score to choose by.
        ("mix(space=paper|delta)", {"mix(space=paper)": None, "mix(space=delta)": None}),
    ],
)
def test_alternatives_are_rows_and_a_choice_among_equal_shots(methods: str, rows: dict[str, str | None]) -> None:
    assert {method.label: method.choice for method in parse_methods(methods)[1:]} == rows


@pytest.mark.parametrize(
    ("methods", "why"),
    [
        ("cem(per=expert|)", "'per=expert|' is not of the form key=value"),
        ("cem(per=expert|expert)", "names cem(per=expert) twice"),
        ("cem(per=expert|layer),cem(per=layer)", "names cem(per=layer) twice"),
        ("cem(shots=3,shots=5)", "shots stands there twice; join its values by |"),
    ],
)
def test_alternatives_that_mean_nothing_are_refused(methods: str, why: str) -> None:
    with pytest.raises(ArgumentError) as refused:
        parse_methods(methods)
    assert why in str(refused.value)


def test_no_test_label_has_a_part_in_the_choice(
    tiny_folder: Path, experts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = {"test": tiny.questions(40)}
    pool = {doc_hash(doc) for doc in find_pool(tiny.choice_task(data=clean)).docs}
    poisoned = {
        "test": [row if doc_hash(row) in pool else {**row, "gold": (row["gold"] + 1) % 4} for row in clean["test"]]
    }
    reports: list[Report] = []
    for number, data in enumerate((clean, poisoned)):
        monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / f"cache{number}"))
        only = {"tiny_choice": partial(tiny.choice_task, data=data)}
        asked = request(tiny_folder, PAPER, tasks=only, seeds="0,1", controls="none,shuffle", shots=8)
        reports.append(compare(asked, tmp_path / f"grid{number}"))
    (task,), (other,) = (report.tasks for report in reports)
    rows = {row.label: row for row in task.rows}
    assert [row.label for row in task.rows][-2:] == [PAPER, f"{PAPER}, shuffle"]
    by_test = []
    for label, control in ((PAPER, "none"), (f"{PAPER}, shuffle", "shuffle")):
        configurations = [row for row in task.rows if row.control == control and row.coefficients and not row.choices]
        assert len(configurations) == 4
        for number, one in enumerate(rows[label].choices):
            held_out = [row.records[number].held_out for row in configurations]
            scores = [each.after for each in held_out if each is not None and each.after is not None]
            best = configurations[scores.index(max(scores))]
            assert (one.seed, one.taken) == (number, best.method)
            assert list(one.held_out.values()) == scores
            assert rows[label].samples[number] == best.samples[number]
            assert rows[label].by_seed[number] == best.by_seed[number]
            by_test.append(best.by_seed[number] == max(row.by_seed[number] or 0.0 for row in configurations))
        searches = [sum(row.records[number].timing.pass1 for row in configurations) for number in range(2)]
        assert rows[label].pass1 == pytest.approx(sum(searches) / 2)
    # Somewhere the test documents would have had it otherwise, or this would show nothing.
    assert not all(by_test)
    assert [row.choices for row in task.rows] == [row.choices for row in other.rows]
    assert [row.by_seed for row in task.rows] != [row.by_seed for row in other.rows]
    assert list(rows[PAPER].to_controls) == ["shuffle"]

    text = (tmp_path / "grid0" / "report.md").read_text()
    page = (tmp_path / "grid0" / "report.html").read_text()
    assert "### Chosen on held-out documents" in text
    assert "Chosen on held-out documents" in page
    told = json.loads((tmp_path / "grid0" / "report.json").read_text())["tasks"][0]["rows"][-2]
    assert [one["taken"] for one in told["choices"]] == [one.taken for one in rows[PAPER].choices]
    escaped = PAPER.replace("|", "\\|")
    assert f"| {escaped} | 0 | {rows[PAPER].choices[0].taken} |" in text
    # A row that chooses has no runs of its own.
    runs = text.partition("### Runs")[2]
    assert runs.count("| cem(per=layer,normalise=sum), seed") == 2
    assert "\\|" not in runs


def test_shots_and_the_light_setting_are_rows_of_one_grid(tiny_folder: Path, experts: str, tmp_path: Path) -> None:
    methods = "cem(shots=3|5|10|20,generations=2),cem(light=true)"
    asked = request(tiny_folder, methods, tasks={"tiny_choice": tiny.choice_task}, seeds="0,1", controls="none")
    asked = replace(asked, model_args={"pretrained": str(tiny_folder), "population": 4})
    (task,) = compare(asked, tmp_path / "grid").tasks
    shots = {"base": 0, **{f"cem(shots={each},generations=2)": each for each in (3, 5, 10, 20)}, "cem(light=true)": 3}
    assert [row.label for row in task.rows] == list(shots)
    for row in task.rows:
        assert row.seeds == ((None,) if row.label == "base" else (0, 1))
        assert [len(record.adaptation_docs) for record in row.records] == [shots[row.label]] * len(row.seeds)
        assert row.score.value == pytest.approx(fmean(score or 0.0 for score in row.by_seed))
        assert not row.choices
