"""A base with mixture-of-experts layers, from the command line's arguments to answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from t2.adapters.engine.transformers import TransformersEngine
from t2.core.errors import ModelError
from t2.harness.model import T2LM
from tests.adapters import families
from tests.harness import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models") / "moe"
    families.make_model("qwen2_moe", len(tiny.tokenizer())).save_pretrained(home)
    tiny.tokenizer().save_pretrained(home)
    return home


def make(folder: Path, **args: Any) -> T2LM:
    return T2LM.create_from_arg_obj({"pretrained": str(folder), **args}, {"device": "cpu", "batch_size": 3})


def test_it_is_scored_as_it_is_refused_for_experts_and_adapted_beside_its_experts_on_request(
    folder: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = TransformersEngine(model, tiny.tokenizer(), "moe", moe="skip")
    path = str(tiny.save_expert(tmp_path / "some.safetensors", engine, 1))
    base = tiny.evaluate(make(folder), [tiny.choice_task()])
    with pytest.raises(ModelError, match=r"Qwen2MoeForCausalLM has mixture-of-experts .* moe=skip adapts"):
        make(folder, adapt="expert", experts=path)
    lm = make(folder, adapt="expert", experts=path, moe="skip")
    adapted = tiny.evaluate(lm, [tiny.choice_task()])
    assert tiny.answers(adapted, "tiny_choice") != tiny.answers(base, "tiny_choice")
    assert lm.records[0].settings["moe"] == "skip"
