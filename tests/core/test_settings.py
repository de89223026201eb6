"""Settings are read from the environment when they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from t2.core import settings


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("T2_CACHE_DIR", settings.cache_dir),
        ("T2_EXPERTS_DIR", settings.experts_dir),
        ("T2_DATA_HOME", settings.data_home),
        ("T2_DATA_DIR", settings.data_dir),
    ],
)
def test_a_setting_is_read_when_it_is_used(
    variable: str, value: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert variable in settings.SETTINGS
    monkeypatch.setenv(variable, str(tmp_path))
    assert value() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(variable, "~/things")
    assert value() == tmp_path / "home" / "things"
    monkeypatch.setenv(variable, "")
    assert value() != tmp_path
    assert value() is None or value().is_absolute()
