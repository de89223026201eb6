"""Run untrusted Python: a child process with limits, an empty environment, its own folder and a wall clock.

What always holds: ``python -I``, no environment variables, a temporary working folder, limits on CPU seconds, address
space, file size, open files and (but for root) processes, and a kill of the whole process group when the clock runs
out. What holds where the kernel allows it is told in ``SandboxResult.isolation``: ``network`` (none), ``processes``
(nothing outlives the program), ``files`` (no writing outside the working folder). It is a guard against what language
models write by accident, not against an attacker.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["passed", "failed", "timeout", "memory", "error"]

_CHILD = Path(__file__).with_name("sandbox_child.py")
_OUTPUT_BYTES = 8192
_REPORT_BYTES = 65536
_START_SECONDS = 10.0


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended.

    ``passed``: it ran to its end. ``failed``: it raised, or ended itself early. ``timeout`` and ``memory``: it met a
    limit. ``error``: the sandbox could not start it, which says nothing about the program.
    """

    passed: bool
    outcome: Outcome
    detail: str
    output: str = ""
    isolation: tuple[str, ...] = ()


def run_python(
    code: str, *, timeout: float = 5.0, cpu_seconds: int | None = None, memory_mb: int = 512
) -> SandboxResult:
    """Run ``code`` to its end in a child process; it passes when the last statement was reached without an exception.

    Args:
        code: a program, its tests included. ``__name__`` is not ``"__main__"`` in it.
        timeout: wall-clock seconds that the code may run.
        cpu_seconds: processor seconds, which do not depend on what else the machine does; by default more than
            ``timeout``.
        memory_mb: address space in MiB.
    """
    nonce = secrets.token_hex(16)
    reader, writer = os.pipe()
    request = {
        "code": code,
        "nonce": nonce,
        "reports": writer,
        "cpu_seconds": max(1, int(timeout + 1)) if cpu_seconds is None else cpu_seconds,
        "memory_bytes": memory_mb << 20,
    }
    with (
        contextlib.ExitStack() as stack,
        tempfile.TemporaryDirectory(prefix="t2-sandbox-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as stdin,
    ):
        stack.callback(os.close, reader)
        stdin.write(json.dumps(request).encode())
        stdin.seek(0)
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-X", "utf8", str(_CHILD)],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={},
                cwd=folder,
                pass_fds=(writer,),
                start_new_session=True,
            )
        except OSError as error:
            return SandboxResult(False, "error", f"cannot start {sys.executable}: {error.strerror}")
        finally:
            os.close(writer)
        try:
            watch = _Watch(process, reader, nonce)
            watch.run(timeout)
        finally:
            # The leader is not reaped yet, so its group id cannot belong to anyone else.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
    return watch.result(timeout)


class _Watch:
    """Reads a child's output and reports until its last report, its end or its time."""

    def __init__(self, process: subprocess.Popen[bytes], reports: int, nonce: str) -> None:
        self._process = process
        self._nonce = nonce
        self._output = b""
        self._reported = b""
        self._last: dict[str, Any] | None = None
        self._isolation: tuple[str, ...] | None = None
        self._timed_out = False
        self._status: int | None = None
        self._reports = reports

    def run(self, timeout: float) -> None:
        deadline = time.monotonic() + _START_SECONDS
        with selectors.DefaultSelector() as selector:
            assert self._process.stdout is not None
            selector.register(self._process.stdout.fileno(), selectors.EVENT_READ)
            selector.register(self._reports, selectors.EVENT_READ)
            while True:
                started = self._isolation is not None
                ended = self._ended()
                for key, _ in selector.select(0 if ended else 0.05):
                    if not self._read(key.fd):
                        selector.unregister(key.fd)
                if self._isolation is not None and not started:
                    deadline = time.monotonic() + timeout
                if ended or self._last is not None:
                    self._drain()
                    return
                if time.monotonic() >= deadline:
                    self._timed_out = True
                    return

    def _drain(self) -> None:
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        os.set_blocking(output, False)
        with contextlib.suppress(BlockingIOError):
            while len(self._output) < _OUTPUT_BYTES and self._read(output):
                pass

    def result(self, timeout: float) -> SandboxResult:
        if self._isolation is None:
            lines = self._text().strip().splitlines() or [f"status {self._process.returncode}"]
            return SandboxResult(False, "error", f"the sandbox did not start: {lines[-1]}"[:500])
        outcome: Outcome
        if self._last is not None:
            outcome, detail = self._last["outcome"], str(self._last["detail"])
        elif self._timed_out:
            outcome, detail = "timeout", f"still running after {timeout:g} s"
        elif self._status == -signal.SIGXCPU:
            outcome, detail = "timeout", "used up its processor time"
        elif self._status == -signal.SIGKILL:
            outcome, detail = "memory", "killed, as the kernel does when memory runs out"
        elif self._status is not None and self._status < 0:
            outcome, detail = "failed", f"killed by {signal.Signals(-self._status).name}"
        else:
            outcome, detail = "failed", "the program ended itself before its tests did"
        return SandboxResult(outcome == "passed", outcome, detail, self._text(), self._isolation)

    def _text(self) -> str:
        return self._output.decode("utf-8", "replace")

    def _ended(self) -> bool:
        if not hasattr(os, "waitid"):
            self._status = self._process.poll()
            return self._status is not None
        with contextlib.suppress(ChildProcessError):
            state = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if state is None:
                return False
            self._status = state.si_status if state.si_code == os.CLD_EXITED else -state.si_status
        return True

    def _read(self, fd: int) -> bool:
        chunk = os.read(fd, 65536)
        if fd != self._reports:
            self._output = (self._output + chunk)[:_OUTPUT_BYTES]
            return bool(chunk)
        self._reported = (self._reported + chunk)[:_REPORT_BYTES]
        *whole, self._reported = self._reported.split(b"\n")
        for line in whole:
            self._take(line)
        return bool(chunk)

    def _take(self, line: bytes) -> None:
        try:
            report = json.loads(line)
        except ValueError:
            return
        if not isinstance(report, dict):
            return
        if self._isolation is None and isinstance(report.get("isolation"), list):
            self._isolation = tuple(str(name) for name in report["isolation"])
        elif report.get("nonce") == self._nonce:
            self._last = report
