"""Whole files or none: after a kill, on a full disk, in a folder that cannot be written."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from t2.core.errors import StorageError
from t2.core.files import append_line, atomic_file, atomic_write

# Two contents of different length, so that half of one is neither.
WRITER = """
import sys
from pathlib import Path
from t2.core.files import atomic_write
path = Path(sys.argv[1])
print("ready", flush=True)
while True:
    for content in (b"a" * 3_000_000, b"b" * 2_000_000):
        atomic_write(path, content)
"""

FULL_DISK = """
import json, resource, signal, sys
from pathlib import Path
from t2.core.errors import StorageError
from t2.core.files import append_line, atomic_write
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
path, log = folder / "file", folder / "log"
atomic_write(path, b"old")
append_line(log, "old")
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
said = []
for write in (lambda: atomic_write(path, bytes(10_000_000)), lambda: append_line(log, "x" * 10_000_000)):
    try:
        write()
        said.append("written")
    except StorageError as error:
        said.append(str(error))
append_line(log, "new")
names = sorted(entry.name for entry in folder.iterdir())
print(json.dumps({"said": said, "file": path.read_text(), "log": log.read_text(), "names": names}))
"""


def python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", script, *map(str, arguments)]


def test_a_kill_leaves_the_old_or_the_new_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    whole = {b"a" * 3_000_000, b"b" * 2_000_000}
    seen = set()
    for attempt in range(12):
        with subprocess.Popen(python(WRITER, path), stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            # Different moments of the write, from the first bytes to the rename.
            time.sleep(0.003 + 0.007 * attempt)
            process.send_signal(signal.SIGKILL)
        if path.exists():
            content = path.read_bytes()
            assert content in whole
            seen.add(content)
    assert seen, "no attempt lasted until the first file was whole"
    atomic_write(path, b"after")
    assert path.read_bytes() == b"after"


def on_a_full_disk(tmp_path: Path) -> list[str]:
    """A command that runs the script on a file system of 1 MB where that can be mounted, else with a limit."""
    mount = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
    if shutil.which("unshare"):
        in_namespace = ["unshare", "--mount", "sh", "-c", mount, str(tmp_path)]
        if subprocess.run([*in_namespace, "true"], capture_output=True, check=False).returncode == 0:
            return [*in_namespace, *python(FULL_DISK, tmp_path, 0)]
    return python(FULL_DISK, tmp_path, 1_000_000)


@pytest.mark.parametrize("limited", ["disk", "file size"])
def test_a_full_disk_keeps_the_old_content_and_says_so_in_one_line(limited: str, tmp_path: Path) -> None:
    command = on_a_full_disk(tmp_path) if limited == "disk" else python(FULL_DISK, tmp_path, 1_000_000)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    first, second = result["said"]
    assert first.startswith(f"cannot write {tmp_path / 'file'}: ")
    assert "free space" in first
    assert second.startswith(f"cannot append to {tmp_path / 'log'}: ")
    assert "\n" not in first + second
    assert result["file"] == "old"
    assert result["log"] == "old\nnew\n"
    assert result["names"] == ["file", "log"]


def test_a_block_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def fail() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_are_made_and_the_file_is_readable_as_any_other(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    atomic_write(path, b"new")
    plain = tmp_path / "plain"
    plain.write_bytes(b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"cannot write .*file/x: .*another folder"):
        atomic_write(tmp_path / "file" / "x", b"")
    with pytest.raises(StorageError, match=r"cannot append to .*file/x: "):
        append_line(tmp_path / "file" / "x", "")


def test_a_line_that_was_cut_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append_line(path, "one")
    with path.open("ab") as file:
        file.write(b'{"half": tr')
    append_line(path, "two")
    append_line(path, "")
    assert path.read_text() == "one\ntwo\n\n"
    path.write_bytes(b"only half")
    append_line(path, "new")
    assert path.read_text() == "new\n"


def test_the_umask_is_as_before(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "file", b"")
        assert os.umask(0o027) == 0o027
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_what_a_kill_left_is_removed_by_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "file"
    dead, fresh, held, other = (tmp_path / name for name in (".file.a.tmp", ".file.b.tmp", ".file.c.tmp", ".fil.d.tmp"))
    for left in (dead, fresh, held, other):
        left.write_bytes(b"half")
    for old in (dead, held, other):
        os.utime(old, (0, 0))
    with held.open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        atomic_write(path, b"whole")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".fil.d.tmp", ".file.b.tmp", ".file.c.tmp", "file"]


def test_bytes_are_on_the_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def sync(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else f"{os.fstat(handle).st_size} bytes")
        fsync(handle)

    def rename(source: str, target: Path) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    atomic_write(tmp_path / "file", b"x" * 100)
    assert done == ["100 bytes", "rename", "folder"]
