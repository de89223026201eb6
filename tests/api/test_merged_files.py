"""A merged checkpoint has the base's own tokenizer and generation files, not those of the model that lm-eval ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from t2.api import load_model
from tests.harness import tiny


def save_base(folder: Path, **changes: Any) -> Path:
    """A base without a padding token, so that lm-eval chooses one."""
    tiny.save_model(folder)
    tokenizer = tiny.tokenizer()
    for name in ("pad_token", *changes):
        setattr(tokenizer, name, changes.get(name))
    tokenizer.save_pretrained(folder)
    return folder


def merge(model: Any, folder: Path) -> Path:
    expert = tiny.save_expert(folder.parent / "one.safetensors", model.engine, 1)
    return Path(model.adapt("expert", experts=str(expert)).merge(folder))


@pytest.mark.parametrize("changes", [{}, {"unk_token": None}, {"unk_token": None, "eos_token": None}], ids=repr)
def test_the_files_are_the_bases(changes: dict[str, Any], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", **changes)
    # Greedy decoding with a temperature: a file that is published often, and that transformers refuses to write.
    generation = '{"temperature": 0.6, "max_length": 300, "eos_token_id": [2, 3], "chat_format": "own"}\n'
    (base / "generation_config.json").write_text(generation)
    (base / "README.md").write_text("of the base")
    model = load_model(base, device="cpu")
    assert model.lm.tokenizer.pad_token is not None
    merged = merge(model, tmp_path / "merged")
    names = {path.name for path in base.glob("tokenizer*")} | {"generation_config.json"}
    assert names | {"config.json", "model.safetensors", "t2_merge.json", "chat_template.jinja"} == {
        path.name for path in merged.iterdir()
    }
    for name in names:
        assert (merged / name).read_bytes() == (base / name).read_bytes()
    assert transformers.AutoTokenizer.from_pretrained(merged).pad_token is None
    assert model.lm.model.generation_config.temperature == 0.6


def test_a_base_without_generation_files_has_none_afterwards(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    (base / "generation_config.json").unlink()
    merged = merge(load_model(base, device="cpu"), tmp_path / "merged")
    assert not (merged / "generation_config.json").exists()


def test_a_tokenizer_from_elsewhere_is_written_as_it_was(tmp_path: Path) -> None:
    base, other = save_base(tmp_path / "base"), save_base(tmp_path / "other")
    for path in base.glob("tokenizer*"):
        path.unlink()
    given = tiny.tokenizer()
    given.pad_token = None
    loaded = transformers.AutoModelForCausalLM.from_pretrained(base)
    made: list[tuple[Any, Any]] = [(base, str(other)), (loaded, given)]
    for number, arguments in enumerate(made):
        model = load_model(arguments[0], tokenizer=arguments[1], device="cpu")
        assert model.lm.tokenizer.pad_token is not None
        merged = merge(model, tmp_path / f"merged{number}" / "checkpoint")
        assert transformers.AutoTokenizer.from_pretrained(merged).pad_token is None
        assert json.loads((merged / "t2_merge.json").read_text())["strategy"] == "expert"
