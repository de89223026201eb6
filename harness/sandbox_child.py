"""The program inside the sandbox: confine this process, run the code it is given, report how it ended.

``t2.harness.sandbox`` starts it by path with ``python -I``, so it imports the standard library alone. The request comes
as JSON on stdin, reports leave as JSON lines on their own pipe, so that nothing the code prints is taken for a report.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path

_CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
# Landlock's system calls have these numbers on every architecture (linux/landlock.h).
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_VERSION_FLAG, _LANDLOCK_PATH_BENEATH = 1, 1
_WRITE_FILE = 1 << 1
# write_file, remove_dir, remove_file and the seven make_* rights of ABI 1; refer came with 2, truncate with 3.
_WRITE_RIGHTS = {1: _WRITE_FILE | 0x1FF0, 2: 1 << 13, 3: 1 << 14}
_NAMESPACES = (
    _CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWPID | _CLONE_NEWIPC,
    _CLONE_NEWNET | _CLONE_NEWPID | _CLONE_NEWIPC,
    _CLONE_NEWUSER | _CLONE_NEWNET,
    _CLONE_NEWNET,
)
_NOBODY = 65534
_MAX_PROCESSES = 16
_MAX_FILES = 64
_MAX_FILE_BYTES = 16 << 20


def main() -> None:
    """Read the request, confine, run, report."""
    request = json.load(sys.stdin)
    reports: int = request["reports"]
    os.set_inheritable(reports, False)
    _send(reports, {"isolation": _confine(request["cpu_seconds"], request["memory_bytes"])})
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    report = _run(request["code"], request["nonce"])
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    _send(reports, report)
    # Not sys.exit: threads and exit handlers of the code must not keep the process.
    os._exit(0)


def _run(code: str, nonce: str) -> dict[str, str]:
    report = {"outcome": "failed", "nonce": nonce}
    try:
        exec(compile(code, "<solution>", "exec"), {"__name__": "solution"})  # noqa: S102
    except MemoryError:
        return {**report, "outcome": "memory", "detail": "out of memory"}
    except SystemExit:
        return {**report, "detail": "the program ended itself before its tests did"}
    except BaseException as error:  # noqa: BLE001
        return {**report, "detail": f"{type(error).__name__}: {error}"[:500]}
    return {"outcome": "passed", "nonce": nonce, "detail": ""}


def _send(reports: int, value: object) -> None:
    os.write(reports, (json.dumps(value) + "\n").encode())


def _confine(cpu_seconds: int, memory_bytes: int) -> list[str]:
    """Apply every confinement that this kernel allows; returns the names of those that hold."""
    isolation = []
    libc = ctypes.CDLL(None, use_errno=True)
    _stop_being_root()
    if sys.platform == "linux":
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        flags = next((flags for flags in _NAMESPACES if libc.unshare(flags) == 0), 0)
        if flags & _CLONE_NEWNET:
            isolation.append("network")
        if flags & _CLONE_NEWPID:
            _enter_process_namespace(libc, cpu_seconds)
            isolation.append("processes")
        if _forbid_writing_elsewhere(libc):
            isolation.append("files")
    # After unshare: a namespace of one's own has its own count of processes, else other programs of the user count too.
    for name, value in (
        ("RLIMIT_CPU", cpu_seconds),
        ("RLIMIT_AS", memory_bytes),
        ("RLIMIT_FSIZE", _MAX_FILE_BYTES),
        ("RLIMIT_NPROC", _MAX_PROCESSES),
        ("RLIMIT_NOFILE", _MAX_FILES),
        ("RLIMIT_CORE", 0),
    ):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (value, value + 1 if name == "RLIMIT_CPU" else value))
    return isolation


def _stop_being_root() -> None:
    """Root has no limit on processes: become nobody, in full where nobody can read this interpreter's modules.

    Elsewhere (an interpreter below ``/root``) only the real user changes, by which the kernel counts processes.
    """
    if os.geteuid() != 0:
        return
    folders = [path for path in sys.path if Path(path).is_dir()]
    with contextlib.suppress(OSError):
        os.setegid(_NOBODY)
        os.seteuid(_NOBODY)
        readable = all(os.access(path, os.R_OK | os.X_OK, effective_ids=True) for path in folders)
        os.seteuid(0)
        os.setegid(0)
        if readable:
            os.chown(".", _NOBODY, _NOBODY)
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        else:
            os.setresuid(_NOBODY, 0, 0)


def _enter_process_namespace(libc: ctypes.CDLL, cpu_seconds: int) -> None:
    """Go on as the first process of the new namespace: when it dies, the kernel kills all that it started."""
    child = os.fork()
    if child == 0:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        return
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL and usage.ru_utime + usage.ru_stime >= cpu_seconds:
        # The first process of a namespace ignores SIGXCPU and is killed at the hard limit instead.
        code = -signal.SIGXCPU
    if code < 0:
        # A signal as this process's end too, so that the parent sees the same.
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 1)


def _forbid_writing_elsewhere(libc: ctypes.CDLL) -> bool:
    """Landlock: write only below the working folder; it also hides other processes' memory and environment."""
    syscall = libc.syscall
    syscall.restype = ctypes.c_long
    version = syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(_LANDLOCK_VERSION_FLAG))
    if version < 1:
        return False
    rights = 0
    for introduced, mask in _WRITE_RIGHTS.items():
        rights |= mask if introduced <= version else 0
    handled = ctypes.c_uint64(rights)
    ruleset = syscall(_LANDLOCK_CREATE, ctypes.byref(handled), ctypes.c_size_t(8), ctypes.c_uint32(0))
    if ruleset < 0:
        return False
    allowed = ((".", rights), (os.devnull, _WRITE_FILE))
    done = all(_allow(libc, ruleset, path, mask) for path, mask in allowed)
    return done and syscall(_LANDLOCK_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0)) == 0


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> bool:
    class PathBeneath(ctypes.Structure):
        _pack_ = 1
        _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))

    handle = os.open(path, os.O_PATH)
    rule = PathBeneath(rights, handle)
    result = libc.syscall(
        _LANDLOCK_ADD,
        ctypes.c_int(ruleset),
        ctypes.c_int(_LANDLOCK_PATH_BENEATH),
        ctypes.byref(rule),
        ctypes.c_uint32(0),
    )
    os.close(handle)
    return bool(result == 0)


if __name__ == "__main__":
    main()
