"""``shots``: training on the few documents that a search sees, and on nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM

from t2.core.digests import doc_hash
from t2.core.errors import ArgumentError, TaskError, TrainingError
from t2.core.manifest import Manifest, unpack_hashes
from t2.harness.compare.running import run as run_grid
from t2.harness.overlap import marks_of
from t2.harness.pool import find_pool
from t2.training.api import TrainResult, task_docs, train
from t2.training.config import make_config
from t2.training.split import draw_shots
from tests.harness import tiny
from tests.harness.compare.grids import request

CARVED = {"test": tiny.questions(60)}
FAST: dict[str, Any] = {"method": "ia3", "objective": "next-token", "steps": 4, "learning_rate": 0.05, "clip": 1.0}


def run(lm: HFLM, task: Task, shots: int | None = 5, name: str = "few", **values: Any) -> TrainResult:
    given = {key: values.pop(key) for key in ("continue_", "folder") if key in values}
    config = make_config(task=str(task.task_name), name=name, shots=shots, **{**FAST, **values})
    return train(config, lm=lm, task=task, progress=False, **given)


def trained_docs(result: TrainResult) -> set[str]:
    manifest = Manifest.model_validate_json((result.path.parent / "training.json").read_bytes())
    return set(unpack_hashes(manifest.training_docs))


@pytest.mark.parametrize("data", [tiny.splits(), CARVED], ids=["validation", "carved"])
def test_the_documents_are_those_of_a_search_and_the_adapter_stands_beside_it(
    data: Mapping[str, Any], tiny_lm: HFLM, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
    tiny.save_expert(tmp_path / "one.safetensors", tiny.engine_of(tiny_folder), 0)
    task = tiny.choice_task(data=data)
    result = run(tiny_lm, task, seed=3)
    asked = request(
        tiny_folder,
        "base,cem",
        tasks={"tiny_choice": partial(tiny.choice_task, data=data)},
        controls="none",
        seeds="3",
        experts=str(tmp_path / "one.safetensors"),
        search={"population": 4, "generations": 1, "shots": 5},
        adapters=[result.path.parent],
    )
    cells = {cell.method: done for cell, done in run_grid(asked, tmp_path / "grid").cells}
    record = cells["cem"].record
    halves = draw_shots(task_docs(make_config(task="t", name="n", shots=5), task, tiny_lm), 5, 3)
    assert tuple(halves.train_hashes) == record.adaptation_docs
    assert halves.validation == []
    assert trained_docs(result) == marks_of(task, halves.train) >= set(record.adaptation_docs)
    # None of them is scored.
    assert cells["peft few"].record.overlap == ()
    assert cells["peft few"].samples_sha256 != cells["base"].samples_sha256
    assert {point.split for point in result.curve} == {"train"}
    assert len(result.curve) == FAST["steps"]
    scores = json.loads((result.path.parent / "scores.json").read_bytes())
    assert {name: scores[name] for name in scores if name != "seconds"} == {
        "best_step": 4,
        "steps": 4,
        "train_docs": 5,
        "validation_docs": 0,
    }


def test_poisoned_test_labels_change_no_byte(tiny_lm: HFLM, tmp_path: Path) -> None:
    pool = {doc_hash(doc) for doc in find_pool(tiny.choice_task(data=CARVED)).docs}
    poisoned = {
        "test": [row if doc_hash(row) in pool else {**row, "gold": (row["gold"] + 1) % 4} for row in CARVED["test"]]
    }
    for method in ("ia3", "lora", "svf"):
        clean, spoilt = (
            run(tiny_lm, tiny.choice_task(data=data), folder=tmp_path / method / name, method=method, steps=2)
            for name, data in (("clean", CARVED), ("spoilt", poisoned))
        )
        assert clean.digest == spoilt.digest
    labels = {"test": [{**row, "gold": (row["gold"] + 1) % 4} for row in CARVED["test"]]}
    assert run(tiny_lm, tiny.choice_task(data=labels), name="others", method="svf", steps=2).digest != clean.digest


def test_all_steps_are_made_and_more_go_on_from_the_last(tiny_lm: HFLM, tmp_path: Path) -> None:
    task = tiny.choice_task()
    values: dict[str, Any] = {"schedule": "constant", "objective": "auto"}
    first = run(tiny_lm, task, steps=4, **values)
    further = run(tiny_lm, task, steps=8, continue_=True, **values)
    at_once = run(tiny_lm, task, steps=8, folder=tmp_path / "at once", **values)
    assert [point.step for point in further.curve] == list(range(8))
    assert further.digest == at_once.digest != first.digest
    with pytest.raises(ArgumentError, match="shots was 5 and is 6"):
        run(tiny_lm, task, shots=6, steps=9, continue_=True, **values)
    with pytest.raises(ArgumentError, match="shots was 5 and is None"):
        run(tiny_lm, task, shots=None, steps=9, continue_=True, **values)


def test_what_cannot_be_trained_on_is_told(tiny_lm: HFLM) -> None:
    with pytest.raises(TaskError, match="shots=31 exceeds the 30 labelled docs of its adaptation pool"):
        run(tiny_lm, tiny.choice_task(), shots=31)
    always = tiny.text_task(process_results=lambda doc, results: {"vowel": 1.0})
    with pytest.raises(TrainingError, match="earned the same reward, so 4 steps moved nothing; use another --seed"):
        run(tiny_lm, always, method="svf", objective="auto")


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"validate_every": 2}, "validate_every has no effect with shots"),
        ({"patience": 0}, "patience has no effect with shots"),
        ({"train_docs": 4}, "train_docs has no effect with shots"),
        ({"kl": "0,0.1"}, "several values of kl are chosen among by validation"),
        ({"kind": "classifier"}, "leave shots out"),
        ({"shots": 0}, "greater than or equal to 1"),
    ],
)
def test_options_of_validation_are_refused(values: dict[str, Any], why: str) -> None:
    with pytest.raises(ArgumentError, match=why):
        make_config(task="t", name="n", **{"shots": 5, **values})
