"""A model's identity is equal for equal models and differs if answers may differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from t2.adapters import identity
from t2.core.errors import ArgumentError
from t2.core.record import AdaptationRecord
from t2.core.results import read_results
from t2.core.settings import cache_dir
from t2.harness.base import open_base
from t2.harness.identity import identity_of
from t2.harness.model import T2LM
from tests import results
from tests.harness import tiny

SEARCH = "adapt=cem,population=5,generations=2,shots=6"


def identity_in(folder: Path, **args: Any) -> str:
    return identity_of(open_base(str(folder), device="cpu", **args))


def varied(folder: Path, place: Path, change: Callable[[Any], object]) -> Path:
    """A copy of a model with a change outside the adapted matrices."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    change(model)
    model.save_pretrained(place)
    for path in folder.glob("*tok*"):
        shutil.copy(path, place / path.name)
    return place


def with_config(folder: Path, place: Path, **entries: Any) -> Path:
    """A copy of a model with another configuration and the same weight files."""
    shutil.copytree(folder, place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, **entries}))
    return place


def scaled(name: str) -> Callable[[Any], object]:
    return lambda model: model.get_parameter(name).data.mul_(1.5)


def test_copies_shards_and_repeated_loads_have_one_identity(tiny_folder: Path, tmp_path: Path) -> None:
    first = identity_in(tiny_folder)
    assert first == identity_in(tiny_folder)
    assert first == identity_in(shutil.copytree(tiny_folder, tmp_path / "copy"))
    sharded = tmp_path / "sharded"
    transformers.AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(sharded, max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(sharded)
    assert len([*sharded.glob("*.safetensors")]) > 1
    assert first == identity_in(sharded)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
    held = open_base(loaded, tokenizer=transformers.AutoTokenizer.from_pretrained(tiny_folder))
    assert first == identity_of(held)
    assert first == identity_in(tiny_folder, batch_size=7, logits_cache=False)


@pytest.mark.parametrize(
    "change",
    [
        scaled("lm_head.weight"),
        scaled("model.embed_tokens.weight"),
        scaled("model.norm.weight"),
        scaled("model.layers.1.input_layernorm.weight"),
        lambda model: model.get_parameter("lm_head.weight").data[3, 5].add_(1e-3),
        lambda model: setattr(model.generation_config, "max_new_tokens", 3),
        lambda model: setattr(model.config, "sliding_window", 4),
    ],
)
def test_other_weights_than_the_adapted_ones_give_another_identity(
    tiny_folder: Path, tmp_path: Path, change: Callable[[Any], object]
) -> None:
    other = varied(tiny_folder, tmp_path / "other", change)
    engines = [tiny.engine_of(folder) for folder in (tiny_folder, other)]
    assert engines[0].base.fingerprint == engines[1].base.fingerprint
    assert identity_in(other) != identity_in(tiny_folder)


@pytest.mark.parametrize(
    "entries",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
    ],
)
def test_another_configuration_gives_another_identity(
    tiny_folder: Path, tmp_path: Path, entries: dict[str, Any]
) -> None:
    assert identity_in(with_config(tiny_folder, tmp_path / "other", **entries)) != identity_in(tiny_folder)


@pytest.mark.parametrize(
    "args",
    [
        {"dtype": "bfloat16"},
        {"max_length": 100},
        {"prefix_token_id": 3},
        {"add_bos_token": True},
        {"think_end_token": "x"},
        {"enable_thinking": False},
        {"chat_template_args": {"tone": "dry"}},
        {"softmax_dtype": "float64"},
        {"mixed_precision_dtype": "bfloat16"},
        {"truncation": True},
        {"attn_implementation": "eager"},
    ],
)
def test_arguments_that_change_answers_give_another_identity(tiny_folder: Path, args: dict[str, Any]) -> None:
    assert identity_in(tiny_folder, **args) != identity_in(tiny_folder)


def test_another_tokenizer_or_chat_template_gives_another_identity(tiny_folder: Path, tmp_path: Path) -> None:
    first = identity_in(tiny_folder)
    for number, change in enumerate(
        (
            lambda tokenizer: setattr(tokenizer, "chat_template", tiny.CHAT + " "),
            lambda tokenizer: setattr(tokenizer, "model_max_length", 64),
            lambda tokenizer: tokenizer.add_tokens(["and"]),
        )
    ):
        folder = shutil.copytree(tiny_folder, tmp_path / str(number))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        change(tokenizer)
        tokenizer.save_pretrained(folder)
        assert identity_in(folder) != first
    assert identity_in(tiny_folder, tokenizer=str(tmp_path / "0")) != first


def test_padding_and_use_leave_the_identity_as_it_is(tiny_folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    before = identity.describe_tokenizer(tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert identity.describe_tokenizer(tokenizer) == before


def test_a_file_in_place_of_another_gives_another_identity(tiny_folder: Path, tmp_path: Path) -> None:
    """The new files have the same size; the cached digest must not be used for them."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    first = identity_in(folder)
    other = varied(tiny_folder, tmp_path / "other", scaled("model.norm.weight"))
    shutil.copy(other / "model.safetensors", folder / "model.safetensors")
    assert identity_in(folder) != first


def test_what_is_remembered_is_not_taken_for_weights_that_the_files_lack(tiny_folder: Path, tmp_path: Path) -> None:
    """transformers initialises them at random each time."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    state = {
        name: tensor for name, tensor in tiny.engine_of(folder).model.state_dict().items() if "lm_head" not in name
    }
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, state_dict=state)
    torch.manual_seed(1)
    first = identity_in(folder)
    torch.manual_seed(2)
    assert identity_in(folder) != first


