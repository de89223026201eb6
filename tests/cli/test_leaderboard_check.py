"""``t2 leaderboard check`` on results that lm-eval wrote: verdicts, exit codes, summaries, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from t2.core.digests import sha256_file
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
    assert "the same results twice" in refused(here, evaluated.hf, copy, *only, "--noise", f"{copy}+{copy}")
    # As a variable that is not set leaves it.
    assert "named by an empty text" in here.refused(
        *("leaderboard", "check", "--baseline", evaluated.hf, "--candidate", "", "--margin", "0.02")
    )
    assert "0.02 is two points" in refused(here, evaluated.hf, copy, *only, "--margin", "2")
    assert "at least two results" in refused(here, evaluated.hf, copy, *only, "--noise", copy)
    assert "is not there" in refused(here, evaluated.hf, copy.with_name("nothing"), *only)
    change_json(copy, lambda results: results["versions"].update(tiny_choice=9.0))
    assert "has version 9.0 and the baseline 1.0" in refused(here, evaluated.hf, copy, *only)
    change_json(copy, lambda results: results["versions"].update(tiny_choice=1.0))
    change_json(copy, lambda results: results["n-shot"].update(tiny_choice=3))
    assert "number of few-shot examples 3 and the baseline 0" in refused(here, evaluated.hf, copy, *only)
    change_lines(copy, "tiny_choice", lambda lines: lines.append(lines[0]))
    assert "appears twice" in refused(here, evaluated.hf, copy, *only)
    change_lines(copy, "tiny_choice", lambda lines: lines.clear())
    assert "has no samples" in refused(here, evaluated.hf, copy, *only)


def test_repeats_are_joined_by_a_plus_sign(evaluated: Evaluated, here: Here, copy: Path) -> None:
    told = check(here, evaluated.hf, copy, "--task", "tiny_choice", "--noise", f"{evaluated.hf}+{copy}", "--json")
    assert '"noise": 0.0' in told
    assert "is no repeat of the first" in refused(
        here, evaluated.hf, copy, "--task", "tiny_choice", "--noise", f"{evaluated.hf}+{evaluated.expert}"
    )


def test_runs_and_experts_of_the_registry_are_compared_like_files(
    evaluated: Evaluated, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("T2_REGISTRY_URL", str(tmp_path / "registry"))
    here("expert", "push", evaluated.experts / "alpha.safetensors", "team/alpha", "--alias", "production")
    only = ("--margin", "0.02", "--task", "tiny_choice")
    compare = ("leaderboard", "check", *only, "--baseline", evaluated.hf, "--candidate")
    assert "there is no run of team/alpha@production by itself" in here.refused(*compare, "team/alpha")
    runs = here.json("leaderboard", "push", evaluated.expert)
    here("leaderboard", "push", evaluated.mixed)
    (run,) = [each for each in runs if each["task"] == "tiny_choice"]
    by_file = here.json(*compare, evaluated.expert)
    for reference in ("team/alpha", "team/alpha@1", run["digest"][:12], f"default/{run['digest']}"):
        assert here.json(*compare, reference) == by_file
    assert "there is no expert team/alhpa; did you mean 'team/alpha'" in here.refused(*compare, "team/alhpa@production")
    here("leaderboard", "push", evaluated.expert, "--namespace", "team")
    assert "write its namespace before it" in here.refused(*compare, run["digest"])
    assert here.json(*compare, f"team/{run['digest'][:12]}") == by_file
    assert "no alias" in here.refused(*compare, "team/alpha@staging")
    assert "outputs is no file or folder here, and: " in here.refused(*compare, "outputs")
    assert "there is no run abcdef" in here.refused(*compare, "abcdef")


def test_moving_an_alias_can_require_a_verdict(
    evaluated: Evaluated, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("T2_REGISTRY_URL", str(tmp_path / "registry"))
    for name in ("alpha", "beta"):
        here("expert", "push", evaluated.experts / f"{name}.safetensors", "team/math")
    # Nothing to compare with yet.
    here("expert", "alias", "team/math", "production", 1, "--require-verdict", "0.02")
    move = ("expert", "alias", "team/math", "production", 2, "--require-verdict")
    assert "there is no run of team/math@production by itself" in here.refused(*move, "0.02")
    for name, digest in (("one", "alpha"), ("two", "beta")):
        results = Path(shutil.copytree(evaluated.expert, tmp_path / name))
        keep_one_task(results, sha256_file(evaluated.experts / f"{digest}.safetensors"))
        here("leaderboard", "push", results)
    refusal = here.refused(*move, "0.02")
    assert "team/math@production was not moved: version 2 is UNDERPOWERED" in refusal
    (alias,) = here.json("expert", "alias", "team/math", "production")
    assert alias["version"] == 1
    (alias,) = here.json(*move, "0.9", "--reason", "tried")
    assert alias["version"] == 2
    last = here.json("expert", "alias", "team/math", "production", "--history")[0]
    assert last["reason"] == "tried; NO CHANGE beside the former one, margin 0.9, on tiny_choice"
    assert "--require-verdict is for a move" in here.refused("expert", "alias", "team/math", "--require-verdict", "0.1")


def keep_one_task(folder: Path, digest: str) -> None:
    """Results of tiny_choice alone, by an expert with this digest."""

    def change(results: dict[str, Any]) -> None:
        for other in ("tiny_rolling", "tiny_text"):
            del results["configs"][other]
        told = results["config"]["t2"]
        told["records"] = [{**each} for each in told["records"] if each["task"] == "tiny_choice"]
        for each in (told, *told["records"]):
            each["experts"] = [{**expert, "digest": digest} for expert in each["experts"]]

    change_json(folder, change)
