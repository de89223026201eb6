"""Merged checkpoints: ordinary folders that compute what the engine computes, there whole or not at all."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from t2.adapters.convert.merge import ORIGIN, check_free, write_merged
from t2.adapters.engine.transformers import TransformersEngine
from t2.core.errors import ArgumentError, StorageError
from tests.adapters.conftest import make_model, make_tokenizer, random_z


def make_engine(family: str) -> TransformersEngine:
    """A tiny model with just the parameters that its configuration asks for, so that a checkpoint can hold it."""
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(make_model(family).config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
    return TransformersEngine(model, make_tokenizer(), f"tiny-{family}")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2"])
def test_a_plain_from_pretrained_computes_what_the_engine_computes(family: str, tmp_path: Path) -> None:
    engine = make_engine(family)
    model: Any = engine.model
    z = random_z(engine, seed=1)
    before = {name: value.clone() for name, value in engine.model.state_dict().items()}
    write_merged(engine, engine.tokenizer, z, tmp_path / "merged", {"why": "test"})
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([engine.tokenizer.encode("the stop ab 12")])
    assert tokenizer.encode("the stop ab 12") == ids[0].tolist()
    with torch.no_grad(), engine.applied(z):
        logits = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=12, do_sample=False)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, logits)
        assert torch.equal(plain.generate(ids, max_new_tokens=12, do_sample=False), tokens)
        assert not torch.equal(model(ids).logits, logits)
    assert all(torch.equal(value, before[name]) for name, value in engine.model.state_dict().items())
    assert json.loads((tmp_path / "merged" / ORIGIN).read_text()) == {"why": "test"}
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert list((tmp_path / "merged").glob("*.bin")) == []


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    engine = TransformersEngine(make_model("llama", dtype=torch.bfloat16), make_tokenizer(), "tiny")
    z = random_z(engine, seed=1)
    write_merged(engine, engine.tokenizer, z, tmp_path / "merged", {})
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert plain.dtype == torch.bfloat16
    with engine.applied(z):
        state = engine.model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_what_is_there_is_replaced_only_when_told(llama: TransformersEngine, tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    write_merged(llama, llama.tokenizer, None, folder, {"number": 1})
    with pytest.raises(ArgumentError, match="not empty"):
        write_merged(llama, llama.tokenizer, None, folder, {"number": 2})
    write_merged(llama, llama.tokenizer, None, folder, {"number": 2}, overwrite=True)
    assert json.loads((folder / ORIGIN).read_text()) == {"number": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").touch()
    # An expert's folder and a base model's have a config.json too.
    (tmp_path / "photos" / "config.json").write_text("{}")
    with pytest.raises(ArgumentError, match=f"no {ORIGIN}, so it is never replaced"):
        check_free(tmp_path / "photos", overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match="is a file"):
        check_free(tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    check_free(tmp_path / "empty", overwrite=False)


def test_a_full_disk_leaves_nothing_behind(llama: TransformersEngine, tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    write_merged(llama, llama.tokenizer, None, folder, {"number": 1})
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageError) as caught:
            write_merged(llama, llama.tokenizer, None, folder, {"number": 2}, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert json.loads((folder / ORIGIN).read_text()) == {"number": 1}


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.adapters.conftest import make_model, make_tokenizer
from t2.adapters.convert import merge
from t2.adapters.engine.transformers import TransformersEngine

merge._settle = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
engine = TransformersEngine(make_model("llama"), make_tokenizer(), "tiny")
merge.write_merged(engine, engine.tokenizer, None, Path(sys.argv[1]), {})
"""


def test_a_kill_leaves_no_folder_under_the_name(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "merged")], env=dict(os.environ), timeout=600, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "merged").exists()
    assert all(path.name.startswith(".merged.") for path in tmp_path.iterdir())
    left = next(tmp_path.iterdir())
    os.utime(left, (0, 0))
    (tmp_path / ".merged.abc.old").mkdir()
    (tmp_path / ".merged.abc.old" / "weights").touch()
    engine = make_engine("llama")
    with pytest.raises(ArgumentError, match="not empty"):
        write_merged(engine, engine.tokenizer, None, tmp_path / "merged", {})
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["weights"]
    assert not left.exists()
