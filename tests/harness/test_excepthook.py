"""A program ends with the status that was meant, and what was registered for its end is done."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys, types
from t2.harness.excepthook import leave
if {vllm}:
    sys.modules["vllm"] = types.ModuleType("vllm")
    class Aborting:
        def __del__(self):
            import os
            os.abort()
    held = Aborting()
atexit.register(lambda: print("closed"))
leave(130)
"""


@pytest.mark.parametrize("vllm", [False, True])
def test_what_is_open_is_closed_and_no_library_of_vllm_changes_the_status(vllm: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(vllm=vllm)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "closed\n", "")
