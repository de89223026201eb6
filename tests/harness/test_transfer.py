"""``transfer=resample``: experts of a model of another depth and width act, by every way to use experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from t2.adapters.engine.transformers import TransformersEngine
from t2.api import mix
from t2.core.errors import ArgumentError, ExpertMismatchError
from t2.core.record import ExpertRef
from t2.harness.args import parse_args
from t2.harness.experts import prepare_experts, read_experts
from t2.harness.model import T2LM
from tests.harness import tiny

SEARCH = {"adapt": "cem", "population": 4, "generations": 1, "shots": 4}


@pytest.fixture(scope="module")
def deeper(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    """A model twice as deep and half as wide again."""
    return tiny.engine_of(tiny.save_model(tmp_path_factory.mktemp("deeper") / "deeper", seed=5, layers=4, hidden=48))


@pytest.fixture
def foreign(deeper: TransformersEngine, tmp_path: Path) -> list[str]:
    """Two experts of it."""
    return [
        str(tiny.save_expert(tmp_path / f"{name}.safetensors", deeper, seed, domain=name))
        for seed, name in enumerate(("code", "law"))
    ]


def make(folder: Path, **args: Any) -> T2LM:
    return T2LM.create_from_arg_obj(
        {"pretrained": str(folder), "transfer": "resample", **args}, {"device": "cpu", "batch_size": 4}
    )


def test_shapes_that_agree_give_what_strict_gives(tmp_path: Path, tiny_engine: TransformersEngine) -> None:
    foreign = tiny_engine.base.model_copy(update={"fingerprint": "f" * 64, "id": "other"})
    read = read_experts([str(tiny.save_expert(tmp_path / "x.safetensors", tiny_engine, 1, base=foreign))])
    strict, taken = (
        prepare_experts(
            parse_args({"adapt": "expert", "transfer": transfer}), read, tiny_engine.base, tiny_engine.ranks()
        )[0]
        for transfer in ("strict", "resample")
    )
    assert strict.z.keys() == taken.z.keys()
    assert all(torch.equal(strict.z[name], taken.z[name]) for name in strict.z)


def test_a_model_of_another_depth_and_width_lends_its_experts(
    foreign: list[str], experts: str, deeper: TransformersEngine, tiny_folder: Path
) -> None:
    with pytest.raises(ExpertMismatchError, match="or use transfer=resample"):
        make(tiny_folder, adapt="expert", experts=foreign[0], transfer="none")
    base = tiny.evaluate(make(tiny_folder, transfer="none"), [tiny.choice_task()])
    applied = tiny.evaluate(make(tiny_folder, adapt="expert", experts=foreign[0]), [tiny.choice_task()])
    assert tiny.answers(applied, "tiny_choice") != tiny.answers(base, "tiny_choice")
    record = applied["config"]["t2"]["records"][0]
    told = record["experts"][0]["transferred"]
    assert record["settings"]["transfer"] == "resample"
    assert told["base"]["id"] == "deeper"
    assert (told["matrices"], told["left_out"]) == (len(deeper.ranks()) // 2, [])


@pytest.mark.parametrize("how", [{"adapt": "mix"}, {"adapt": "prompt"}, SEARCH, {**SEARCH, "control": "shuffle"}])
def test_experts_of_both_models_are_used_together(
    how: dict[str, Any], foreign: list[str], experts: str, tiny_folder: Path
) -> None:
    lm = make(tiny_folder, experts=f"alpha+{foreign[1]}", **how)
    tiny.evaluate(lm, [tiny.choice_task()])
    (record,) = lm.records
    assert [ref.transferred is not None for ref in record.experts] == [False, True]
    assert sum(used.requests for used in record.mixtures) == 48


def test_a_mixture_of_both_needs_the_model_it_is_for(foreign: list[str], experts: str) -> None:
    with pytest.raises(ArgumentError, match="transfer=resample needs the matrices of the base model; give the model"):
        mix("both", ["alpha", foreign[0]], transfer="resample")


def test_what_says_nothing_of_a_transfer_keeps_its_content() -> None:
    assert ExpertRef(name="a", digest="d").content == {"name": "a", "digest": "d", "domain": None}
