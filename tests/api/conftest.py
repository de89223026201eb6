from __future__ import annotations

from pathlib import Path

import pytest

from t2.api import Model, load_model
from tests.harness import tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model."""
    return tiny.save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def model(tiny_folder: Path) -> Model:
    """The tiny model, loaded by the API."""
    return load_model(str(tiny_folder), device="cpu", batch_size=3)


@pytest.fixture(autouse=True)
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has its own cache of adaptations and its own experts."""
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("T2_EXPERTS_DIR", str(tmp_path / "experts"))


@pytest.fixture
def experts(tmp_path: Path, model: Model) -> str:
    """Three experts of the tiny model in the user's folder, as a value of ``experts=``."""
    for seed, (name, domain) in enumerate([("alpha", "math"), ("beta", "code"), ("gamma", "reasoning")]):
        tiny.save_expert(tmp_path / "experts" / f"{name}.safetensors", model.engine, seed, domain=domain)
    return "alpha+beta+gamma"
