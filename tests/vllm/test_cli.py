"""lm-eval's command line with ``engine=vllm``, vLLM's core in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.harness import tiny

TASK = """
task: vllm_letters
dataset_path: json
dataset_kwargs:
  data_files: {{validation: "{folder}/validation.jsonl", test: "{folder}/test.jsonl"}}
validation_split: validation
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{q}}}}\\nA:"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A tiny model, two experts and a task."""
    folder = tiny.save_model(tmp_path / "tiny", hidden=128)  # vLLM's kernels know heads of 32 and more
    engine = tiny.engine_of(folder)
    for seed, name in enumerate(["alpha", "beta"]):
        tiny.save_expert(tmp_path / "experts" / f"{name}.safetensors", engine, seed)
    for split, rows in tiny.splits().items():
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK.format(folder=tmp_path))
    return tmp_path


def marked(mark: str) -> list[int]:
    """The processes that have inherited a variable of the environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def test_a_run_searches_answers_and_leaves_no_process(prepared: Path) -> None:
    mark = uuid.uuid4().hex
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "T2_EXPERTS_DIR": str(prepared / "experts"),
        "T2_TEST_MARK": mark,
    }
    args = (
        f"engine=vllm,pretrained={prepared}/tiny,dtype=float32,enforce_eager=true,max_model_len=256,adapt=cem,"
        "experts=alpha+beta,shots=3,population=3,generations=2"
    )
    command = [sys.executable, "-m", "t2.cli", "eval", "--model", "t2", "--model_args", args]
    command += ["--tasks", "vllm_letters", "--include_path", str(prepared), "--limit", "4", "--batch_size", "auto"]
    done = subprocess.run(
        [*command, "--output_path", str(prepared / "out")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((prepared / "out").rglob("results*.json")).read_text())
    record = results["config"]["t2"]["records"][0]
    assert (record["strategy"], record["settings"]["engine"], record["dtype"]) == ("cem", "vllm", "float32")
    assert 0 <= results["results"]["vllm_letters"]["acc,none"] <= 1
    assert marked(mark) == []
