"""A stopped program, or one that cannot write, ends with the right status and no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from t2.harness.excepthook import runs_t2

STOPPED_WHILE_IMPORTING = """
    import os, signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)

    class Stopping:
        def find_spec(self, name, path=None, target=None):
            if name == sys.argv[-1]:
                os.kill(os.getpid(), signal.SIGINT)

    sys.meta_path.insert(0, Stopping())
    sys.argv[:] = ["t2", "rerun", "absent", sys.argv[-1]]
    from t2.cli.main import main
    sys.argv.pop()
    main()
    """
FULL = "t2: error: cannot write standard output: No space left on device; free space or write elsewhere\n"


def python(code: str, *arguments: str, stdout: int = subprocess.PIPE, unbuffered: bool = False) -> tuple[int, str]:
    """Exit status and standard error of a program."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else ""}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    return done.returncode, done.stderr


@pytest.mark.parametrize("module", ["typer", "t2.cli.train", "t2.core.errors", "t2.harness.rerun"])
def test_ctrl_c_while_modules_are_imported_ends_without_a_traceback(module: str) -> None:
    code = STOPPED_WHILE_IMPORTING.replace("sys.argv[-1]:", f"{module!r}:")
    assert python(code, module) == (130, "")


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("arguments", [["data", "list"], ["--help"]])
def test_output_on_a_full_disk_is_one_line(arguments: list[str], unbuffered: bool) -> None:
    with Path("/dev/full").open("w") as full:
        code = "from t2.cli.main import main; main()"
        assert python(code, *arguments, stdout=full.fileno(), unbuffered=unbuffered) == (2, FULL)


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_reader_that_is_gone_ends_the_program_silently(unbuffered: bool) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "from t2.cli.main import main; main()"
    assert python(code, "data", "list", stdout=writer, unbuffered=unbuffered) == (128 + signal.SIGPIPE, "")
    os.close(writer)


@pytest.mark.parametrize("unbuffered", [False, True])
def test_lm_eval_with_a_model_of_t2_ends_as_t2_does(unbuffered: bool) -> None:
    install = "import sys; from t2.harness import excepthook; excepthook.install(whole_program=True)\n"
    assert python(install + "raise KeyboardInterrupt") == (130, "")
    assert python(install + "raise OSError('other')")[0] == 1
    with Path("/dev/full").open("w") as full:
        assert python(install + "print(1)", stdout=full.fileno(), unbuffered=unbuffered) == (2, FULL)


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        (["/bin/lm_eval", "--model", "t2", "--tasks", "x"], True),
        (["/bin/lm-eval", "run", "-M", "t2"], True),
        (["-m", "--tasks", "x", "--model=t2"], True),
        (["/bin/lm_eval", "--model", "hf", "--tasks", "t2"], False),
        (["/bin/lm_eval", "--model"], False),
        (["mine.py", "--model", "t2"], False),
        ([], False),
    ],
)
def test_the_command_line_tells_that_the_model_is_of_t2(arguments: list[str], ours: bool) -> None:
    assert runs_t2(arguments) is ours
