"""The files for running a registry for a team agree with the code, and with each other."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from t2.registry.settings import PREFIX, ServerSettings, load_settings
from tests.environments import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
CONTAINERFILE = (DEPLOY / "Containerfile").read_text()


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that make-secrets.sh makes."""
    folder = tmp_path_factory.mktemp("deploy")
    shutil.copy(DEPLOY / "make-secrets.sh", folder)
    subprocess.run([folder / "make-secrets.sh"], check=True, capture_output=True)
    return folder / "secrets"


def variables(text: str) -> set[str]:
    """The server's settings that a text names, as the settings are called."""
    return {name.lower() for name in re.findall(rf"\b{PREFIX}([A-Z0-9_]+)", text)}


@pytest.mark.parametrize("file", ["compose.yaml", "Containerfile"])
def test_the_settings_that_a_file_names_exist(file: str) -> None:
    named = variables((DEPLOY / file).read_text())
    assert named
    assert named <= ServerSettings.model_fields.keys()


def test_the_settings_of_the_compose_file_are_good(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2_REGISTRY_ALLOWED_HOSTS", "")
    for name, value in SERVICES["registry"]["environment"].items():
        if not value.startswith("${"):
            monkeypatch.setenv(name, value)
    settings = load_settings(secrets / "registry.toml")
    assert settings.blobs == "s3://t2-experts/blobs"
    assert settings.s3_access_key is not None
    assert settings.workers == 2


def test_the_secrets_agree_and_are_new_each_time(secrets: Path, tmp_path: Path) -> None:
    registry = tomllib.loads((secrets / "registry.toml").read_text())
    garage = dict(line.split("=", 1) for line in (secrets / "garage.env").read_text().splitlines())
    password = (secrets / "postgres_password").read_text()
    assert f":{password}@postgres/" in registry["database_url"]
    assert garage["GARAGE_DEFAULT_ACCESS_KEY"] == registry["s3_access_key"]
    assert garage["GARAGE_DEFAULT_SECRET_KEY"] == registry["s3_secret_key"]
    assert garage["GARAGE_DEFAULT_BUCKET"] == "t2-experts"
    assert len({password, registry["s3_secret_key"], garage["GARAGE_RPC_SECRET"]}) == 3
    assert all(len(secret) == 64 for secret in (password, registry["s3_secret_key"], garage["GARAGE_RPC_SECRET"]))
    assert secrets.stat().st_mode & 0o077 == 0
    shutil.copy(DEPLOY / "make-secrets.sh", tmp_path)
    subprocess.run([tmp_path / "make-secrets.sh"], check=True, capture_output=True)
    assert (tmp_path / "secrets" / "postgres_password").read_text() != password
    again = subprocess.run([tmp_path / "make-secrets.sh"], capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "there already" in again.stderr


def test_every_secret_file_is_made_and_none_is_in_the_compose_file(secrets: Path) -> None:
    wanted = {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()}
    wanted |= {Path(file).name for service in SERVICES.values() for file in service.get("env_file", [])}
    assert wanted == {path.name for path in secrets.iterdir()}
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            assert not re.search(r"PASSWORD|SECRET|TOKEN|KEY", name) or value.startswith("/run/secrets/"), name


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_container_has_as_little_as_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[a-z0-9/-]+:v?\d+\.\d+\.\d+|postgres:\d+\.\d+-\w+", service["image"])
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    assert service["healthcheck"].get("test") or name == "migrate" if "healthcheck" in service else name == "registry"
    if name != "registry":
        assert "ports" not in service
        assert service["networks"] == ["inside"]


def test_the_image_is_of_this_version_and_has_a_health_check_and_no_root() -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert SERVICES["registry"]["image"] == f"t2-registry:{version}"
    assert f"t2-registry:{version}" in CONTAINERFILE
    final = CONTAINERFILE.rpartition("\nFROM ")[2]
    assert "/healthz" in final
    assert re.search(r"^USER 10001:10001$", final, re.MULTILINE)
    assert "apt-get" not in CONTAINERFILE


def test_the_builder_gets_what_the_wheel_is_built_of() -> None:
    ignored = (REPOSITORY / ".containerignore").read_text()
    assert (REPOSITORY / ".dockerignore").read_text() == ignored
    sent = {line[1:] for line in ignored.splitlines() if line.startswith("!")}
    setup = (REPOSITORY / "setup.py").read_text()
    folders = re.search(r"FOLDERS = \(([^)]*)\)", setup)
    assert folders is not None
    present = {name for name in re.findall(r'"(\w+)"', folders[1]) if (REPOSITORY / name).is_dir()}
    files = {"setup.py", "pyproject.toml", "t2_eval_discovery.pth", "README.md", "LICENSE", "constraints.txt"}
    assert present | files <= sent
    assert set(re.findall(r"^COPY (deploy/\S+)", CONTAINERFILE, re.MULTILINE)) <= sent
    assert all((REPOSITORY / path).exists() for path in sent)


def test_the_base_install_brings_no_torch() -> None:
    lines = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    waiting = [Requirement(line) for line in lines]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        for extra in requirement.extras or {""}:
            key = canonicalize_name(requirement.name), extra
            if key in seen:
                continue
            seen.add(key)
            needed = [Requirement(line) for line in importlib.metadata.requires(requirement.name) or []]
            waiting += [one for one in needed if one.marker is None or one.marker.evaluate({"extra": extra})]
    names = {name for name, _ in seen}
    assert {"sqlalchemy", "uvicorn", "boto3"} <= names
    assert not names & {"torch", "transformers", "lm-eval", "datasets", "accelerate"}


HEAVY = ("torch", "transformers", "lm_eval", "datasets", "sqlalchemy", "fastapi", "uvicorn", "boto3", "alembic")


@pytest.mark.parametrize("arguments", [["--help"], ["registry", "--help"], ["registry", "serve", "--help"]])
def test_help_imports_neither_the_model_libraries_nor_the_servers(arguments: list[str]) -> None:
    code = (
        "import sys\nsys.argv = ['t2', *sys.argv[1:]]\nfrom t2.cli.main import main\n"
        f"try:\n    main()\nexcept SystemExit:\n    pass\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_server_imports_no_model_library() -> None:
    code = (
        "import sys\nimport t2.registry.server.serve, t2.registry.server.app, t2.registry.open\n"
        f"print([name for name in {HEAVY[:4]!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
