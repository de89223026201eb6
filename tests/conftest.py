"""What holds for every test: no Hub, no state of the user's, no timing."""

from __future__ import annotations

import importlib.util
import os
import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

# Before anything imports a library that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# vLLM wants other versions of many libraries, so its tests run where it is installed: `make vllm-test`.
collect_ignore = [] if importlib.util.find_spec("vllm") else ["vllm"]

# A shell starts what it runs in the background deaf to Ctrl-C, and so would be all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

    from tests.results import Evaluated

settings.register_profile("t2", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("t2")


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Caches and experts of the user neither help nor suffer; fetched task data are read where they lie."""
    home = tmp_path_factory.mktemp("t2")
    os.environ["T2_CACHE_DIR"] = str(home / "cache")
    os.environ["T2_EXPERTS_DIR"] = str(home / "experts")
    os.environ["T2_REGISTRY_URL"] = str(home / "registry")
    os.environ.pop("T2_REGISTRY_TOKEN", None)


@pytest.fixture(scope="session")
def smollm2() -> HFLM:
    """The demo model, SmolLM2-135M-Instruct, in float32 on the CPU: loaded once, for it takes a quarter of a minute."""
    from t2.harness.base import open_base

    return open_base(dtype="float32", device="cpu", batch_size=4)


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """Results of a tiny model, as lm-eval writes them."""
    from tests.results import evaluate_all

    return evaluate_all(tmp_path_factory.mktemp("evaluated"))
