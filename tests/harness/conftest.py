from __future__ import annotations

from pathlib import Path

import pytest
from lm_eval.models.huggingface import HFLM

from t2.adapters.engine.transformers import TransformersEngine
from t2.harness.base import open_base
from tests.harness import tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model."""
    return tiny.save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_engine(tiny_folder: Path) -> TransformersEngine:
    """An engine over the tiny model, for what the model itself does not have to load."""
    return tiny.engine_of(tiny_folder)


@pytest.fixture(scope="session")
def tiny_lm(tiny_folder: Path) -> HFLM:
    """lm-eval's own model over the tiny model."""
    return open_base(str(tiny_folder), device="cpu")


@pytest.fixture(autouse=True)
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has its own cache of adaptations and its own experts."""
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("T2_EXPERTS_DIR", str(tmp_path / "experts"))


@pytest.fixture(autouse=True)
def without_environment_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval describes the machine in its results, which takes a second of every evaluation."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


@pytest.fixture
def experts(tmp_path: Path, tiny_engine: TransformersEngine) -> str:
    """Three experts of the tiny model in the user's folder, as a value of ``experts=``."""
    for seed, (name, domain) in enumerate([("alpha", "math"), ("beta", "code"), ("gamma", "reasoning")]):
        tiny.save_expert(tmp_path / "experts" / f"{name}.safetensors", tiny_engine, seed, domain=domain)
    return "alpha+beta+gamma"