def test_the_weights_of_known_files_are_not_read_again(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    first = identity_in(folder)
    monkeypatch.setattr("t2.harness.identity.weights_digest", lambda model: pytest.fail("read again"))
    assert identity_in(folder) == first


def test_tied_and_quantised_parameters_count(tiny_folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
    untied = identity.weights_digest(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    tied = identity.weights_digest(model)
    assert tied != untied
    model.lm_head.weight.scale = torch.ones(2)
    assert identity.weights_digest(model) != tied


@pytest.fixture
def twins(tiny_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two models that take the same experts but give other answers."""
    return tiny_folder, varied(tiny_folder, tmp_path / "twin", scaled("lm_head.weight"))


def evaluate(folder: Path, args: str, experts: str, **options: Any) -> tuple[T2LM, Any]:
    named = "" if args == "adapt=none" else f",experts={experts}"
    lm = T2LM.create_from_arg_string(f"pretrained={folder},device=cpu{named},{args}", {"batch_size": 3})
    return lm, tiny.evaluate(lm, [tiny.choice_task()], **options)


@pytest.mark.parametrize("args", [SEARCH, "adapt=best,shots=6", "adapt=prompt"])
def test_an_adaptation_of_one_model_is_not_found_again_for_another(
    twins: tuple[Path, Path], experts: str, args: str
) -> None:
    def adapt(folder: Path) -> AdaptationRecord:
        return evaluate(folder, args, experts)[0].records[0]

    first, second = map(adapt, twins)
    assert first.base.fingerprint == second.base.fingerprint
    assert first.base.identity != second.base.identity
    assert first.key != second.key
    assert second.timing.pass1 > 0
    assert adapt(twins[0]).timing.pass1 == 0


def test_searches_and_dispatches_of_two_models_share_no_answers(twins: tuple[Path, Path], experts: str) -> None:
    """A run after another model's run gives the same result as with an empty cache."""

    def found(folder: Path, args: str) -> Any:
        record = evaluate(folder, args, experts)[0].records[0]
        return record.held_out, record.history, record.mixtures, record.calibration

    for args in (SEARCH, "adapt=prompt"):
        alone = found(twins[1], args)
        for part in ("adaptations", "answers", "calibrations"):
            shutil.rmtree(cache_dir() / part, ignore_errors=True)
        found(twins[0], args)
        assert found(twins[1], args) == alone


def test_the_users_cache_is_not_shared_by_two_models(twins: tuple[Path, Path], experts: str, tmp_path: Path) -> None:
    for adapt in ("none", "mix"):
        cache = str(tmp_path / adapt)
        evaluate(twins[0], f"adapt={adapt}", experts, use_cache=cache)
        with pytest.raises(ArgumentError, match="answers of another base model"):
            evaluate(twins[1], f"adapt={adapt}", experts, use_cache=cache)


def filed(model: str, model_args: str, folder: Path) -> tuple[str, str]:
    """Return the model name in lm-eval's results file, and the file's folder."""
    written = folder / "results"
    results.evaluate(written, model, model_args)
    (file,) = written.rglob("results_*.json")
    return json.loads(file.read_text())["model_name"], file.parent.name


def test_adapted_results_are_filed_under_base_strategy_and_digest(
    tiny_folder: Path, experts: str, tmp_path: Path
) -> None:
    args = f"pretrained={tiny_folder},device=cpu,adapt=mix,experts={experts}"
    name, folder = filed("t2", args, tmp_path)
    digest = T2LM.create_from_arg_string(args).identity()["digest"]
    assert name == folder == f"{tiny_folder.name}+t2-mix-{digest[:8]}"
    (run,) = {result.run.base.id for path in [tmp_path / "results"] for result in read_results(path)}
    assert run == tiny_folder.name


def test_results_of_the_base_are_filed_as_hf_files_them(tiny_folder: Path, tmp_path: Path) -> None:
    args = f"pretrained={tiny_folder},device=cpu"
    assert filed("t2", args, tmp_path / "t2") == filed("hf", args, tmp_path / "hf")


def test_one_model_has_one_name_under_t2_and_hf(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path to its folder may be written in several ways."""
    shutil.copytree(tiny_folder, tmp_path / "models" / "llama")
    monkeypatch.chdir(tmp_path)
    for number, pretrained in enumerate(("models/llama", "./models/llama", str(tmp_path / "models" / "llama"))):
        names = set()
        for model in ("t2", "hf"):
            folder = tmp_path / f"{number}-{model}"
            results.evaluate(folder, model, f"pretrained={pretrained},device=cpu")
            names |= {result.run.base.id for result in read_results(folder)}
        assert len(names) == 1, pretrained
