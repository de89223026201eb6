"""Training on a base that is quantised in memory."""

from __future__ import annotations

from pathlib import Path

from t2.core.expertfile import read_expert
from t2.training.api import train
from t2.training.config import make_config
from tests.harness import tiny


def test_an_expert_is_trained_on_a_four_bit_base(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "tiny", hidden=64)
    task = tiny.choice_task(data={"training": tiny.questions(60), "test": tiny.questions(12, 500)})
    bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = make_config(
        task="tiny_choice",
        name="four",
        model_args={"pretrained": str(folder), "device": "cpu", "dtype": "float32", **bits},
        steps=4,
        batch=16,
        learning_rate=0.05,
        clip=1.0,
        validate_every=1,
        select="reward",
    )
    result = train(config, folder=tmp_path / "experts", task=task, progress=False)
    norms = [point.gradient_norm for point in result.curve if point.gradient_norm is not None]
    assert len(norms) == 4
    assert min(norms) > 0
    manifest = read_expert(result.path).manifest
    assert manifest.base.fingerprint != tiny.engine_of(folder).base.fingerprint
