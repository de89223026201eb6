"""The expert files on this machine: in the user's folder, among those that come with t2, or anywhere by path.

Nothing here needs PyTorch.
"""

from __future__ import annotations

from pathlib import Path

from t2.core.errors import ArgumentError, ExpertError, nearest
from t2.core.expertfile import is_no_expert
from t2.core.settings import experts_dir
from t2.harness.shipped import PREFIX, demo_dir

FILE_NAME = "expert.safetensors"
"""What an expert's file is called inside a folder of its own."""


def own_experts() -> dict[str, Path]:
    """The user's experts in ``T2_EXPERTS_DIR``, by name."""
    return list_folder(experts_dir(), "")


def shipped_experts() -> dict[str, Path]:
    """The experts that come with t2, as ``demo/<name>``."""
    return list_folder(demo_dir(), PREFIX)


def known_experts() -> dict[str, Path]:
    """Every expert on this machine that can be named, with its file: the user's, then the demo experts."""
    return own_experts() | shipped_experts()


def find_file(name: str) -> Path | None:
    """The file of this machine that a name, file or folder means; None where it is none of these.

    A name in ``T2_EXPERTS_DIR`` or of a demo expert goes before a path.

    Raises:
        ArgumentError: it is a folder without the file of one expert.
    """
    known = known_experts()
    if name in known:
        return known[name]
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / FILE_NAME).is_file():
            return path / FILE_NAME
        files = sorted(path.glob("*.safetensors"))
        if len(files) == 1:
            return files[0]
        raise ArgumentError(f"experts: the folder {path} holds {len(files)} .safetensors files; name one of them")
    return None


def find_expert(name: str) -> Path:
    """As :func:`find_file`, where there must be one.

    Raises:
        ArgumentError: there is none.
    """
    file = find_file(name)
    if file is None:
        known = nearest(name, known_experts())
        raise ArgumentError(f"experts: {name} is neither an expert in {experts_dir()} nor a file{known}")
    return file


def find_files(name: str) -> list[tuple[str, Path]]:
    """The files of this machine that a part of ``experts=`` means, each by what to call it; none where it is a name.

    A folder of several stands for them all.

    Raises:
        ArgumentError: it is empty, or a folder without experts.
    """
    if not name.strip():
        raise ArgumentError("experts: a name is empty; give names, files or folders joined by +")
    path = Path(name).expanduser()
    if path.is_dir() and not (path / FILE_NAME).is_file():
        inside = list_folder(path, f"{name.rstrip('/')}/")
        if len(inside) > 1 and name not in known_experts():
            return list(inside.items())
    file = find_file(name)
    return [] if file is None else [(name, file)]


def list_folder(folder: Path, prefix: str) -> dict[str, Path]:
    """The experts in a folder by name: its own files, and folders at any depth that hold one.

    Raises:
        ExpertError: the folder cannot be read.
    """
    found: dict[str, Path] = {}
    try:
        if not folder.is_dir():
            return found
        for path in sorted(folder.rglob("*.safetensors")):
            if is_no_expert(path):
                continue
            if path.name == FILE_NAME:
                name = path.parent.relative_to(folder).as_posix()
            elif path.parent == folder:
                name = path.stem
            else:
                continue
            found.setdefault(prefix + name, path)
    except OSError as error:
        raise ExpertError(f"cannot list the experts in {folder}: {error.strerror or error}") from error
    return found
