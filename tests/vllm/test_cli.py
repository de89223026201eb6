"""lm-eval's command line with ``engine=vllm``, vLLM's core in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
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
def prepared(tmp_path: Path, folder: Path) -> Path:
    """Two experts and a task."""
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


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not what():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_run_is_stopped_by_ctrl_c_goes_on_and_leaves_no_process(prepared: Path, folder: Path) -> None:
    mark = uuid.uuid4().hex
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "T2_CACHE_DIR": str(prepared / "cache"),
        "T2_EXPERTS_DIR": str(prepared / "experts"),
        "T2_TEST_MARK": mark,
    }
    args = (
        f"engine=vllm,pretrained={folder},dtype=float32,enforce_eager=true,max_model_len=256,adapt=cem,"
        "experts=alpha+beta,shots=3,population=6,generations=12,economy=none"
    )
    command = [sys.executable, "-m", "t2.cli", "eval", "--model", "t2", "--model_args", args]
    command += ["--tasks", "vllm_letters", "--include_path", str(prepared), "--limit", "4", "--batch_size", "auto"]
    command += ["--output_path", str(prepared / "out")]
    files = digests(folder)

    stopped = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: any((prepared / "cache" / "answers").glob("*.jsonl")), stopped)
    os.killpg(stopped.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, errors = stopped.communicate(timeout=120)
    assert stopped.returncode == 130, errors
    assert "Traceback" not in errors, errors
    told = "stopped while adapting; the base model is as it was, and the same command goes on from here"
    assert errors.splitlines()[-1] == f"t2: vllm_letters: {told}"
    assert marked(mark) == []
    assert digests(folder) == files

    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "answers of an earlier run are known and not asked for again" in done.stderr
    results = json.loads(next((prepared / "out").rglob("results*.json")).read_text())
    record = results["config"]["t2"]["records"][0]
    assert (record["strategy"], record["settings"]["engine"], record["dtype"]) == ("cem", "vllm", "float32")
    assert 0 <= results["results"]["vllm_letters"]["acc,none"] <= 1
    assert marked(mark) == []
