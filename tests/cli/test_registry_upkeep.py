"""``t2 registry migrate|token|gc|doctor|export|import`` as a user runs them."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from t2.cli.main import app
from t2.core.errors import ArgumentError, ConflictError, InvalidRequestError, NotFoundError, RegistryError, StorageError
from t2.core.references import parse_reference
from t2.registry.open import open_embedded
from t2.registry.services import tokens
from tests.registry.registries import MATH, fill
from tests.registry.samples import expert_bytes


class Program:
    """Runs the program in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.code = 0

    def __call__(self, *arguments: str | Path) -> str:
        self.capsys.readouterr()
        self.code = app(["registry", *map(str, arguments)], standalone_mode=False) or 0
        return self.capsys.readouterr().out

    def json(self, *arguments: str | Path) -> Any:
        return json.loads(self(*arguments, "--json"))


@pytest.fixture
def t2(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the embedded registry."""
    monkeypatch.setenv("T2_REGISTRY_URL", str(tmp_path / "registry"))
    return tmp_path / "registry"


@pytest.fixture
def filled(home: Path) -> Path:
    with open_embedded(home) as service:
        fill(service)
    return home


def test_migrate_up_and_down(t2: Program, tmp_path: Path) -> None:
    config = tmp_path / "t2.toml"
    config.write_text(f'database_url = "sqlite:///{tmp_path}/server.db"\nblobs = "{tmp_path}/blobs"\n')
    with pytest.raises(RegistryError, match="is empty; run t2 registry migrate"):
        t2("gc", "--config", config)
    plan = t2.json("migrate", "--config", config, "--dry-run")
    assert plan["before"] is plan["after"] is None
    assert plan["steps"][0] == "0001"
    assert t2.json("migrate", "--config", config)["after"] == plan["steps"][-1]
    assert "nothing to do" in t2("migrate", "--config", config)
    t2("doctor", "--config", config)
    with pytest.raises(ArgumentError, match="--yes"):
        t2("migrate", "0001", "--config", config)
    assert "would undo" in t2("migrate", "0001", "--config", config, "--dry-run")
    assert t2("migrate", "0001", "--yes", "--config", config).endswith("the database is at revision 0001\n")
    assert t2("migrate", "base", "--yes", "--config", config).endswith("the database is at revision base\n")
    with pytest.raises(ArgumentError, match="no revision 0815"):
        t2("migrate", "0815", "--config", config)


def test_a_token_made_before_any_server(t2: Program, home: Path) -> None:
    secret = t2("token", "create", "ci", "--scope", "write", "--days", "3").strip()
    with open_embedded(home) as service, service.database.read() as session:
        assert tokens.authenticate(session, secret).scopes == ("write",)
    made = t2.json("token", "create", "boss", "--scope", "admin", "--scope", "read")
    assert made["scopes"] == ["read", "admin"]
    listed = t2("token", "list")
    assert secret not in listed
    assert [line.split()[1] for line in listed.splitlines()[1:]] == ["ci", "boss"]
    assert t2.json("token", "list")[1]["id"] == made["id"]
    assert "revoked" in t2("token", "revoke", str(made["id"]))
    assert t2.json("token", "list")[1]["revoked_at"] is not None
    with pytest.raises(NotFoundError):
        t2("token", "revoke", "99")
    with pytest.raises(InvalidRequestError, match="scopes"):
        t2("token", "create", "x", "--scope", "everything")


def test_gc(t2: Program, filled: Path) -> None:
    assert t2("gc") == "removed nothing; 0 bytes\n"
    told = t2.json("gc", "--dry-run", "--retention", "0", "--grace", "0")
    assert [item["kind"] for item in told["removed"]] == ["expert", "version", "blob", "blob"]
    assert told["bytes"] == len(expert_bytes(2)) + len(expert_bytes(4))
    text = t2("gc", "--retention", "0", "--grace", "0")
    assert text.endswith(f"removed 1 expert, 1 version, 2 blobs; {told['bytes']} bytes\n")
    assert "others/code" in text


def test_doctor(t2: Program, filled: Path) -> None:
    assert "healthy   yes" in t2("doctor", "--deep")
    with open_embedded(filled) as service:
        digest = service.resolve(parse_reference("team/math@1")).digest
    (filled / "blobs" / digest[:2] / digest).unlink()
    out = t2("doctor")
    assert t2.code == 2
    assert out.startswith("WRONG  blob: team/math@1: ")
    assert "healthy   no" in out
    report = t2.json("doctor")
    assert t2.code == 2
    assert report["healthy"] is False
    assert report["examined"]["versions"] == 6
    with open_embedded(filled) as service, service.database.write() as session:
        session.execute(sqlalchemy.text("UPDATE expert SET card = '{}'"))
    assert "team/mix: its card in lists is not what the tables say; t2 registry doctor --fix" in t2("doctor")
    assert t2("doctor", "--fix").startswith("fixed  row: others/code: ")
    assert t2.json("doctor", "--fix")["fixed"] == []


def test_export_and_import(t2: Program, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "registry.tar"
    counts = t2.json("export", archive)["counts"]
    assert counts["version"] == 6
    assert stat.S_IMODE(archive.stat().st_mode) & 0o600 == 0o600
    with pytest.raises(ArgumentError, match="--overwrite"):
        t2("export", archive)
    t2("export", archive, "--overwrite")
    monkeypatch.setenv("T2_REGISTRY_URL", str(tmp_path / "other"))
    text = t2("import", archive)
    assert "versions" in text
    assert "kept  the token" in text
    assert t2.json("import", archive)["counts"]["present"] == 6
    with open_embedded(tmp_path / "other") as service:
        assert service.download(service.resolve(parse_reference("team/math")).digest) == expert_bytes(1)
        service.set_alias(MATH, "production", 1)
    with pytest.raises(StorageError, match="cannot read"):
        t2("import", tmp_path / "none.tar")
    with pytest.raises(InvalidRequestError, match=r"test_registry_upkeep\.py: it is not a tar archive"):
        t2("import", Path(__file__))
    monkeypatch.setenv("T2_REGISTRY_URL", str(tmp_path / "third"))
    with open_embedded(tmp_path / "third") as service:
        service.publish(MATH, expert_bytes(5))
    with pytest.raises(ConflictError, match="nothing was imported"):
        t2("import", archive)


def test_one_namespace(t2: Program, filled: Path, tmp_path: Path) -> None:
    assert "expert" in t2("export", tmp_path / "team.tar", "--namespace", "team")
    with pytest.raises(NotFoundError):
        t2("export", tmp_path / "none.tar", "--namespace", "none")
    assert not (tmp_path / "none.tar").exists()
