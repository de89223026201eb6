"""``t2 compare`` and ``t2 rerun`` on tasks that are files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.here import Here
from tests.harness import tiny

TASK = """
task: tiny_file
dataset_path: json
dataset_kwargs:
  data_files: {test: FOLDER/test.jsonl, validation: FOLDER/validation.jsonl}
test_split: test
validation_split: validation
output_type: multiple_choice
doc_to_text: "Q: {{q}}\\nA:"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


def test_a_comparison_and_its_repetition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("T2_EXPERTS_DIR", str(tmp_path / "experts"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
    model = tiny.save_model(tmp_path / "model")
    engine = tiny.engine_of(model)
    for seed, name in enumerate(("alpha", "beta")):
        tiny.save_expert(tmp_path / "experts" / f"{name}.safetensors", engine, seed, domain=name)
    (tmp_path / "tasks").mkdir()
    for split, start in (("test", 0), ("validation", 100)):
        rows = tiny.questions(20, start)
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks" / "tiny_file.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    t2 = Here(capsys)
    grid = tmp_path / "grid"
    arguments = (
        *("compare", "--tasks", "tiny_file", "--include-path", tmp_path / "tasks", "--output", grid, "--limit", 8),
        *("--model-args", f"pretrained={model},shots=4", "--batch-size", 4, "--device", "cpu", "--seeds", "0,1"),
        *("--controls", "none,shuffle"),
    )
    assert "--methods: mixx is not a method" in t2.refused(*arguments, "--methods", "mixx")
    assert "peft=/nowhere does not exist here" in t2.refused(
        *arguments, "--methods", "base,best", "--adapters", "/nowhere"
    )
    assert not grid.exists() or not any(grid.iterdir())
    told = t2(*arguments, "--methods", "base,mix,best")
    assert "8 cells on tiny_file (8 docs)" in t2.errors
    assert "the other 7 cells take about" in t2.errors
    assert [line.split()[0] for line in told.splitlines() if line.startswith(("base", "mix", "best"))] == [
        *("base", "mix", "mix,", "best", "best,", "mix", "best")
    ]
    assert f"report: {grid / 'report.html'}" in told
    report = t2.json(*arguments, "--methods", "base,mix,best")
    assert "of which 8 are found again" in t2.errors
    assert report == json.loads((grid / "report.json").read_text())

    repeated = t2("rerun", grid, "--include-path", tmp_path / "tasks")
    assert repeated.splitlines()[-1] == "8 of 8 give the same samples, digest for digest"
    (file,) = (grid / "cells" / "tiny_file" / "base").glob("samples_*.jsonl")
    file.write_text(file.read_text().replace('"acc": 1.0', '"acc": 0.0'))
    changed = t2.json("rerun", grid / "cells" / "tiny_file" / "base", "--include-path", tmp_path / "tasks")
    assert (t2.code, [one["same"] for one in changed]) == (1, [False])
