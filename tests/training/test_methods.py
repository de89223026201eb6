"""Adapters of PEFT, trained by the same steps as experts and scored as ``adapt=peft``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from lm_eval.models.huggingface import HFLM

from t2.core.digests import sha256_file
from t2.core.errors import ArgumentError, ExpertMismatchError
from t2.core.manifest import Manifest
from t2.harness.model import T2LM
from t2.training.api import TrainResult, build_problem, train
from t2.training.config import CheckpointingName, make_config
from t2.training.methods import build_engine, build_method
from t2.training.passes import Passes
from t2.training.split import split_docs
from tests.harness import tiny
from tests.training import planted

_CHECKPOINTING: tuple[CheckpointingName, ...] = ("off", "on")
FAST = {"steps": 8, "batch": 8, "learning_rate": 2e-2, "clip": 1.0, "validate_every": 4}
RATES = {"lora": 2e-2, "dora": 2e-2, "ia3": 5e-2}


def run(lm: HFLM, task: Any, method: str, name: str = "letters", **values: Any) -> TrainResult:
    given = {key: values.pop(key) for key in ("trackers", "folder", "checkpoint_every", "continue_") if key in values}
    config = make_config(task=str(task.task_name), name=name, method=method, **{**FAST, **values})
    return train(config, lm=lm, task=task, progress=False, **given)


def weights(lm: HFLM) -> str:
    digest = hashlib.sha256()
    for name, tensor in lm.model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("method", list(RATES))
@pytest.mark.parametrize("objective", ["expected-reward", "reinforce", "next-token"])
def test_every_method_learns_by_every_objective(method: str, objective: str, tiny_lm: HFLM) -> None:
    before = weights(tiny_lm)
    rate = RATES[method]
    result = run(tiny_lm, planted.choices(), method, objective=objective, steps=12, learning_rate=rate, batch=16)
    assert result.best_score >= result.base_score + 0.2
    assert weights(tiny_lm) == before
    assert not [name for name, _ in tiny_lm.model.named_modules() if "lora" in name or "ia3" in name]


def test_the_result_is_an_adapter_that_says_how_it_was_made(tiny_lm: HFLM, tiny_folder: Path) -> None:
    task = planted.choices()
    result = run(tiny_lm, task, "lora", targets="qv")
    folder = result.path.parent
    assert sorted(file.name for file in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
        "checkpoint.safetensors",
        "config.json",
        "curve.jsonl",
        "scores.json",
        "training.json",
    ]
    assert result.digest == sha256_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.05)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    manifest = Manifest.model_validate_json((folder / "training.json").read_bytes())
    assert manifest.training["method"] == "lora"
    assert manifest.training_docs
    # What PEFT itself makes of the folder scores what validation saw.
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    model.eval()
    ids = torch.tensor([list(range(5, 30))])
    with torch.no_grad():
        base = model(ids).logits
        adapted = peft.PeftModel.from_pretrained(model, str(folder))(ids).logits
    assert not torch.allclose(base, adapted, atol=1e-3)


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_the_gradient_is_the_loss_derivative(method: str, exact_lm: HFLM) -> None:
    """Along a random direction, against central differences of the expected reward in float64.

    DoRA's is none: by its paper (section 4.3) the norm that it divides by counts as a constant.
    """
    task = planted.choices(8)
    without: dict[str, Any] = {} if method == "ia3" else {"lora_dropout": 0.0}
    config = make_config(task="planted", name="n", method=method, **without)
    halves = split_docs(task, 0)
    engine = build_engine(exact_lm, config)
    try:
        problem = build_problem(config, engine, exact_lm, task, halves)
        made = build_method(config, engine, progress=False)
        torch.manual_seed(1)
        theta = made.parameters.initial()
        theta = theta + 0.05 * torch.randn_like(theta)
        direction = torch.randn_like(theta)
        docs = range(len(halves.train))

        def reward(at: torch.Tensor) -> tuple[float, torch.Tensor]:
            z = {name: tensor.requires_grad_() for name, tensor in made.parameters.z(at).items()}
            found = problem.accumulate(z, docs, 0)
            return found.reward, made.parameters.gradient(at, z)

        step = 1e-3
        _, gradient = reward(theta)
        numeric = (reward(theta + step * direction)[0] - reward(theta - step * direction)[0]) / (2 * step)
        assert float(-gradient @ direction) == pytest.approx(numeric, rel=2e-2, abs=1e-4)
    finally:
        engine.close()


class StoppedError(Exception):
    """What ends a training in the middle."""


def test_an_interrupted_training_ends_in_the_same_bytes(tiny_lm: HFLM, tmp_path: Path) -> None:
    task = planted.choices()
    whole = run(tiny_lm, task, "lora", folder=tmp_path / "whole", objective="reinforce", kl=0.05)
    again = run(tiny_lm, task, "lora", folder=tmp_path / "again", objective="reinforce", kl=0.05)
    assert again.digest == whole.digest
    values: dict[str, Any] = {**FAST, "objective": "reinforce", "kl": 0.05}
    config = make_config(task="planted", name="letters", method="lora", **values)
    with pytest.MonkeyPatch.context() as patch:

        def stop(self: Any, step: int, begin: Any = Passes.begin) -> None:
            if step == 6:
                raise StoppedError
            begin(self, step)

        patch.setattr(Passes, "begin", stop)
        with pytest.raises(StoppedError):
            train(config, lm=tiny_lm, task=task, progress=False, folder=tmp_path / "cut", checkpoint_every=1)
    resumed = train(config, lm=tiny_lm, task=task, progress=False, folder=tmp_path / "cut")
    assert resumed.digest == whole.digest
    assert (resumed.path.parent / "adapter_config.json").read_bytes() == (
        whole.path.parent / "adapter_config.json"
    ).read_bytes()
    # What dropout drew is part of the outcome.
    other = run(tiny_lm, task, "lora", folder=tmp_path / "plain", objective="reinforce", kl=0.05, lora_dropout=0.0)
    assert other.digest != whole.digest


def test_checkpointed_layers_draw_the_same_dropout_twice(tiny_lm: HFLM) -> None:
    task = planted.choices(8)
    config = make_config(task="planted", name="n", method="lora", lora_dropout=0.5, seed=3)
    halves = split_docs(task, 0)
    engine = build_engine(tiny_lm, config)
    try:
        made = build_method(config, engine, progress=False)
        theta = made.parameters.initial() + 0.1
        gradients = []
        for checkpointing in _CHECKPOINTING:
            problem = build_problem(config, engine, tiny_lm, task, halves, checkpointing=checkpointing)
            z = {name: tensor.requires_grad_() for name, tensor in made.parameters.z(theta).items()}
            problem.accumulate(z, range(4), 0)
            gradients.append(made.parameters.gradient(theta, z))
        assert float(gradients[0].norm()) > 0
        assert torch.equal(*gradients)
    finally:
        engine.close()


def test_a_sweep_chooses_and_a_finished_adapter_goes_on(tiny_lm: HFLM) -> None:
    task = planted.choices()
    sweep = run(tiny_lm, task, "ia3", kl="0,0.1", learning_rate=5e-2, schedule="constant", steps=4)
    folder = sweep.path.parent
    assert sweep.path.name == "adapter_model.safetensors"
    assert not list((folder / "sweep").rglob("adapter_model.safetensors"))
    with pytest.raises(ArgumentError, match="expert letters exists in"):
        run(tiny_lm, task, "lora")
    further = run(tiny_lm, task, "ia3", kl=sweep.kl, learning_rate=5e-2, schedule="constant", steps=8, continue_=True)
    assert further.curve[-1].step == 8


def test_a_generated_task_trains_an_adapter(tiny_lm: HFLM) -> None:
    result = run(tiny_lm, planted.texts(), "lora", samples=4, batch=8, learning_rate=2e-2, steps=10)
    assert result.best_score > result.base_score


def test_the_adapter_is_scored_and_what_it_was_trained_on_is_told(
    tiny_lm: HFLM, tiny_folder: Path, tmp_path: Path
) -> None:
    task = planted.choices()
    result = run(tiny_lm, task, "dora", folder=tmp_path)

    def make(folder: Path) -> T2LM:
        args = {"pretrained": str(folder), "dtype": "float32", "adapt": "peft", "peft": str(result.path.parent)}
        return T2LM.create_from_arg_obj(args, {"device": "cpu", "batch_size": 4})

    lm = make(tiny_folder)
    test = planted.rows(8, start=1000)[:4] + planted.rows(48)[:4]
    data = {"validation": planted.rows(20, start=2000), "test": test}
    results = tiny.evaluate(lm, [tiny.choice_task("planted", data)])
    assert results["results"]["planted"]["acc,none"] > 0.5
    (record,) = lm.records
    assert [(ref.name, ref.domain, ref.digest) for ref in record.experts] == [("letters", "letters", result.digest)]
    assert [(one.expert, one.scored, one.adaptation) for one in record.overlap] == [("letters", 4, 0)]
    with pytest.raises(ExpertMismatchError, match="was trained on other weights"):
        make(tiny.save_model(tmp_path / "other", seed=9))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"method": "lroa"}, "method=lroa"),
        ({"method": "lora", "kind": "classifier"}, "kind=classifier makes an expert, and method=lora an adapter"),
        ({"method": "lora", "rank": 8}, "rank has no effect with method=lora, it is for svf"),
        ({"method": "ia3", "parametrisation": "sigmoid"}, "parametrisation has no effect with method=ia3"),
        ({"method": "ia3", "lora_rank": 4}, "lora_rank has no effect with method=ia3, it is for lora and dora"),
        ({"lora_alpha": 4}, "lora_alpha has no effect with method=svf, it is for lora and dora"),
        ({"method": "lora", "lora_dropout": 1.0}, "lora_dropout=1.0"),
    ],
)
def test_options_of_another_method_are_refused(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        make_config(task="t", name="n", **values)
    assert line in str(caught.value)


def test_an_expert_of_the_projections_alone(tiny_lm: HFLM) -> None:
    config = make_config(task="planted", name="n", targets="qv")
    made = build_method(config, build_engine(tiny_lm, config), progress=False)
    assert {name.split(".")[-2] for name in made.ranks} == {"q_proj", "v_proj"}


def test_a_configuration_of_an_expert_says_nothing_of_other_methods() -> None:
    told = make_config(task="t", name="n").told()
    assert not {"method", "lora_rank", "lora_alpha", "lora_dropout"} & told.keys()
    assert make_config(task="t", name="n", method="lora").told()["lora_rank"] == 16
