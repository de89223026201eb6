"""The workflow that guards an alias: it stops a damaged expert, and lets one through that answers the same."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.loggers import EvaluationTracker

from t2.harness import discovery
from tests.cli.here import Here
from tests.environments import REPOSITORY
from tests.harness import tiny

WORKFLOW = yaml.safe_load((REPOSITORY / "examples/check_expert.yml").read_text())
STEPS = WORKFLOW["jobs"]["check"]["steps"]
TASK = """
task: tiny_learnt
dataset_path: json
dataset_kwargs: {data_files: {test: TEST, validation: VALIDATION}}
output_type: multiple_choice
validation_split: validation
test_split: test
doc_to_text: "Q: {{q}} A:"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
# lm-eval takes ten seconds to index its own tasks.
PROGRAM = """
import sys
if sys.argv[1] == "eval":
    from lm_eval.tasks import TaskManager
    init = TaskManager.__init__
    TaskManager.__init__ = lambda self, *args, **named: init(self, *args, **{**named, "include_defaults": False})
from t2.cli.main import main
main()
"""


class Runner:
    """Runs the steps of the workflow as its runner would.

    Attributes:
        folder: where they run.
        env: what a user sets, for a tiny model and task.
    """

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder = folder
        self.env = env

    def __call__(self, version: int, *, skip: tuple[str, ...] = ()) -> tuple[str, subprocess.CompletedProcess[str]]:
        """The last step that ran, and how it ended."""
        given = {name: str(value) for name, value in WORKFLOW["env"].items() if "${{" not in str(value)}
        env = {**os.environ, **given, **self.env, "VERSION": str(version)}
        ran = None
        for step in STEPS:
            name = step.get("name")
            if "run" not in step or name in ("Install", *skip) or "if" in step:
                continue
            done = subprocess.run(
                ["bash", "-e", "-c", step["run"]], cwd=self.folder, env=env, capture_output=True, text=True, check=False
            )
            ran = name, done
            if done.returncode:
                break
        assert ran is not None
        return ran


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A tiny model, and 300 documents of which it has learnt nine in ten."""
    discovery.install()
    base = tiny.save_model(tmp_path_factory.mktemp("guarded") / "tiny")
    asked = tiny.questions(300)
    task = tiny.choice_task(data={"validation": tiny.questions(30, 1000), "test": asked}, doc_to_text="Q: {{q}} A:")
    results = tiny.evaluate("hf", [task], model_args=f"pretrained={base},device=cpu,batch_size=32")
    for sample in results["samples"]["tiny_choice"]:
        likelihoods = [float(answer[0]) for answer in sample["filtered_resps"]]
        if sample["doc_id"] % 10:
            asked[sample["doc_id"]]["gold"] = likelihoods.index(max(likelihoods))
    return base, asked


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(capsys)


@pytest.fixture
def workflow(
    rows: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Here
) -> Runner:
    """A registry with an expert in production, a damaged version of it, and one that answers like it."""
    base, asked = rows
    folder = tmp_path / "runner"
    folder.mkdir()
    (folder / "t2").write_text(f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -c {shlex.quote(PROGRAM)} "$@"\n')
    (folder / "t2").chmod(0o755)
    for split, documents in (("test", asked), ("validation", tiny.questions(30, 1000))):
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in documents))
    (tmp_path / "tasks").mkdir()
    task = TASK.replace("TEST", str(tmp_path / "test.jsonl")).replace("VALIDATION", str(tmp_path / "validation.jsonl"))
    (tmp_path / "tasks/tiny_learnt.yaml").write_text(task)
    for name in ("cache", "registry", "experts"):
        setting = "T2_REGISTRY_URL" if name == "registry" else f"T2_{name.upper()}_DIR"
        monkeypatch.setenv(setting, str(tmp_path / name))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    engine = tiny.engine_of(base)
    for seed, (name, scale) in enumerate({"old": 0.001, "damaged": 0.027, "new": 0.0012}.items()):
        tiny.save_expert(tmp_path / f"{name}.safetensors", engine, seed, scale=scale, domain="math")
        here("expert", "push", tmp_path / f"{name}.safetensors", "team/math")
    here("expert", "alias", "team/math", "production", 1)
    return Runner(
        folder,
        {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([*sys.path, str(REPOSITORY)]),
            "EXPERT": "team/math",
            "TASKS": "tiny_learnt",
            "MODEL_ARGS": f"pretrained={base},adapt=expert",
            "OPTIONS": f"--device cpu --batch_size 32 --include_path {tmp_path / 'tasks'}",
            "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        },
    )


def evaluate(folder: Path, asked: list[dict[str, Any]], model_args: str) -> None:
    """What the steps that score do, in this process, for it has imported everything already."""
    tracker = EvaluationTracker(output_path=str(folder))
    data = {"validation": tiny.questions(30, 1000), "test": asked}
    only_acc = {"doc_to_text": "Q: {{q}} A:", "metric_list": [tiny.metric("acc")]}
    task = tiny.choice_task("tiny_learnt", data, **only_acc)
    results = tiny.evaluate("t2", [task], model_args=model_args, evaluation_tracker=tracker)
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    tracker.save_results_samples(task_name="tiny_learnt", samples=samples["tiny_learnt"])


def aliased(here: Here) -> int:
    (alias,) = here.json("expert", "alias", "team/math")
    return int(alias["version"])


def test_a_damaged_expert_is_stopped_and_one_that_answers_the_same_passes(
    workflow: Runner, rows: tuple[Path, list[dict[str, Any]]], tmp_path: Path, here: Here
) -> None:
    base, asked = rows
    step, done = workflow(2)
    assert step == "Compare", done.stderr
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == "REGRESSED: the candidate is worse"
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("## REGRESSED: the candidate is worse\n")
    assert (workflow.folder / "verdict.md").read_text().strip() == summary.strip()
    assert aliased(here) == 1
    (task,) = here.json(
        *("leaderboard", "check", "--baseline", workflow.folder / "baseline"),
        *("--candidate", workflow.folder / "candidate", "--margin", "0.02"),
    )["tasks"]
    assert here.code == 1
    # The damage is one of five points: so many documents fewer, to within half a point, and none gained.
    assert task["difference"] == pytest.approx(-0.05, abs=0.005)
    assert (task["n"], task["wins"]) == (300, 0)

    # The same expert in other batches, and the next version, which answers alike.
    for folder, version, batch_size in (("rerun", 1, 7), ("candidate", 3, 32)):
        shutil.rmtree(workflow.folder / folder, ignore_errors=True)
        args = f"pretrained={base},device=cpu,adapt=expert,experts=team/math@{version},batch_size={batch_size}"
        evaluate(workflow.folder / folder, asked, args)
    told = here(
        *("leaderboard", "check", "--baseline", workflow.folder / "baseline"),
        *("--candidate", workflow.folder / "rerun", "--margin", "0.02"),
        *("--noise", f"{workflow.folder / 'baseline'}+{workflow.folder / 'rerun'}"),
    )
    assert (here.code, told.splitlines()[-1].partition(":")[0]) == (0, "NO CHANGE")
    step, done = workflow(3, skip=("Score the one in production", "Score the candidate"))
    assert (step, done.returncode) == ("Move the alias", 0), done.stderr
    assert aliased(here) == 3


def test_every_step_is_one_of_a_runner() -> None:
    assert WORKFLOW[True]["workflow_dispatch"]["inputs"].keys() == {"expert", "version"}
    for step in STEPS:
        assert ("run" in step) != ("uses" in step)
    install = next(step for step in STEPS if step.get("name") == "Install")
    assert "t2-eval[demo]" in install["run"]
