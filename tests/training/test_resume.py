"""A run killed by SIGKILL and started again makes the file that an unbroken run makes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from t2.core.curve import read_curve
from t2.core.digests import sha256_file
from t2.training.checkpoint import load_checkpoint
from tests.environments import REPOSITORY
from tests.training import planted

TASKS = {
    "planted_choices": """
task: planted_choices
custom_dataset: !function data.load
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{q}}\\nA:"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "planted_texts": """
task: planted_texts
custom_dataset: !function data.load
training_split: train
test_split: test
output_type: generate_until
doc_to_text: "Q: {{q}}\\nA:"
doc_to_target: "e"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
process_results: !function data.has_vowel
metric_list: [{metric: vowel, aggregation: mean, higher_is_better: true}]
""",
}
DATA = """
import json
from pathlib import Path
import datasets

def load(**_):
    rows = json.loads((Path(__file__).parent / "rows.json").read_text())
    return {name: datasets.Dataset.from_list(found) for name, found in rows.items()}

def has_vowel(doc, results):
    return {"vowel": float(any(letter in "aeiouAEIOU" for letter in results[0]))}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "data.py").write_text(DATA)
    (folder / "rows.json").write_text(json.dumps({"train": planted.rows(40), "test": planted.rows(6, start=900)}))
    return folder


class Runs:
    """Command lines that differ in where they are killed, and where they put experts."""

    def __init__(self, task: str, tasks: Path, model: Path, output: Path, *more: str) -> None:
        self.output = output
        self.command = [
            *("train", "--task", task, "--name", "letters", "--include-path", str(tasks)),
            *("--model-args", f"pretrained={model},dtype=float32,device=cpu", "--output", str(output)),
            *("--batch", "8", "--learning-rate", "0.02", "--clip", "1", "--checkpoint-every", "2", *more),
        ]

    def whole(self, *more: str) -> subprocess.CompletedProcess[str]:
        return self._run([sys.executable, "-m", "t2.cli", *self.command, *more])

    def killed(self, place: str, step: int) -> None:
        done = self._run([sys.executable, "-m", "tests.training.killed", place, str(step), *self.command])
        assert done.returncode == -signal.SIGKILL, done.stderr

    def digest(self) -> str:
        done = self.whole()
        assert done.returncode == 0, done.stderr
        assert "digest" in done.stdout
        return sha256_file(self.output / "letters" / "expert.safetensors")

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "PYTHONPATH": path}
        )


CHOICES = ("planted_choices", "--steps", "6", "--validate-every", "3", "--kl", "0.05")
TEXTS = ("planted_texts", "--steps", "6", "--validate-every", "2", "--samples", "6", "--baseline", "rloo")


def points(folder: Path) -> list[tuple[int, str, float, float]]:
    return [(point.step, point.split, point.reward, point.score) for point in read_curve(folder / "curve.jsonl")]


def test_a_killed_run_goes_on_to_the_same_expert(tasks: Path, tiny_folder: Path, tmp_path: Path) -> None:
    unbroken = Runs(CHOICES[0], tasks, tiny_folder, tmp_path / "unbroken", *CHOICES[1:])
    expected = unbroken.digest()
    curve = points(tmp_path / "unbroken" / "letters")

    often = Runs(CHOICES[0], tasks, tiny_folder, tmp_path / "often", *CHOICES[1:])
    working = tmp_path / "often" / "letters.training"
    often.killed("in-step", 1)  # before the first checkpoint
    assert not (working / "checkpoint.safetensors").exists()
    assert points(working)[-1] == curve[1]  # readable, with the step before
    often.killed("after-checkpoint", 2)
    assert load_checkpoint(working / "checkpoint.safetensors").progress.step == 2
    often.killed("before-checkpoint", 3)
    assert load_checkpoint(working / "checkpoint.safetensors").progress.step == 2
    assert len(points(working)) > 3
    often.killed("in-checkpoint", 4)
    assert load_checkpoint(working / "checkpoint.safetensors").progress.step == 3
    other = often.whole("--seed", "7")
    assert other.returncode == 2
    assert "seed was 0 and is 7" in other.stderr
    assert often.digest() == expected
    assert points(tmp_path / "often" / "letters") == curve
    assert not working.exists()


def test_a_killed_run_over_sampled_answers_goes_on_to_the_same_expert(
    tasks: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    expected = Runs(TEXTS[0], tasks, tiny_folder, tmp_path / "unbroken", *TEXTS[1:]).digest()
    broken = Runs(TEXTS[0], tasks, tiny_folder, tmp_path / "broken", *TEXTS[1:])
    broken.killed("in-step", 3)
    assert broken.digest() == expected


def test_other_documents_do_not_go_on(tasks: Path, tiny_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tasks"
    shutil.copytree(tasks, copy)
    runs = Runs(CHOICES[0], copy, tiny_folder, tmp_path / "experts", *CHOICES[1:])
    runs.killed("after-checkpoint", 2)
    (copy / "rows.json").write_text(json.dumps({"train": planted.rows(38), "test": planted.rows(6, start=900)}))
    refused = runs.whole()
    assert refused.returncode == 2
    assert "set of documents" in refused.stderr
    truncated = tmp_path / "experts" / "letters.training" / "checkpoint.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:100])
    refused = runs.whole()
    assert refused.returncode == 2
    assert "cannot read the checkpoint" in refused.stderr
    done = runs.whole("--overwrite")
    assert done.returncode == 0, done.stderr
