"""``t2 leaderboard check`` on results that lm-eval wrote: verdicts, exit codes, summaries, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from t2.core.verdicts import Verdict
from tests.cli.here import Here
from tests.results import Evaluated, change_json, change_lines


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(capsys)


def check(here: Here, baseline: Path, candidate: Path, *options: object) -> str:
    return here(
        *("leaderboard", "check", "--baseline", baseline, "--candidate", candidate, "--margin", "0.02", *options)
    )


def refused(here: Here, baseline: Path, candidate: Path, *options: object) -> str:
    return here.refused(
        *("leaderboard", "check", "--baseline", baseline, "--candidate", candidate, "--margin", "0.02", *options)
    )


@pytest.fixture
def copy(evaluated: Evaluated, tmp_path: Path) -> Path:
    """The plain model's results, to be changed."""
    return Path(shutil.copytree(evaluated.hf, tmp_path / "copy"))


def test_twelve_documents_cannot_answer_and_say_so(
    evaluated: Evaluated, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "steps.md"))
    (tmp_path / "steps.md").write_text("before\n")
    told = check(here, evaluated.hf, evaluated.expert, "--task", "tiny_choice", "--markdown", tmp_path / "out.md")
    assert here.code == 3
    assert told.splitlines()[-1].startswith("UNDERPOWERED: these documents cannot exclude a drop")
    written = (tmp_path / "out.md").read_text()
    assert "| tiny_choice | UNDERPOWERED | acc | 12 |" in written
    assert (tmp_path / "steps.md").read_text() == f"before\n{written}\n"


def test_json_tells_what_the_table_does(evaluated: Evaluated, here: Here) -> None:
    arguments = ("leaderboard", "check", "--baseline", evaluated.hf, "--candidate", evaluated.expert)
    told = here.json(*arguments, "--margin", "0.9", "--task", "tiny_choice", "--metric", "acc_norm", "--filter", "none")
    assert here.code == 0
    assert (told["verdict"], told["margin"], told["tasks"][0]["metric"]) == ("NO CHANGE", 0.9, "acc_norm")
    assert told["verdict"] in set(Verdict)
    assert told["tasks"][0]["n"] == 12


def test_results_that_cannot_be_paired_end_in_one_line(evaluated: Evaluated, here: Here, copy: Path) -> None:
    assert "word_perplexity,none is no mean over documents" in refused(here, evaluated.hf, copy)
    only = ("--task", "tiny_choice")
    assert "has no score nothing" in refused(here, evaluated.hf, copy, *only, "--metric", "nothing")
    assert "did you mean 'tiny_choice'" in refused(here, evaluated.hf, copy, "--task", "tiny_chose")
    assert "at least two results" in refused(here, evaluated.hf, copy, *only, "--noise", copy)
    assert "is not there" in refused(here, evaluated.hf, copy.with_name("nothing"), *only)
    change_json(copy, lambda results: results["versions"].update(tiny_choice=9.0))
    assert "has version 9.0 and the baseline 1.0" in refused(here, evaluated.hf, copy, *only)
    change_json(copy, lambda results: results["versions"].update(tiny_choice=1.0))
    change_json(copy, lambda results: results["n-shot"].update(tiny_choice=3))
    assert "number of few-shot examples 3 and the baseline 0" in refused(here, evaluated.hf, copy, *only)
    change_lines(copy, "tiny_choice", lambda lines: lines.append(lines[0]))
    assert "is there twice" in refused(here, evaluated.hf, copy, *only)
    change_lines(copy, "tiny_choice", lambda lines: lines.clear())
    assert "has no samples" in refused(here, evaluated.hf, copy, *only)


def test_repeats_are_joined_by_a_plus_sign(evaluated: Evaluated, here: Here, copy: Path) -> None:
    told = check(here, evaluated.hf, copy, "--task", "tiny_choice", "--noise", f"{evaluated.hf}+{copy}", "--json")
    assert '"noise": 0.0' in told
    assert "is no repeat of the first" in refused(
        here, evaluated.hf, copy, "--task", "tiny_choice", "--noise", f"{evaluated.hf}+{evaluated.expert}"
    )
