"""Results are done again from what they say of themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from t2.adapters.engine.transformers import TransformersEngine
from t2.core.errors import ArgumentError, DataError
from t2.harness.compare.running import run
from t2.harness.evaluating import RunForm, evaluate_tasks, write_results
from t2.harness.model import T2LM
from t2.harness.rerun import find_results, read_stored, rerun
from tests.harness import tiny
from tests.harness.compare.grids import TASKS, request


def test_twenty_of_twenty_results_give_the_same_samples(
    tiny_folder: Path, tiny_engine: TransformersEngine, experts: str, tmp_path: Path
) -> None:
    run(request(tiny_folder, "base,best,prompt,cem", seeds="0,1"), tmp_path / "grid")
    stored = [read_stored(path) for path in find_results([tmp_path / "grid"])]
    assert len(stored) >= 20
    again = list(rerun(stored, lambda name: TASKS[name]()))
    assert [one.same for one in again] == [True] * len(stored)
    assert {one.of for one in again} == {12}

    changed = next(one for one in stored if one.tasks == ("tiny_text",))
    file = changed.samples["tiny_text"]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[4]["resps"] = [["something else"]]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (differing,) = rerun([changed], lambda name: TASKS[name]())
    assert (differing.same, differing.differing) == (False, 1)

    # An expert that is no longer what it was is told before anything is scored.
    tiny.save_expert(tmp_path / "experts" / "beta.safetensors", tiny_engine, 77, domain="code")
    with pytest.raises(ArgumentError, match="cannot be repeated: its experts was"):
        list(rerun([one for one in stored if one.model_args["adapt"] == "cem"], lambda name: TASKS[name]()))


def test_several_tasks_with_other_flags_are_one_run_again(tiny_folder: Path, experts: str, tmp_path: Path) -> None:
    args = {"pretrained": str(tiny_folder), "adapt": "mix", "experts": experts}
    form = RunForm(
        device="cpu",
        batch_size=2,
        limit=7,
        num_fewshot=1,
        apply_chat_template=True,
        system_instruction="Be brief.",
        gen_kwargs={"max_gen_toks": 5},
        seed=(1, 2, 3, 4),
    )
    lm = T2LM.create_from_arg_obj(args, form.base_args())
    write_results(*evaluate_tasks(lm, [task() for task in TASKS.values()], form, args), tmp_path)
    (path,) = find_results([tmp_path])
    stored = read_stored(path)
    assert [(one.task, one.of, one.same) for one in rerun([stored], lambda name: TASKS[name]())] == [
        ("tiny_choice", 7, True),
        ("tiny_text", 7, True),
    ]


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="is no file of results"):
        find_results([tmp_path])
    (tmp_path / "results_1.json").write_text('{"config": {"model": "hf"}}')
    with pytest.raises(DataError, match="does not hold results of lm_eval"):
        read_stored(tmp_path / "results_1.json")
    content = {"config": {"model": "t2", "model_args": "", "t2": {}}, "n-samples": {"x": {"original": 3}}}
    (tmp_path / "results_1.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="has no samples beside it"):
        read_stored(tmp_path / "results_1.json")
