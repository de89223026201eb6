"""A base quantised while it is loaded: lm-eval scores it adapted, without its matrices ever being replaced."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.targets import find_targets
from t2.core.errors import DependencyError, ExpertMismatchError
from t2.harness.base import open_base
from t2.harness.model import T2LM
from tests.harness import tiny

FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "dtype": "float32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices are whole blocks of 64 numbers."""
    return tiny.save_model(tmp_path_factory.mktemp("models") / "tiny", hidden=64)


def make(folder: Path, **args: Any) -> T2LM:
    return T2LM.create_from_arg_obj(
        {"pretrained": str(folder), **FOUR_BITS, **args}, {"device": "cpu", "batch_size": 3}
    )


def twin(lm: T2LM, folder: Path) -> TransformersEngine:
    """The float model of the matrices that a quantised one computes with."""
    assert lm._runtime is not None
    quantised = lm._runtime.engine
    assert isinstance(quantised, TransformersEngine)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, target in find_targets(model).items():
        target.parameter.data = quantised.targets[name].matrix.float()
    return TransformersEngine(model, lm.tokenizer, "twin")


def likelihoods(results: dict[str, Any]) -> list[float]:
    return [value for sample in tiny.answers(results, "tiny_choice") for ((value, _),) in [*sample[3]]]


def test_answers_are_those_of_the_matrices_it_computes_with(folder: Path, tmp_path: Path) -> None:
    plain = make(folder)
    reference = twin(plain, folder)
    path = tiny.save_expert(tmp_path / "own.safetensors", reference, 3, base=plain.base)
    adapted = make(folder, adapt="expert", experts=str(path))
    assert adapted.base.fingerprint == reference.base.fingerprint
    ours = [likelihoods(tiny.evaluate(lm, [tiny.choice_task()])) for lm in (plain, adapted)]
    assert adapted.records[0].dtype == "nf4+float32"
    hf = open_base(reference.model, tokenizer=reference.tokenizer, device="cpu", batch_size=3)
    theirs = [likelihoods(tiny.evaluate(hf, [tiny.choice_task()]))]
    assert adapted._runtime is not None
    with reference.applied(adapted._runtime.experts[0].z):
        theirs.append(likelihoods(tiny.evaluate(hf, [tiny.choice_task()])))
    assert all(math.isfinite(value) for values in ours for value in values)
    for own, other in zip(ours, theirs, strict=True):
        assert own == pytest.approx(other, abs=2e-3)
    assert ours[0] != pytest.approx(ours[1], abs=0.1)


def test_an_expert_of_the_float_model_needs_strict_transfer_and_then_a_search_runs(
    folder: Path, tmp_path: Path
) -> None:
    path = tiny.save_expert(tmp_path / "float.safetensors", tiny.engine_of(folder), 1, domain="math")
    with pytest.raises(ExpertMismatchError, match="names and ranks agree, so transfer=strict applies it all the same"):
        make(folder, adapt="expert", experts=str(path))
    search = {"adapt": "cem", "population": 3, "generations": 1, "shots": 4, "transfer": "strict"}
    lm = make(folder, experts=str(path), **search)
    tiny.evaluate(lm, [tiny.choice_task()], limit=3)
    assert lm.records[0].held_out is not None
    assert lm.records[0].history[0].evaluations > 0


def test_eight_bits_load_without_a_line_per_layer(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lm = T2LM.create_from_arg_obj(
        {"pretrained": str(folder), "load_in_8bit": True, "dtype": "float32"}, {"device": "cpu", "batch_size": 3}
    )
    values = likelihoods(tiny.evaluate(lm, [tiny.choice_task()], limit=2))
    assert all(math.isfinite(value) for value in values)
    assert lm.records[0].dtype == "int8+float32"
    assert "MatMul8bitLt" not in capfd.readouterr().err


def test_without_bitsandbytes_the_install_command_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r'need bitsandbytes: pip install "t2-eval\[quantised\]"'):
        make(folder)
