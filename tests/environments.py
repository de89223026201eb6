"""Virtual environments with t2 installed as a user would, over the libraries that are installed already."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

_KEPT_TASKS = ("arc", "gsm8k")


@dataclass(frozen=True)
class Environment:
    """A virtual environment."""

    root: Path

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    @property
    def site(self) -> Path:
        """Its site-packages folder."""
        return self.root / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"

    def run(self, *command: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run one of its programs, away from the repository and without this process's Python settings."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [self.root / "bin" / command[0], *command[1:]],
            env={**inherited, **(env or {})},
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


def create(root: Path, libraries: Path) -> Environment:
    """A new environment that sees ``libraries`` behind its own site-packages."""
    venv.create(root, with_pip=False, symlinks=True)
    environment = Environment(root)
    (environment.site / "libraries.pth").write_text(f"{libraries}\n")
    return environment


def link_libraries(folder: Path, without: Collection[str] = ()) -> Path:
    """Link the installed libraries into ``folder``, except t2, those in ``without``, and most of lm-eval's tasks.

    lm-eval's 14,000 task files take it ten seconds and more to index; a few are enough to see ours beside them.
    """
    folder.mkdir(parents=True)
    for source in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(source).iterdir():
            name = entry.name.lower()
            ours = name.startswith(("t2_eval", "t2-eval", "__editable__"))
            if ours or name in {"t2", "lm_eval"} or name.partition("-")[0].partition(".")[0] in without:
                continue
            (folder / entry.name).symlink_to(entry)
    _link_lm_eval(Path(sysconfig.get_path("purelib")) / "lm_eval", folder / "lm_eval")
    return folder


def _link_lm_eval(source: Path, target: Path) -> None:
    (target / "tasks").mkdir(parents=True)
    for entry in source.iterdir():
        if entry.name not in {"tasks", "__pycache__"}:
            (target / entry.name).symlink_to(entry)
    for entry in (source / "tasks").iterdir():
        if entry.suffix == ".py":
            (target / "tasks" / entry.name).symlink_to(entry)
        elif entry.name in _KEPT_TASKS:
            # A copy, since the index does not look into linked folders.
            shutil.copytree(entry, target / "tasks" / entry.name)


def copy_repository(target: Path) -> Path:
    """Copy what a build reads, so that it leaves nothing in the repository."""
    skipped = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "results", "runs", "tests")
    return Path(shutil.copytree(REPOSITORY, target, ignore=skipped))


def build_wheel(folder: Path) -> Path:
    """Build t2's wheel into ``folder``."""
    source = copy_repository(folder / "source")
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(environment: Environment, *what: str) -> None:
    """Install without dependencies: they are there."""
    _pip("--python", str(environment.python), "install", "--no-deps", "--no-build-isolation", *what)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
