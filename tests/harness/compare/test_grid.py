"""A grid leaves what single runs of lm-eval would, shares what is equal, and goes on where it was."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM

from t2.adapters.engine.transformers import TransformersEngine
from t2.core.digests import doc_hash
from t2.core.errors import ArgumentError, T2Error
from t2.harness.compare.folder import Result
from t2.harness.compare.methods import Cell
from t2.harness.compare.plan import check
from t2.harness.compare.running import run
from t2.harness.model import T2LM
from t2.harness.pool import find_pool
from tests.harness import tiny
from tests.harness.compare.grids import SMALL, request

ROOT = Path(__file__).parents[3]
LABELS = ("code", "math", "others", "reasoning")


def names(found: Sequence[tuple[Cell, Result]]) -> list[str]:
    return [cell.name for cell, _ in found]


def digests(found: Sequence[tuple[Cell, Result]]) -> list[str]:
    return [result.samples_sha256 for _, result in found]


def test_each_cell_is_what_lm_eval_gives_for_its_model_args(
    tiny_folder: Path, experts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    ask = HFLM.loglikelihood

    def counting(self: HFLM, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        asked.append(len(requests))
        return ask(self, requests, *args, **kwargs)

    monkeypatch.setattr(HFLM, "loglikelihood", counting)
    only = {"tiny_choice": tiny.choice_task}
    found = run(request(tiny_folder, tasks=only), tmp_path / "grid").cells
    assert len(found) == 1 + 2 * 7
    cells = {cell.name: result for cell, result in found}
    # The best expert and its control have answered before, so nobody is asked again.
    assert cells["tiny_choice/best.0"].reused == cells["tiny_choice/best.0"].requests == 48
    assert sum(asked) == sum(result.requests - result.reused for _, result in found)
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "another"))
    for cell, result in found:
        lm = T2LM.create_from_arg_obj(cell.args, {"device": "cpu", "batch_size": 3})
        plain = tiny.evaluate(lm, [tiny.choice_task()])["samples"]["tiny_choice"]
        lines = (tmp_path / "grid" / "cells" / cell.name / result.samples).read_text().splitlines()
        for own, sample in zip(map(json.loads, lines), plain, strict=True):
            assert own["resps"] == [[[str(ll), str(greedy)]] for [(ll, greedy)] in sample["resps"]]
            assert [own[key] for key in ("doc_hash", "prompt_hash", "acc", "acc_norm")] == [
                sample[key] for key in ("doc_hash", "prompt_hash", "acc", "acc_norm")
            ]
        assert lm.records[0].digest() == result.record_digest
        assert lm.identity()["digest"] == result.identity


def test_a_killed_grid_goes_on_and_other_settings_are_refused(
    tiny_folder: Path, experts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "tests.harness.compare.grids", str(tiny_folder), str(tmp_path / "grid"), "4"]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    told: list[str] = []
    found = run(request(tiny_folder, SMALL), tmp_path / "grid", told.append).cells
    assert told[0] == "10 cells on tiny_choice (12 docs), tiny_text (12 docs), of which 3 are found again"
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "another"))
    whole = run(request(tiny_folder, SMALL), tmp_path / "whole").cells
    assert names(found) == names(whole)
    assert digests(found) == digests(whole)

    # A damaged cell is done again, and more of a grid may be asked for.
    first = tmp_path / "grid" / "cells" / names(found)[3]
    (first / found[3][1].samples).write_text("")
    told.clear()
    more = run(request(tiny_folder, SMALL, seeds="0,1"), tmp_path / "grid", told.append).cells
    again = {cell.name: result.samples_sha256 for cell, result in more}
    assert [again[name] for name in names(found)] == digests(found)
    assert "of which 9 are found again" in told[0]
    for changed, why in (
        ({"form": {"limit": 5}}, "limit was null and is 5"),
        ({"shots": 5}, "model_args was"),
        ({"experts": "alpha+beta"}, "experts was"),
    ):
        with pytest.raises(ArgumentError, match="holds a comparison of other settings") as refused:
            run(request(tiny_folder, SMALL, **changed), tmp_path / "grid")
        assert why in str(refused.value)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "note.txt").write_text("mine")
    with pytest.raises(ArgumentError, match="is not empty and holds no comparison"):
        run(request(tiny_folder, SMALL), tmp_path / "notes")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"methods": "base,cen"}, "--methods: cen is not a method; did you mean 'cem'?"),
        ({"methods": "mix,mix"}, "--methods names mix twice"),
        ({"methods": "cem(shots=3"}, "brackets do not match"),
        ({"methods": "cem(shots)"}, "'shots' is not of the form key=value"),
        ({"methods": "cem(adapt_seed=1)"}, "adapt_seed is set by --seeds"),
        ({"methods": "base(shots=3)"}, "the base takes no arguments"),
        ({"methods": "mix(shots=3),cem"}, "shots=3 has no effect with adapt=mix"),
        ({"methods": "base,mix"}, "--model-args: shots has no effect with these methods"),
        ({"adapt": "cem"}, "--model-args: adapt is set by --methods"),
        ({"dtyp": "float32"}, "dtyp does not exist; did you mean 'dtype'?"),
        ({"controls": "none,shufle"}, "--controls: shufle is not a control; did you mean 'shuffle'?"),
        ({"seeds": "0,0"}, "must be different numbers"),
        ({"seeds": "one"}, "must be whole numbers"),
        ({"experts": "alpa"}, "alpa"),
        ({"experts": "names"}, "names no expert beside the classifier"),
    ],
)
def test_a_bad_grid_is_refused_before_the_model_is_loaded(
    changed: dict[str, Any], why: str, tiny_engine: TransformersEngine, experts: str, tmp_path: Path
) -> None:
    tiny.save_expert(tmp_path / "experts" / "names.safetensors", tiny_engine, 9, kind="classifier", labels=LABELS)
    with pytest.raises(T2Error) as refused:
        run(request(Path("/nowhere"), **changed), tmp_path / "grid")
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "grid" / "grid.json").exists()


def test_experts_and_classifier_that_are_found_for_the_base_need_no_names(tmp_path: Path) -> None:
    asked = request(tmp_path, "expert,mix,best,prompt,classifier,cem,auto", experts=None)
    assert check(asked).taking is None


def test_poisoned_test_labels_change_no_mixture_of_any_strategy(
    tiny_folder: Path, tiny_engine: TransformersEngine, experts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_expert(
        tmp_path / "experts" / "names.safetensors", tiny_engine, 9, scale=1.0, kind="classifier", labels=LABELS
    )
    clean = {"test": tiny.questions(60)}
    pool = {doc_hash(doc) for doc in find_pool(tiny.choice_task(data=clean)).docs}
    poisoned = {
        "test": [row if doc_hash(row) in pool else {**row, "gold": (row["gold"] + 1) % 4} for row in clean["test"]]
    }
    mixtures, scores = [], []
    for number, data in enumerate((clean, poisoned)):
        monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / f"cache{number}"))
        asked = request(
            tiny_folder,
            "base,expert,mix,best,prompt,classifier,cem,auto",
            tasks={"tiny_choice": partial(tiny.choice_task, data=data)},
            experts="alpha+beta+gamma+names",
        )
        found = run(asked, tmp_path / f"grid{number}").cells
        mixtures.append([(cell.name, result.record.mixtures, result.record.adaptation_docs) for cell, result in found])
        scores.append([result.samples_sha256 for _, result in found])
    assert len(mixtures[0]) == 1 + 2 * 9
    assert mixtures[0] == mixtures[1]
    assert not set(scores[0]) & set(scores[1])
