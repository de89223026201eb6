"""``t2 basis``: plan, build and show, as a user runs them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from t2.adapters.checkpoint import open_checkpoint
from t2.adapters.expert import save_expert
from t2.core.errors import ArgumentError, ExpertMismatchError, ModelError
from t2.core.manifest import BaseModelRef, Manifest
from tests.cli.here import Here


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(capsys)


def config(hidden: int, inner: int, layers: int) -> transformers.LlamaConfig:
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)


def checkpoint(folder: Path, hidden: int = 32, inner: int = 48, layers: int = 2) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(hidden, inner, layers), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def test_a_plan_needs_the_configuration_alone(here: Here, tmp_path: Path) -> None:
    config(4096, 14336, 32).save_pretrained(tmp_path)
    whole = json.loads(here("basis", "plan", tmp_path, "--json"))
    half = json.loads(here("basis", "plan", tmp_path, "--layers", "0-15", "--workers", 3, "--json"))
    assert (whole["matrices"], whole["present"], half["matrices"], half["layers"]) == (224, 0, 112, list(range(16)))
    assert half["bytes"] * 2 == whole["bytes"]
    assert half["workers"] == 3
    assert half["seconds"] > 0
    fields = here.fields("basis", "plan", tmp_path, "--targets", "mlp")
    assert fields["matrices"] == "96 in 32 layers, 11.3 GB in bfloat16"
    assert fields["bases"] == "6.4 GB, 6.4 GB of them to be built"
    assert re.match(r"about \d+ (h|min)", fields["time"])


def test_a_plan_names_what_is_left_out_and_refuses_a_set_that_is_empty(here: Here, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    opt = transformers.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, vocab_size=64)
    opt.save_pretrained(tmp_path / "opt")
    whole = json.loads(here("basis", "plan", tmp_path / "opt", "--json"))
    assert (whole["matrices"], whole["left_out"]) == (12, {})
    assert json.loads(here("basis", "plan", tmp_path / "opt", "--targets", "mlp", "--json"))["matrices"] == 4
    assert "left out" not in here.fields("basis", "plan", tmp_path / "opt")
    moe = transformers.MixtralConfig(**sizes, num_key_value_heads=2, intermediate_size=48, vocab_size=64)
    moe.save_pretrained(tmp_path / "moe")
    asked = ("basis", "plan", tmp_path / "moe", "--moe", "skip")
    left = "2 × mlp.experts.gate_up_proj, 2 × mlp.experts.down_proj, 2 × mlp.gate"
    assert set(here.fields(*asked)["left out"].split(", ")) == set(left.split(", "))
    with pytest.raises(ArgumentError, match="targets=mlp: the model has no such matrices, only attn; use targets=all"):
        here(*asked, "--targets", "mlp")


def test_build_and_show(here: Here, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    with pytest.raises(ModelError, match="run: t2 basis build"):
        here("basis", "show", model)
    assert here.fields("basis", "build", model, "--layers", "0")["built"].startswith("7 bases, ")
    assert "7 of 14 matrices have no basis yet" in here("basis", "show", model)
    assert json.loads(here("basis", "build", model, "--json"))["built"] == 7
    assert json.loads(here("basis", "plan", model, "--json"))["present"] == 14

    targets = {"model.layers.1.mlp.up_proj.weight": 32}
    z = torch.ones(32)
    z[[3, 20]] = 2.0
    read = open_checkpoint(str(model))
    for name, fingerprint in (("mine", read.fingerprint()), ("other", "ab" * 32)):
        base = BaseModelRef(id="model", revision=None, fingerprint=fingerprint)
        save_expert(
            tmp_path / f"{name}.safetensors", Manifest(name=name, base=base, targets=targets), dict.fromkeys(targets, z)
        )
    asked = ("basis", "show", model, "--rank", "8+32", "--by", "matrix", "--json", "--experts")
    groups = json.loads(here(*asked, tmp_path / "mine.safetensors"))["groups"]
    assert len(groups) == 28
    few, whole = (group for group in groups if group["group"] in targets)
    sigma = torch.linalg.svdvals(read.matrix(few["group"]).float())
    assert few["sigma"] == pytest.approx(float(sigma[:8].sum() / sigma.sum()), rel=1e-5)
    assert few["energy"] == pytest.approx(float(sigma[:8].square().sum() / sigma.square().sum()), rel=1e-5)
    moved = float(sigma[3] ** 2 / (sigma[3] ** 2 + sigma[20] ** 2))
    assert few["moved"]["mine"] == pytest.approx(moved, rel=1e-5)
    assert (whole["sigma"], whole["energy"], whole["moved"]["mine"]) == (1, 1, 1)
    assert {group["moved"]["mine"] for group in groups if group["group"] not in targets} == {None}
    with pytest.raises(ExpertMismatchError, match="was trained on other weights"):
        here(*asked, tmp_path / "other.safetensors")
    assert json.loads(here(*asked, tmp_path / "other.safetensors", "--transfer", "strict"))["not_built"] == 0
    table = here("basis", "show", model, "--by", "layer", "--experts", tmp_path / "mine.safetensors").splitlines()
    assert table[0].split()[:4] == ["layer", "matrices", "rank", "kept"]
    assert [line.split()[0] for line in table[1:]] == ["0", "0", "1", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build", "--device", "gpu"), "--device gpu is not known"),
        (("build", "--workers", 0), "workers=0"),
        (("plan", "--layers", "5"), "the model has no layer 5, its layers are 0-1"),
        (("plan", "--targets", "mpl"), "did you mean 'mlp'"),
        (("show", "--by", "layers"), "did you mean 'layer'"),
        (("show", "--rank", "0"), "--rank 0 is not of the form"),
    ],
)
def test_mistakes_are_told_in_one_line(here: Here, tmp_path: Path, arguments: tuple[Any, ...], message: str) -> None:
    command, *options = arguments
    model = checkpoint(tmp_path / "model")
    with pytest.raises(ArgumentError, match=message):
        here("basis", command, model, *options)


def test_ctrl_c_leaves_whole_bases_and_no_process_and_the_next_build_goes_on(
    here: Here, tmp_path: Path, cache: Path
) -> None:
    model = checkpoint(tmp_path / "model", 512, 512, 8)
    command = [sys.executable, "-m", "t2.cli", "basis", "build", str(model), "--workers", "2", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        while len(list(cache.glob("*/*.safetensors"))) < 3 and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors.decode()
    assert (
        errors.decode().splitlines()[-1] == "t2: stopped; what was built stays, and the same command goes on from there"
    )
    assert b"Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert not list(cache.glob("*/.*"))
    before = len(list(cache.glob("*/*")))
    rest = json.loads(here("basis", "build", model, "--layers", "0-1", "--json"))
    assert 3 <= before < 56
    assert rest["built"] + rest["present"] == 14
