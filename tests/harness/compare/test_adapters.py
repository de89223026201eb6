"""Adapters of PEFT as rows of a grid: what lm-eval gives for them, beside a base that they leave alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from t2.core.digests import doc_hash
from t2.core.errors import ArgumentError, T2Error
from t2.core.manifest import BaseModelRef, Manifest, pack_hashes
from t2.harness.args import parse_args
from t2.harness.compare.running import compare, run
from t2.harness.model import T2LM
from t2.harness.opened import open_model
from t2.harness.rerun import find_results, read_stored, rerun
from tests.harness import tiny
from tests.harness.compare.grids import TASKS, request
from tests.harness.pefts import save_adapter


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> list[Path]:
    home = tmp_path_factory.mktemp("adapters")
    return [save_adapter(home / method, tiny_folder, method) for method in ("lora", "ia3")]


def texts(value: Any) -> Any:
    """An answer as lm-eval writes it."""
    return [texts(each) for each in value] if isinstance(value, (list, tuple)) else str(value)


def test_adapters_are_rows_that_equal_lm_evals_and_leave_the_base_alone(
    tiny_folder: Path, experts: str, adapters: list[Path], tmp_path: Path
) -> None:
    asked = request(tiny_folder, "base,mix", search={}, adapters=adapters)
    report = compare(asked, tmp_path / "grid")
    plain = run(request(tiny_folder, "base,mix", search={}), tmp_path / "plain").cells
    known = {cell.name: result.samples_sha256 for cell, result in plain}
    found = run(asked, tmp_path / "grid").cells
    assert [cell.method for cell, _ in found] == [*("base", "mix", "mix", "peft lora", "peft ia3")] * 2
    for cell, result in found:
        if cell.args["adapt"] != "peft":
            # The base of the second task was asked after the adapters of the first.
            assert result.samples_sha256 == known[cell.name]
            continue
        assert (cell.control, cell.seed, result.reused) == ("none", None, 0)
        lm = T2LM.create_from_arg_obj(cell.args, {"device": "cpu", "batch_size": 3})
        samples = tiny.evaluate(lm, [TASKS[cell.task]()])["samples"][cell.task]
        lines = (tmp_path / "grid" / "cells" / cell.name / result.samples).read_text().splitlines()
        for own, sample in zip(map(json.loads, lines), samples, strict=True):
            assert texts(own["filtered_resps"]) == texts(sample["filtered_resps"])
            assert own["doc_hash"] == sample["doc_hash"]
        assert lm.identity()["digest"] == result.identity
    row = next(row for row in report.tasks[0].rows if row.method == "peft lora")
    # r·(in + out) of queries, values and down projections, in two layers.
    assert row.numbers == 2 * 4 * ((32 + 32) + (32 + 16) + (64 + 32))
    assert (row.bytes, row.coefficients, row.pass1) == (4 * row.numbers, 0, 0)
    assert row.pass2 > 0
    assert {one.name for one in report.experts} == {"alpha", "beta", "gamma", "lora", "ia3"}
    stored = [read_stored(path) for path in find_results([tmp_path / "grid"])]
    assert [one.same for one in rerun(stored, lambda name: TASKS[name]())] == [True] * 10


def test_an_adapter_may_join_later_and_another_one_in_its_folder_is_refused(
    tiny_folder: Path, adapters: list[Path], tmp_path: Path
) -> None:
    lora, ia3 = adapters
    only = {"tiny_choice": tiny.choice_task}

    def grid(*folders: Path) -> list[str]:
        asked = request(tiny_folder, "base", tasks=only, experts=None, search={}, adapters=folders)
        found = run(asked, tmp_path / "grid").cells
        return [result.samples_sha256 for _, result in found]

    mine = shutil.copytree(lora, tmp_path / "mine")
    first = grid(mine)
    assert grid(mine, ia3)[:2] == first
    config = json.loads((mine / "adapter_config.json").read_text())
    (mine / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    with pytest.raises(ArgumentError, match="peft mine of another adapter than lies in") as refused:
        grid(mine, ia3)
    assert "\n" not in str(refused.value)


def test_documents_that_it_was_trained_on_are_told(tiny_folder: Path, adapters: list[Path], tmp_path: Path) -> None:
    mine = shutil.copytree(adapters[0], tmp_path / "mine")
    base: BaseModelRef = open_model(parse_args({"pretrained": str(tiny_folder), "device": "cpu"})).base
    docs = [doc_hash(doc) for doc in tiny.choice_task().eval_docs]
    manifest = Manifest(name="mine", base=base, targets={}, training_docs=pack_hashes(docs[:5]))
    (mine / "training.json").write_text(manifest.canonical())
    only = {"tiny_choice": tiny.choice_task}
    asked = request(tiny_folder, "base", tasks=only, experts=None, search={}, adapters=[mine])
    report = compare(asked, tmp_path / "grid")
    (row,) = [row for row in report.tasks[0].rows if row.method == "peft mine"]
    assert [(one.expert, one.scored) for one in row.records[0].overlap] == [("mine", 5)]
    assert (
        "OVERLAP: peft mine: mine was trained on 5 scored and 0 adaptation documents"
        in (tmp_path / "grid" / "report.md").read_text()
    )


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"adapters": [Path("/nowhere/lora")]}, "peft=/nowhere/lora does not exist here; name a folder"),
        ({"adapters": [Path("/nowhere/a,b")]}, "has a comma in its path"),
        ({"adapters": "twice"}, "--adapters names two adapters lora; rename a folder"),
        ({"methods": "base,peft"}, "--methods: peft takes its rows from --adapters"),
        ({"peft": "lora"}, "--model-args: peft is set by --adapters"),
        ({"adapters": "one", "delta": "/nowhere"}, "delta and adapt=peft both change the base model"),
    ],
)
def test_bad_adapters_are_refused_before_the_model_is_loaded(
    changed: dict[str, Any], why: str, adapters: list[Path], tmp_path: Path
) -> None:
    given = dict(changed)
    if isinstance(given.get("adapters"), str):
        given["adapters"] = [adapters[0]] * {"one": 1, "twice": 2}[given["adapters"]]
    with pytest.raises(T2Error) as refused:
        run(request(Path("/nowhere"), **{"methods": "base", "experts": None, "search": {}, **given}), tmp_path / "grid")
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


def test_one_of_another_base_is_refused_before_anything_is_scored(tiny_folder: Path, tmp_path: Path) -> None:
    other = save_adapter(tmp_path / "other", tiny.save_model(tmp_path / "wider", hidden=48))
    with pytest.raises(T2Error, match="other does not fit tiny"):
        run(request(tiny_folder, "base", experts=None, search={}, adapters=[other]), tmp_path / "grid")
    assert not any((tmp_path / "grid").iterdir())
