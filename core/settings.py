"""Settings from the environment: every variable that t2 reads, in one table."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from t2.core.errors import ArgumentError


@dataclass(frozen=True)
class Setting:
    """One environment variable: what it does, and what holds without it."""

    description: str
    default: str


SETTINGS: dict[str, Setting] = {
    "T2_DATA_DIR": Setting("a folder of JSON-lines task data that is looked in first", "none"),
    "T2_DATA_HOME": Setting("where `t2 data fetch` keeps task data", "the user's data folder, `t2/data`"),
    "T2_CACHE_DIR": Setting(
        "spectral bases, adaptation records and experts of registry servers", "the user's cache folder, `t2`"
    ),
    "T2_EXPERTS_DIR": Setting(
        "where `t2 train` puts experts and `experts=` finds them", "the user's data folder, `t2/experts`"
    ),
    "T2_REGISTRY_URL": Setting(
        "the registry that experts come from and go to: a server's URL, or a folder",
        "the user's data folder, `t2/registry`",
    ),
    "T2_REGISTRY_TOKEN": Setting("the access token for that server", "none"),
    "T2_REGISTRY_ALLOW_HTTP": Setting(
        "`1` sends the token over plain HTTP to other machines too: only on a network that you trust", "off"
    ),
}


def data_dir() -> Path | None:
    """``T2_DATA_DIR``, or None when it is not set."""
    return _path("T2_DATA_DIR") if os.environ.get("T2_DATA_DIR") else None


def data_home() -> Path:
    """``T2_DATA_HOME``, or ``t2/data`` in the user's data folder."""
    return _path("T2_DATA_HOME", platformdirs.user_data_path("t2") / "data")


def cache_dir() -> Path:
    """``T2_CACHE_DIR``, or ``t2`` in the user's cache folder."""
    return _path("T2_CACHE_DIR", platformdirs.user_cache_path("t2"))


def experts_dir() -> Path:
    """``T2_EXPERTS_DIR``, or ``t2/experts`` in the user's data folder."""
    return _path("T2_EXPERTS_DIR", platformdirs.user_data_path("t2") / "experts")


def registry_url() -> str:
    """``T2_REGISTRY_URL``, or the folder of the embedded registry."""
    return os.environ.get("T2_REGISTRY_URL") or str(registry_dir())


def is_registry_configured() -> bool:
    """Whether ``T2_REGISTRY_URL`` is set."""
    return bool(os.environ.get("T2_REGISTRY_URL"))


def registry_dir() -> Path:
    """The folder of the embedded registry, and of a server without other settings: ``t2/registry`` in the user's data.

    ``T2_REGISTRY_URL`` names another folder, where it is no URL.
    """
    value = os.environ.get("T2_REGISTRY_URL")
    if value and "://" not in value:
        return _path("T2_REGISTRY_URL")
    return platformdirs.user_data_path("t2") / "registry"


def registry_token() -> str | None:
    """``T2_REGISTRY_TOKEN``, or None when it is not set."""
    return os.environ.get("T2_REGISTRY_TOKEN") or None


def registry_allow_http() -> bool:
    """Whether ``T2_REGISTRY_ALLOW_HTTP`` is set, and not to ``0``."""
    return os.environ.get("T2_REGISTRY_ALLOW_HTTP", "") not in ("", "0")


def _path(name: str, default: Path = Path()) -> Path:
    value = os.environ.get(name)
    try:
        return Path(value).expanduser() if value else default
    except RuntimeError as error:  # ~user of an unknown user
        raise ArgumentError(f"{name}: no such home folder: {value}; write an absolute path") from error
