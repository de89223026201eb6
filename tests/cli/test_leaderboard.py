"""``t2 leaderboard``: from lm-eval's files to a board, and back to a file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from t2.core.errors import ArgumentError, NotFoundError, ResultsError
from t2.core.results import read_results
from t2.harness.leaderboard import fetch_run
from t2.harness.registry import registry
from tests.cli.here import Here
from tests.results import NAMES, Evaluated, change_json, change_lines


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(capsys)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a registry of one's own."""
    monkeypatch.setenv("T2_REGISTRY_URL", str(tmp_path / "registry"))
    monkeypatch.setenv("T2_EXPERTS_DIR", str(tmp_path / "experts"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_results_to_a_board_and_to_an_alias(home: Path, here: Here, evaluated: Evaluated) -> None:
    here("expert", "push", evaluated.experts / "alpha.safetensors", "team/alpha", "--alias", "production")
    base = {result.run.task: result.run for result in read_results(evaluated.mixed)}["tiny_choice"].base.id
    rows = here.table("leaderboard", "push", evaluated.expert, "--namespace", "team")
    assert [(row["task"], row["strategy"], row["experts"]) for row in rows] == [
        (task, "expert", "team/alpha@1") for task in NAMES
    ]
    mixed = here.json("leaderboard", "push", evaluated.mixed)
    assert {run["namespace"] for run in mixed} == {"default"}
    assert [run["created"] for run in mixed] == [True] * 3
    assert [run["created"] for run in here.json("leaderboard", "push", evaluated.mixed)] == [False] * 3
    assert "there already" in here("leaderboard", "push", evaluated.mixed)

    listed = here.json("leaderboard", "list", "--task", "tiny_choice")
    assert [run["strategy"] for run in listed] == ["cem", "expert"]
    assert listed == here.json("leaderboard", "list", "--task", "tiny_choice", "--base", base)
    assert here.json("leaderboard", "list", "--expert", "team/alpha", "--strategy", "cem") == [
        run for run in here.json("leaderboard", "list") if run["strategy"] == "cem"
    ]
    assert len(here.json("leaderboard", "list", "--limit", 1)) == 1
    assert "there are more than these 1" in here.errors
    assert len(here.json("leaderboard", "list", "--limit", 1, "--all")) == 6

    boards = here.table("leaderboard", "board")
    assert [(row["task"], row["documents"], row["runs"]) for row in boards] == [
        (task, "12", "2") for task in reversed(NAMES)
    ]
    board = here.json("leaderboard", "board", "tiny_rolling")
    scores = [entry["score"]["score"] for entry in board["items"]]
    assert scores == sorted(scores)
    assert (board["higher_is_better"], board["metric"]) == (False, "word_perplexity")
    text = here("leaderboard", "board", "tiny_choice", "--metric", "acc_norm")
    assert text.startswith(f"tiny_choice 1.0, 0 shots, 12 documents, by {base}: acc_norm,none, the highest first")
    assert len(text.splitlines()) == 4

    history = here.table("leaderboard", "history", "team/alpha", "--task", "tiny_choice")
    assert [(row["strategy"], row["version"]) for row in history] == [
        ("cem, seed 7", "team/alpha@1 (production)"),
        ("expert", "team/alpha@1 (production)"),
    ]
    assert len(here.json("leaderboard", "history", "team/alpha@production")) == 6


def test_a_run_is_shown_pulled_read_back_and_deleted(home: Path, here: Here, evaluated: Evaluated) -> None:
    (run,) = (each for each in here.json("leaderboard", "push", evaluated.mixed) if each["task"] == "tiny_choice")
    short = run["digest"][:8]
    shown = here.fields("leaderboard", "show", short)
    assert shown["run"] == f"default/{run['digest']}"
    assert shown["task"] == "tiny_choice 1.0, 0 shots, 12 documents"
    assert shown["seeds.adapt"] == "7"
    detail = here.json("leaderboard", "show", f"default/{run['digest']}")
    assert detail["header"]["record"]["strategy"] == "cem"

    told = here.json("leaderboard", "pull", short, "run.jsonl")
    assert told == {"file": "run.jsonl", "run": f"default/{run['digest']}", "samples": 12}
    assert len((home / "run.jsonl").read_text().splitlines()) == 13
    assert "run.jsonl exists" in here.refused("leaderboard", "pull", short, "run.jsonl")
    here("leaderboard", "pull", short, "run.jsonl", "--overwrite")
    here("leaderboard", "pull", short)
    assert (home / f"tiny_choice-{run['digest'][:12]}.jsonl").read_bytes() == (home / "run.jsonl").read_bytes()
    with registry() as client:
        assert fetch_run(client, short) == read_results(evaluated.mixed)[0]

    here("leaderboard", "delete", short)
    assert "there is no run" in here.refused("leaderboard", "show", short)


def test_what_cannot_be_done_is_said_in_one_line(home: Path, here: Here, evaluated: Evaluated) -> None:
    broken = Path(shutil.copytree(evaluated.hf, home / "broken"))
    change_lines(broken, "tiny_text", lambda samples: samples.append(samples[0]))
    with pytest.raises(ResultsError, match="appears twice"):
        here("leaderboard", "push", broken)
    assert here.json("leaderboard", "list") == []
    with pytest.raises(ResultsError, match="is not there"):
        here("leaderboard", "push", home / "nowhere")
    here("leaderboard", "push", evaluated.hf)
    other = Path(shutil.copytree(evaluated.hf, home / "other"))
    change_json(other, lambda value: value["config"].update(model_args="pretrained=org/other"))
    here("leaderboard", "push", other)
    with pytest.raises(ArgumentError, match="several base models; give --base, one of: "):
        here("leaderboard", "board", "tiny_choice")
    with pytest.raises(NotFoundError, match="did you mean 'tiny_choice'"):
        here("leaderboard", "board", "tiny_choise")
    with pytest.raises(ArgumentError, match="are about the board of a task"):
        here("leaderboard", "board", "--metric", "acc")
    with pytest.raises(ArgumentError, match="is no run"):
        here("leaderboard", "show", "best")
    with pytest.raises(ArgumentError, match="names no alias"):
        here("leaderboard", "history", "team/math@3")


def test_boards_of_two_models_of_one_name_are_told_apart(home: Path, here: Here, evaluated: Evaluated) -> None:
    other = Path(shutil.copytree(evaluated.mixed, home / "other"))

    def claim(value: dict[str, Any]) -> None:
        for base in (value["config"]["t2"]["base"], *(each["base"] for each in value["config"]["t2"]["records"])):
            base["identity"] = "f" * 64

    change_json(other, claim)
    here("leaderboard", "push", evaluated.mixed)
    here("leaderboard", "push", other)
    named = {row["base model"] for row in here.table("leaderboard", "board")}
    identities = {each["base_identity"] for each in here.json("leaderboard", "board")}
    assert len(identities) == 2
    assert len(named) == 2
    assert any(name.endswith(f" ({'f' * 12})") for name in named)
    (first,) = identities - {"f" * 64}
    shown = here.json("leaderboard", "board", "tiny_choice")
    assert (shown["board"]["base_identity"], shown["board"]["runs"]) == ("f" * 64, 1)
    assert f"have separate boards; choose one with --base: {first}" in here.errors
    shown = here.json("leaderboard", "board", "tiny_choice", "--base", first)
    assert (shown["board"]["base_identity"], shown["board"]["runs"]) == (first, 1)
