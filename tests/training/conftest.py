from __future__ import annotations

from pathlib import Path

import pytest
from lm_eval.models.huggingface import HFLM

from t2.harness.base import open_base
from tests.harness import tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model."""
    return tiny.save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_lm(tiny_folder: Path) -> HFLM:
    """lm-eval's own model over the tiny model."""
    return open_base(str(tiny_folder), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def exact_lm(tiny_folder: Path) -> HFLM:
    """The same in float64, for derivatives by differences."""
    return open_base(str(tiny_folder), device="cpu", dtype="float64")


@pytest.fixture(autouse=True)
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has its own experts."""
    monkeypatch.setenv("T2_EXPERTS_DIR", str(tmp_path / "experts"))
