"""``t2 expert mix --record``: what an adaptation found, kept as an expert and published with its parents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2.api import Model, load_model
from t2.core.expertfile import read_expert
from t2.harness import store
from tests.cli.here import Here
from tests.harness import tiny

EXAMPLES = [(f"{i} of", ["abc", "bcd", "hgf"], i % 3) for i in range(6)]
SEARCH: dict[str, Any] = {"population": 4, "generations": 2}


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(tiny.save_model(tmp_path_factory.mktemp("models") / "tiny"), device="cpu")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Model, here: Here) -> Path:
    """A registry that alone has the experts; one's own folder is empty."""
    monkeypatch.setenv("T2_REGISTRY_URL", str(tmp_path / "registry"))
    monkeypatch.setenv("T2_EXPERTS_DIR", str(tmp_path / "experts"))
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))
    for seed, domain in enumerate(("math", "code")):
        file = tiny.save_expert(tmp_path / "files" / f"{domain}.safetensors", model.engine, seed, domain=domain)
        here("expert", "push", file, f"team/{domain}")
    return tmp_path


@pytest.mark.parametrize("options", [{}, {"per": "layer", "space": "delta"}, {"control": "shuffle"}, {"rank": 5}])
def test_the_mixture_of_a_record_is_the_one_that_answered(
    options: dict[str, Any], model: Model, home: Path, here: Here
) -> None:
    adapted = model.adapt(examples=EXAMPLES, experts="team/math+team/code@1", **SEARCH, **options)
    assert [ref.reference for ref in adapted.record.experts] == ["team/math@1", "team/code@1"]
    adapted.write_record(home / "record.json")
    saved = read_expert(adapted.save("saved").path)
    here("expert", "mix", "--record", home / "record.json", "--name", "kept", "--domain", "letters")
    kept = read_expert(home / "experts" / "kept" / "expert.safetensors")
    assert saved.vectors.keys() == kept.vectors.keys()
    assert all(np.array_equal(saved.vectors[name], kept.vectors[name]) for name in saved.vectors)
    assert kept.manifest.parents == saved.manifest.parents
    assert (kept.manifest.kind, kept.manifest.method, kept.manifest.domain) == ("mixture", "cem", "letters")
    assert kept.manifest.training == saved.manifest.training
    here("expert", "push", "kept", "team/kept")
    lineage = here.json("expert", "show", "team/kept", "--lineage")["lineage"]
    assert {edge["alpha"] for edge in lineage["edges"]} == {parent.alpha for parent in kept.manifest.parents}
    assert sorted(node["references"][0] for node in lineage["nodes"]) == ["team/code@1", "team/kept@1", "team/math@1"]


def test_what_no_mixture_can_be_made_of_is_told(model: Model, home: Path, here: Here) -> None:
    record = model.adapt(examples=EXAMPLES, experts="team/math+team/code", **SEARCH).record
    (used,) = record.mixtures
    base = used.model_copy(update={"alpha": {}})
    mix = ("expert", "mix", "--name", "kept", "--record", home / "r.json")
    for records, options, line in (
        (
            [record, record.model_copy(update={"task": "other"})],
            [],
            "holds records of examples, other; name one with --task",
        ),
        ([record], ["--task", "exmples"], "did you mean 'examples'?"),
        ([record.model_copy(update={"mixtures": (used, base)})], [], "names 2 mixtures, each for some prompts"),
        ([record.model_copy(update={"mixtures": (base,)})], [], "the base model stayed on examples"),
        ([record], ["--alpha", "1+2"], "--record says what was mixed and how"),
        ([record.model_copy(update={"settings": {"rescale": "nuclear"}})], [], "give the model"),
    ):
        store.write_records(home / "r.json", records)
        assert line in here.refused(*mix, *options)
    assert "give --experts, joined by +, or --record" in here.refused("expert", "mix", "--name", "kept")
    assert "--task is for --record" in here.refused(
        "expert", "mix", "--name", "kept", "--experts", "team/math", "--task", "x"
    )
