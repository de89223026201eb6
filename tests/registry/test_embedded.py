"""The registry in a folder: used by several processes at once, and told in one line where it cannot be used."""

from __future__ import annotations

import ctypes
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from t2.core.errors import NotFoundError, RegistryError, StorageError, T2Error, UnavailableError
from t2.core.references import parse_name, parse_reference
from t2.registry.open import open_embedded, open_registry
from tests.registry.samples import expert_bytes

NAME = parse_name("team/math")
_ROOT = Path(__file__).parents[2]
_PRELUDE = """
import resource, sys
from pathlib import Path
from t2.core.errors import T2Error
from t2.core.references import parse_name, parse_reference
from t2.registry.open import open_embedded
from tests.registry.samples import expert_bytes
name, folder = parse_name("team/math"), Path(sys.argv[1])
"""


def _obey_permissions() -> None:
    """Take from root, for this process, the right to pass over the permissions of files."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def run(program: str, *arguments: str | Path, obedient: bool = False) -> str:
    """What another process prints; it fails with it."""
    done = subprocess.run(
        [sys.executable, "-c", _PRELUDE + program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=_ROOT,
        preexec_fn=_obey_permissions if obedient else None,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_at_once(tmp_path: Path) -> None:
    program = """
print("ready", flush=True)
sys.stdin.readline()
offset = int(sys.argv[2])
with open_embedded(folder) as client:
    for i in range(15):
        client.publish(name, expert_bytes(offset + i))
        client.publish(name, expert_bytes(1000 + i))
        client.set_alias(name, "best", client.resolve(parse_reference("team/math")).version)
"""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _PRELUDE + program, str(tmp_path / "registry"), str(100 * i)],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(b"\n")
        worker.stdin.flush()
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert (worker.returncode, errors.decode()) == (0, "")
    with open_embedded(tmp_path / "registry") as client:
        versions = client.list_versions(NAME, limit=200).items
        assert sorted(version.version for version in versions) == list(range(1, 46))
        assert len({version.digest for version in versions}) == 45
        events = client.alias_history(NAME, limit=200).items[::-1]
        assert [event.previous for event in events] == [None, *(event.version for event in events[:-1])]
        for version in versions:
            client.download(version.digest)


def test_many_processes_open_a_new_folder(tmp_path: Path) -> None:
    program = """
from multiprocessing import get_context

def enter(turn):
    with open_embedded(folder / str(turn)) as client:
        return len(client.list_experts().items)

with get_context("fork").Pool(6) as pool:
    for turn in range(8):
        assert pool.map(enter, [turn] * 6, chunksize=1) == [0] * 6
"""
    assert run(program, tmp_path) == ""


def test_it_survives_being_closed_and_opened(tmp_path: Path) -> None:
    with open_embedded(tmp_path) as client:
        version = client.publish(NAME, expert_bytes(1))
    with open_embedded(tmp_path) as client:
        assert client.resolve(parse_reference("team/math")).digest == version.digest
        assert client.location == str(tmp_path)


class TestWhereItCannotBe:
    def told(self, folder: Path, kind: type[T2Error], words: str) -> None:
        with pytest.raises(T2Error, match=words) as caught:
            open_registry(str(folder))
        assert isinstance(caught.value, kind)
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        self.told(tmp_path / "file", StorageError, "choose another place")
        self.told(tmp_path / "file" / "below", StorageError, "choose another place")

    def test_a_database_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "registry.db").write_bytes(b"no database at all, and no short text either\n" * 100)
        self.told(tmp_path, RegistryError, "damaged, or no registry's: file is not a database")

    def test_a_database_of_another_program(self, tmp_path: Path) -> None:
        with sqlite3.connect(tmp_path / "registry.db") as connection:
            connection.execute("CREATE TABLE expert (x)")
        connection.close()
        self.told(tmp_path, RegistryError, "damaged, or no registry's")

    def test_a_folder_in_the_databases_place(self, tmp_path: Path) -> None:
        (tmp_path / "registry.db").mkdir()
        self.told(tmp_path, UnavailableError, "write access to the file and its folder is needed")

    def test_a_database_of_a_newer_t2(self, tmp_path: Path) -> None:
        open_embedded(tmp_path).close()
        with sqlite3.connect(tmp_path / "registry.db") as connection:
            connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.close()
        self.told(tmp_path, RegistryError, "at revision 9999, which is of a newer t2; upgrade t2")

    def test_blobs_that_are_gone(self, tmp_path: Path) -> None:
        with open_embedded(tmp_path) as client:
            digest = client.publish(NAME, expert_bytes(1)).digest
            path = tmp_path / "blobs" / digest[:2] / digest
            path.write_bytes(expert_bytes(2))
            with pytest.raises(RegistryError, match="damaged"):
                client.download(digest)
            path.unlink()
            with pytest.raises(NotFoundError, match="run t2 registry doctor"):
                client.download(digest)


class TestWhatCannotBeWritten:
    ASK = """
for ask in (
    lambda: open_embedded(folder).close(),
    lambda: print(open_embedded(folder).list_experts().items[0].name),
    lambda: print(open_embedded(folder).publish(name, expert_bytes(2)).version),
):
    try:
        ask()
    except T2Error as error:
        print(type(error).__name__, error)
"""

    def test_a_parent_that_is_read_only(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o555)
        try:
            told = run(self.ASK, tmp_path / "registry", obedient=True).splitlines()
        finally:
            tmp_path.chmod(0o755)
        assert len(told) == 3
        assert all(line.startswith("StorageError") and "choose another place" in line for line in told)

    def test_a_database_that_is_read_only(self, tmp_path: Path) -> None:
        with open_embedded(tmp_path) as client:
            client.publish(NAME, expert_bytes(1))
        (tmp_path / "registry.db").chmod(0o444)
        read, write = run(self.ASK, tmp_path, obedient=True).splitlines()
        assert read == "team/math"
        assert write.startswith("UnavailableError")
        assert "write access to the file and its folder is needed" in write

    def test_a_folder_that_is_read_only(self, tmp_path: Path) -> None:
        with open_embedded(tmp_path) as client:
            client.publish(NAME, expert_bytes(1))
        tmp_path.chmod(0o555)
        try:
            told = run(self.ASK, tmp_path, obedient=True).splitlines()
        finally:
            tmp_path.chmod(0o755)
        assert "UnavailableError" in told[-1]
        assert "write access to the file and its folder is needed" in told[-1]

    def test_a_full_disk(self, tmp_path: Path) -> None:
        # A limit on the size of files stands for the disk: writes beyond it fail, in the middle of a file as well.
        program = """
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

with open_embedded(folder) as client:
    client.publish(name, expert_bytes(1))
    for size in (0, 1000, 40_000, 100_000):
        limit(size)
        for seed in (2, 3):
            try:
                client.publish(name, expert_bytes(seed, matrices=8, rank=4000))
                print("done")
            except T2Error as error:
                print(type(error).__name__, error)
        limit(resource.RLIM_INFINITY)
    print(client.publish(name, expert_bytes(2, matrices=8, rank=4000)).version)
"""
        *told, last = run(program, tmp_path).splitlines()
        assert len(told) == 8
        assert all(line.startswith(("UnavailableError", "StorageError")) for line in told)
        assert last == "2"
        with open_embedded(tmp_path) as client:
            assert [version.version for version in client.list_versions(NAME).items] == [2, 1]
            for version in client.list_versions(NAME).items:
                client.download(version.digest)
