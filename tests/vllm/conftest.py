"""One vLLM for all tests of this folder: a small random model in float32 on the CPU, beside transformers over the
same files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before vLLM is imported: in this process, on two cores, with room for a few prompts.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0-1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.engine.vllm import VllmEngine
from t2.harness.base import open_base, open_engine
from tests.harness import tiny

START: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "batch_size": "auto"}
NAME = "tiny"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in safetensors files; vLLM's kernels know heads of 32 and more."""
    return tiny.save_model(tmp_path_factory.mktemp("models") / NAME, layers=4, hidden=128)


@pytest.fixture(scope="session")
def inner(folder: Path) -> Iterator[Any]:
    """lm-eval's own vLLM model."""
    lm: Any = open_base(str(folder), "vllm", **START)
    yield lm
    lm.close()


@pytest.fixture(scope="session")
def engine(inner: Any) -> VllmEngine:
    """t2's engine over it."""
    engine = open_engine(inner, NAME, None, 32, "refuse")
    assert isinstance(engine, VllmEngine)
    return engine


@pytest.fixture(scope="session")
def other(folder: Path) -> TransformersEngine:
    """The engine to agree with."""
    return tiny.engine_of(folder)
