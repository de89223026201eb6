"""Dispatch through the model: records, repetition, and what must not move it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from t2.adapters.engine.transformers import TransformersEngine
from t2.core.errors import ArgumentError
from t2.harness.model import T2LM
from t2.harness.summary import format_summary
from tests.harness import tiny

LABELS = ("code", "math", "reasoning", "others")
HALF = {"threshold": 0.5}


@pytest.fixture
def classifier(tmp_path: Path, tiny_engine: TransformersEngine, experts: str) -> str:
    """A classifier beside the three experts in the user's folder."""
    tiny.save_expert(
        tmp_path / "experts" / "names.safetensors", tiny_engine, 9, scale=1.0, kind="classifier", labels=LABELS
    )
    return "names"


def make(folder: Path, **args: Any) -> T2LM:
    return T2LM.create_from_arg_obj({"pretrained": str(folder), **args}, {"device": "cpu", "batch_size": 3})


def own_domain(**config: Any) -> Any:
    return tiny.choice_task(metadata={"version": 1.0, "t2": {"domain": "math"}}, **config)


@pytest.mark.parametrize("adapt", ["prompt", "classifier"])
def test_a_dispatch_is_recorded_shown_and_found_again(adapt: str, tiny_folder: Path, classifier: str) -> None:
    lm = make(tiny_folder, adapt=adapt, **HALF)
    results = tiny.evaluate(lm, [own_domain()])
    record = lm.records[0]
    found = record.calibration
    assert found is not None
    assert (found.labels, found.threshold, found.docs) == (LABELS, 0.5, 80)
    assert found.scored == {"math": record.dispatch}
    assert all(sum(row.values()) == 20 for row in found.confusion.values())
    assert found.accuracy == sum(row[label] for label, row in found.confusion.items()) / 80
    assert [ref.name for ref in record.experts] == ["alpha", "beta", "gamma"] + (
        ["names"] if adapt == "classifier" else []
    )
    assert f"{found.accuracy:.0%} of 80 prompts named right" in format_summary(lm.records, {})
    if found.below:
        assert f"{found.below} below the threshold 0.50 get the posterior mixture" in record.note
        assert any("(base)" in used.alpha for used in record.mixtures)
    again = make(tiny_folder, adapt=adapt, **HALF)
    repeated = tiny.evaluate(again, [own_domain()])
    assert again.records[0].digest() == record.digest()
    assert tiny.answers(repeated, "tiny_choice") == tiny.answers(results, "tiny_choice")


def test_some_prompt_falls_below_the_threshold(tiny_folder: Path, experts: str) -> None:
    lm = make(tiny_folder, adapt="prompt", threshold=1)
    tiny.evaluate(lm, [tiny.choice_task()])
    record = lm.records[0]
    assert record.calibration is not None
    assert record.calibration.below == 12
    assert any(used.alpha.get("(base)", 0) > 0 for used in record.mixtures)
    assert all(sum(used.alpha.values()) == pytest.approx(1) for used in record.mixtures if used.alpha)


def test_poisoned_test_labels_do_not_move_a_dispatch(
    tiny_folder: Path, classifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = tiny.splits()
    poisoned: dict[str, tiny.Rows] = {
        split: [{**row, "gold": (row["gold"] + 1) % 4} for row in rows] for split, rows in clean.items()
    }
    records = []
    for number, data in enumerate((clean, poisoned)):
        monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / f"cache{number}"))
        lm = make(tiny_folder, adapt="classifier", **HALF)
        tiny.evaluate(lm, [tiny.choice_task(data=data)])
        records.append(lm.records[0])
    assert records[0].digest() == records[1].digest()


@pytest.mark.parametrize("adapt", ["prompt", "classifier", "auto"])
def test_a_dispatch_is_made_again_when_its_held_out_prompts_change(
    adapt: str, tiny_folder: Path, classifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {"population": 2, "generations": 1, "shots": 2} if adapt == "auto" else {}
    keys = []
    for kept in (20, 10):
        monkeypatch.setattr("t2.harness.held_out.PER_DOMAIN", kept)
        lm = make(tiny_folder, adapt=adapt, **search)
        tiny.evaluate(lm, [tiny.choice_task()])
        keys.append(lm.records[0].key)
        if adapt != "auto":
            assert lm.records[0].calibration is not None
            assert lm.records[0].calibration.docs == 4 * kept
    assert keys[0] != keys[1]


def test_a_control_shuffles_the_experts_and_not_the_classifier(tiny_folder: Path, classifier: str) -> None:
    records = []
    for control in ("none", "shuffle"):
        lm = make(tiny_folder, adapt="classifier", control=control, threshold=0)
        tiny.evaluate(lm, [tiny.choice_task()])
        records.append(lm.records[0])
    assert records[0].dispatch == records[1].dispatch
    assert records[0].key != records[1].key


def test_generated_names_have_no_confidence(tiny_folder: Path, experts: str) -> None:
    lm = make(tiny_folder, adapt="prompt", dispatch="generate")
    tiny.evaluate(lm, [tiny.choice_task()])
    found = lm.records[0].calibration
    assert found is not None
    assert found.threshold is None
    assert found.unparsed <= lm.records[0].dispatch["others"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"adapt": "cem", "experts": "alpha+names"}, "experts: names is a classifier, which names domains and answers"),
        (
            {"adapt": "classifier", "experts": "alpha+names+more"},
            "experts: names and more are classifiers; adapt=classif",
        ),
        (
            {"adapt": "classifier", "experts": "law+names"},
            "expert law is for law, which is no label of the classifier names",
        ),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(
    args: dict[str, Any],
    message: str,
    tiny_folder: Path,
    classifier: str,
    tmp_path: Path,
    tiny_engine: TransformersEngine,
) -> None:
    folder = tmp_path / "experts"
    tiny.save_expert(folder / "law.safetensors", tiny_engine, 5, domain="law")
    tiny.save_expert(folder / "more.safetensors", tiny_engine, 6, kind="classifier", labels=LABELS)
    with pytest.raises(ArgumentError) as caught:
        make(tiny_folder, **args)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_without_a_classifier_the_way_to_one_is_told(tiny_folder: Path, experts: str) -> None:
    with pytest.raises(ArgumentError, match="train one with t2 train --kind classifier --task t2_domains"):
        make(tiny_folder, adapt="classifier")


def test_a_named_classifier_leaves_the_experts_to_their_default(tiny_folder: Path, classifier: str) -> None:
    lm = make(tiny_folder, adapt="classifier", experts="names")
    assert [ref["name"] for ref in lm.identity()["experts"]] == ["alpha", "beta", "gamma", "names"]
