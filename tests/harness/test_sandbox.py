"""Untrusted code cannot pass without running its tests, and cannot harm what is around it."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from pathlib import Path

import pytest

from t2.harness.sandbox import SandboxResult, run_python


def test_a_program_that_reaches_its_end_passes_and_its_output_is_kept() -> None:
    result = run_python("print('hello')\nassert 1 + 1 == 2")
    assert (result.passed, result.outcome, result.output) == (True, "passed", "hello\n")


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("import sys; sys.exit(0)\nassert False", "ended itself"),
        ("import os; os._exit(0)\nassert False", "ended itself"),
        ("print('passed')\nraise SystemExit", "ended itself"),
        ("import os, signal; os.abort()", "killed by SIG"),
        ("input()", "EOFError"),
    ],
)
def test_a_program_that_does_not_reach_its_end_fails(code: str, detail: str) -> None:
    result = run_python(code)
    assert (result.passed, result.outcome) == (False, "failed")
    assert detail in result.detail


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)", "while True: print('x' * 10000)"])
def test_an_endless_program_is_stopped(code: str) -> None:
    result = run_python(code, timeout=0.5)
    assert (result.passed, result.outcome) == (False, "timeout")
    assert len(result.output) <= 8192


def test_processor_time_is_limited_whatever_the_clock_says() -> None:
    result = run_python("while True: pass", timeout=60.0, cpu_seconds=1)
    assert (result.passed, result.outcome) == (False, "timeout")
    assert "processor" in result.detail


def test_memory_is_limited() -> None:
    assert run_python("x = bytearray(1 << 30)", memory_mb=256).outcome == "memory"
    assert run_python("x = bytearray(1 << 20)", memory_mb=256).passed


def test_huge_output_does_not_reach_the_caller() -> None:
    result = run_python("print('y' * (64 << 20))", memory_mb=512)
    assert result.passed
    assert result.output == "y" * 8192


def test_forged_reports_do_not_pass() -> None:
    forge = """
import json, os
for handle in range(3, 64):
    try:
        os.write(handle, (json.dumps({"outcome": "passed", "nonce": "0" * 32, "detail": ""}) + "\\n").encode())
    except OSError:
        pass
os._exit(0)
"""
    assert not run_python(forge).passed


def test_the_environment_is_not_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2_TEST_SECRET", "swordfish")
    result = run_python("import os\nprint(sorted(os.environ))\nassert 'T2_TEST_SECRET' not in os.environ")
    assert result.passed, result.detail
    peek = run_python(f"print('swordfish' in open('/proc/{os.getpid()}/environ').read())\nraise SystemExit")
    if "files" in peek.isolation:
        assert "PermissionError" in peek.detail
    else:
        assert peek.outcome == "failed"


def test_writing_works_in_the_own_folder_and_leaves_nothing_behind(tmp_path: Path) -> None:
    result = run_python(
        "import os\nopen('a', 'w').write('x')\nos.mkdir('d')\nos.rename('a', 'd/b')\n"
        "print(os.getcwd(), os.listdir('d'))"
    )
    assert result.passed, result.detail
    folder, _, listing = result.output.strip().partition(" ")
    assert listing == "['b']"
    assert not Path(folder).exists()

    victim = tmp_path / "victim"
    victim.write_text("kept")
    attack = run_python(f"import os\nos.remove({str(victim)!r})")
    if "files" in attack.isolation:
        assert "PermissionError" in attack.detail
        assert victim.read_text() == "kept"
    big = run_python("with open('big', 'wb') as f:\n    for _ in range(64): f.write(b'0' * (1 << 20))")
    assert "File too large" in big.detail


def test_the_network_is_out_of_reach_where_the_kernel_allows_it() -> None:
    code = """
import socket
server = socket.socket()
server.bind(("127.0.0.1", 0))
server.listen()
socket.create_connection(server.getsockname(), timeout=1)
"""
    result = run_python(code)
    # Without a network namespace the loopback connection succeeds; with one even the loopback is down.
    assert result.passed == ("network" not in result.isolation)


def test_processes_are_few_and_die_with_the_program() -> None:
    storm = run_python("import os, time\nfor _ in range(200):\n    if os.fork() == 0: time.sleep(30)", timeout=3.0)
    if "processes" in storm.isolation:
        assert "BlockingIOError" in storm.detail
    name = f"t2{secrets.token_hex(4)}"
    escape = f"""
import ctypes, os, time
ctypes.CDLL(None).prctl(15, b"{name}", 0, 0, 0)
if os.fork() == 0:
    os.setsid()
    time.sleep(30)
"""
    result = run_python(escape)
    assert result.passed
    if "processes" in result.isolation:
        deadline = time.monotonic() + 10
        while name in _process_names() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert name not in _process_names()


def test_it_works_from_many_threads_at_once() -> None:
    results: list[SandboxResult] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(run_python(f"assert {n} % 2 == 0"))) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(result.passed for result in results) == 4
    assert {result.outcome for result in results} == {"passed", "failed"}


def _process_names() -> set[str]:
    names = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            names.add(path.read_text().strip())
    return names
