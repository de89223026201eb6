"""The parts of the build that pyproject.toml cannot say.

The top-level folders are the packages ``t2.<folder>``; ``t2`` itself is a namespace without files, so the repository
needs no folder of that name. Wheels and editable installs both carry ``t2_eval_discovery.pth`` (see
``harness/discovery.py``).
"""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

FOLDERS = ("core", "adapters", "harness", "training", "registry", "api", "cli", "tasks_yaml", "migrations")
LINKS = Path(".link")
PTH = "t2_eval_discovery.pth"


def folders() -> list[str]:
    return [folder for folder in FOLDERS if Path(folder).is_dir()]


def packages() -> list[str]:
    found = []
    for folder in folders():
        for directory, names, files in os.walk(folder):
            names[:] = sorted(name for name in names if name.isidentifier() and name != "__pycache__")
            if files:
                found.append("t2." + directory.replace(os.sep, "."))
    return found


def link_folders() -> bool:
    """Make ``.link/t2/<folder>`` symbolic links to the folders; False where the system forbids it."""
    root = LINKS / "t2"
    root.mkdir(parents=True, exist_ok=True)
    try:
        for folder in folders():
            link = root / folder
            if not link.is_symlink():
                link.symlink_to(Path("..", "..", folder), target_is_directory=True)
    except OSError:
        return False
    return True


class BuildPy(build_py):
    """Adds the discovery line to what is installed."""

    def run(self) -> None:
        super().run()
        # An editable build copies nothing into build_lib; what it puts beside the finder is the install folder.
        folder = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.mkpath(folder)
        self.copy_file(PTH, str(Path(folder, PTH)), preserve_mode=False)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, str(Path(self.build_lib, PTH))]


class EditableWheel(editable_wheel):
    """Installs a path to a tree of links; type checkers and editors follow it, and not setuptools' import finder."""

    def run(self) -> None:
        if link_folders():
            self.distribution.packages = ["t2", *self.distribution.packages]
            self.distribution.package_dir = self.package_dir = {"": str(LINKS)}
        super().run()


setup(
    packages=packages(),
    package_dir={f"t2.{folder}": folder for folder in folders()},
    package_data={
        "": ["*.css", "*.html", "*.ini", "*.js", "*.json", "*.jsonl", "*.mako", "*.safetensors", "*.yaml", "py.typed"],
    },
    cmdclass={"build_py": BuildPy, "editable_wheel": EditableWheel},
)
