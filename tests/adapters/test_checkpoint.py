"""Checkpoints read matrix by matrix: the same matrices as the loaded model has, or one line that says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from t2.adapters.checkpoint import open_checkpoint, outline
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.targets import find_targets
from t2.core.errors import ModelError
from tests.adapters.conftest import make_model, make_tokenizer
from tests.adapters.families import FAMILIES
from tests.adapters.test_backbones import LAYERS, seeing


def save(model: transformers.PreTrainedModel, folder: Path, shard: str = "30KB") -> str:
    model.save_pretrained(folder, max_shard_size=shard)
    return str(folder)


def same_matrices(checkpoint: str, model: Any) -> None:
    """What is read is what a model computes with, by name, value and order."""
    read = open_checkpoint(checkpoint, moe="skip")
    targets = find_targets(model, moe="skip")
    assert list(read.targets) == list(targets)
    for name, matrix in read.matrices():
        assert torch.equal(matrix.float(), targets[name].matrix.float()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_matrices_and_fingerprint_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    model = make_model(family, dtype=torch.bfloat16)
    path = save(model, tmp_path)
    read = open_checkpoint(path, moe="skip")
    assert len(read.files) > 1
    engine = TransformersEngine(model, make_tokenizer(), family, moe="skip")
    assert {name: target.rank for name, target in read.targets.items()} == engine.ranks()
    assert {n: (t.kind, t.layer) for n, t in read.targets.items()} == {
        n: (t.kind, t.layer) for n, t in engine.targets.items()
    }
    assert read.fingerprint() == engine.base.fingerprint
    same_matrices(path, engine.model)


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "idefics3", "blip2"])
def test_a_model_that_sees_is_read_by_the_names_of_its_text_model(name: str, tmp_path: Path) -> None:
    model = transformers.AutoModelForImageTextToText.from_config(seeing(name)[0])
    same_matrices(save(model, tmp_path), model)


def test_one_file_of_a_model_without_its_head_is_read_too(tmp_path: Path) -> None:
    model = make_model("llama")
    path = save(model.model, tmp_path, "1GB")
    assert [file.name for file in open_checkpoint(path).files] == ["model.safetensors"]
    assert not any(key.startswith("model.") for key in safetensors.torch.load_file(tmp_path / "model.safetensors"))
    same_matrices(path, model)


def test_tensors_that_transformers_splits_on_loading_are_split(tmp_path: Path) -> None:
    configs: Any = transformers
    model = transformers.AutoModelForCausalLM.from_config(configs.HrmTextConfig(**LAYERS))
    path = save(model, tmp_path)
    fused = {key for file in open_checkpoint(path).files for key in safetensors.torch.load_file(file)}
    assert any(key.endswith("gqkv_proj.weight") for key in fused)
    same_matrices(path, model)


def test_a_plan_needs_no_weights(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    )
    config.save_pretrained(tmp_path)
    targets = outline(str(tmp_path)).targets
    assert len(targets) == 7 * 32
    assert targets["model.layers.31.mlp.down_proj.weight"].shape == (4096, 14336)


def break_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        open_checkpoint(str(folder)).digests()
    return str(error.value)


def test_what_cannot_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    save(make_model("llama"), whole)
    shard = sorted(whole.glob("*.safetensors"))[1]
    data, index = shard.read_bytes(), whole / "model.safetensors.index.json"
    listed, config = index.read_bytes(), (whole / "config.json").read_bytes()

    shard.unlink()
    assert f"lacks the file {shard.name}" in refused(whole)
    shard.write_bytes(data[:1000])
    assert "fetch the file again" in refused(whole)
    shard.write_bytes(data)
    index.write_text("{")
    assert "is not an index of safetensors files" in refused(whole)
    index.write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    assert "lacks the file ../elsewhere.safetensors" in refused(whole)
    index.unlink()
    assert "save_pretrained" in refused(whole)
    index.write_bytes(listed)
    break_config(whole, intermediate_size=56)
    assert "its config.json says (56, 32)" in refused(whole)
    (whole / "config.json").write_bytes(config)
    break_config(whole, num_hidden_layers=3)
    assert "has no tensor for model.layers.2" in refused(whole)
    break_config(whole, num_hidden_layers=2, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "is quantised" in refused(whole)
    (whole / "config.json").write_bytes(config)
    assert open_checkpoint(str(whole)).digests()
    (whole / "config.json").unlink()
    (whole / "model.gguf").touch()
    assert "is a GGUF file" in refused(whole)
    assert "cannot read the configuration" in refused(tmp_path / "nowhere")


def test_quantised_tensors_without_a_word_in_the_configuration_are_refused(tmp_path: Path) -> None:
    save(make_model("llama"), tmp_path, "1GB")
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    safetensors.torch.save_file(tensors, path)
    assert "model.layers.0.mlp.up_proj.weight is quantised (torch.int8)" in refused(tmp_path)


def test_other_kinds_of_models_are_refused(tmp_path: Path) -> None:
    transformers.T5Config().save_pretrained(tmp_path)
    assert "(t5) is not a decoder-only language model" in refused(tmp_path)
