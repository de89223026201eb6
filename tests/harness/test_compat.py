from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import pytest

from t2.core.errors import ArgumentError, DependencyError
from t2.harness import compat
from t2.harness.compat import Evaluation
from t2.harness.model import T2LM
from t2.harness.tasks import PromptForm
from tests.harness import tiny


def test_watching_twice_wraps_once_and_leaves_other_models_alone(tiny_folder: Path) -> None:
    compat.watch()
    once = lm_eval.evaluator.evaluate
    compat.watch()
    assert lm_eval.evaluator.evaluate is once
    results = tiny.evaluate("hf", [tiny.choice_task()], model_args=f"pretrained={tiny_folder},device=cpu")
    assert len(results["samples"]["tiny_choice"]) == 12
    assert "t2" not in results["config"]


@pytest.mark.parametrize("version", ["0.4.12", "0.5.0", "1.0.0"])
def test_other_versions_of_lm_eval_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(DependencyError, match=f"lm-eval {version} is not supported by this t2; run: pip install"):
        compat.check_version()


def test_evaluate_called_directly_is_seen_too(tiny_folder: Path, experts: str) -> None:
    lm = T2LM(pretrained=str(tiny_folder), device="cpu", adapt="expert", experts="alpha")
    task = tiny.choice_task()
    results: Any = lm_eval.evaluator.evaluate(lm=lm, task_dict={"tiny_choice": task}, bootstrap_iters=0)
    assert [record.task for record in lm.records] == ["tiny_choice"]
    assert "tiny_choice" in results["results"]


def test_a_program_that_bound_evaluate_before_can_say_what_runs(tiny_folder: Path, experts: str) -> None:
    lm = T2LM(pretrained=str(tiny_folder), device="cpu", adapt="mix", experts="alpha+beta")
    bound = lm_eval.evaluator.evaluate.__wrapped__
    task = tiny.choice_task()
    with pytest.raises(ArgumentError, match="was not told which tasks"):
        bound(lm=lm, task_dict={"tasks": {"tiny_choice": task}}, bootstrap_iters=0)
    task = tiny.choice_task()
    with lm.evaluation(Evaluation({"tiny_choice": task}, {}, PromptForm())):
        bound(lm=lm, task_dict={"tasks": {"tiny_choice": task}}, bootstrap_iters=0)
    assert lm.records[0].mixtures[0].alpha == {"alpha": 0.5, "beta": 0.5}


YAML = """
task: tiny_line
custom_dataset: !function data.load
output_type: multiple_choice
validation_split: validation
test_split: test
doc_to_text: "Q: {{q}} A:"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
DATA = """
import datasets
def load(**_):
    rows = lambda a, b: [{"q": f"{i}", "choices": ["ab", "cd"], "gold": i % 2} for i in range(a, b)]
    return {"test": datasets.Dataset.from_list(rows(0, 6)), "validation": datasets.Dataset.from_list(rows(50, 70))}
"""
PROGRAM = """
import sys
from lm_eval.models import *
from lm_eval.api.registry import model_registry
from t2.harness import discovery
discovery.install()
from lm_eval.__main__ import cli_evaluate
sys.argv = ["lm_eval", *sys.argv[1:]]
cli_evaluate()
"""


def run_lm_eval(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks" / "tiny_line.yaml").write_text(YAML)
    (folder / "tasks" / "data.py").write_text(DATA)
    command = [sys.executable, "-c", PROGRAM, "--tasks", "tiny_line", "--include_path", str(folder / "tasks"), *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def test_the_command_line_prints_the_summary_under_lm_evals_table(
    tiny_folder: Path, experts: str, tmp_path: Path
) -> None:
    args = f"pretrained={tiny_folder},adapt=cem,light=true,population=3,generations=2"
    done = run_lm_eval(tmp_path, "--model", "t2", "--model_args", args, "--output_path", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    table, summary = done.stdout.index("Tasks"), done.stdout.index("t2: what was adapted")
    assert table < summary
    assert "record: " in done.stdout[summary:]
    assert "searching mixtures of 3 experts on 3 adaptation docs" in done.stderr
    written = next((tmp_path / "out").rglob("results_*.json")).read_text()
    assert '"adaptation_docs"' in written


def test_the_command_line_ends_with_one_line_and_status_2(tiny_folder: Path, experts: str, tmp_path: Path) -> None:
    args = f"pretrained={tiny_folder},adapt=cem,light=true,shots=50"
    done = run_lm_eval(tmp_path, "--model", "t2", "--model_args", args)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("t2: error: task tiny_line: shots=50 exceeds the 20 labelled docs")
