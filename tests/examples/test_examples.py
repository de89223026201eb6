"""The examples, run as a user runs them, on the demo model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environments import REPOSITORY

EXAMPLES = sorted(path.stem for path in (REPOSITORY / "examples").glob("*.py"))


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """The output of one example."""
    done = subprocess.run(
        [sys.executable, f"examples/{request.param}.py"],
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(tmp_path), "T2_EXPERTS_DIR": str(tmp_path / "experts")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def one(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("run", [name], indirect=True)


@one("quick_start")
def test_quick_start(run: str) -> None:
    assert "experts: demo/classifier, demo/code, demo/math, demo/reasoning" in run
    found = re.search(r"accuracy on the examples: ([\d.]+) → ([\d.]+)", run)
    assert found is not None
    assert float(found[1]) <= float(found[2])
    assert "likeliest: oxygen" in run
    assert re.search(r"^written: \w", run, re.MULTILINE)
    dispatched = re.search(r"prompts by domain: (.*)", run)
    assert dispatched is not None
    assert sum(map(int, re.findall(r"\d+", dispatched[1]))) == 2
    assert len(re.findall(r"answer: .{9}", run)) == 2


@one("train_expert")
def test_train_expert(run: str) -> None:
    found = re.search(r"step by step: (.*)", run)
    assert found is not None
    rewards = [float(value) for value in found[1].split(", ")]
    assert len(rewards) == 4
    assert max(rewards) > rewards[0]
    assert "α: {'animals': 1.0}" in run


@one("mix_and_merge")
def test_mix_and_merge(run: str) -> None:
    assert "model.safetensors" in run
    assert "as t2 does: True" in run


@one("import_public_checkpoint")
def test_import_public_checkpoint(run: str) -> None:
    assert "90 vectors of policy_params.pt" in run
    found = re.search(r"nuclear norm: ([\d.]+) before, ([\d.]+) after", run)
    assert found is not None
    assert float(found[1]) == pytest.approx(float(found[2]), rel=1e-5)


def test_every_example_is_run_and_named_in_the_documentation() -> None:
    own = Path(__file__).read_text()
    page = (REPOSITORY / "docs" / "api.md").read_text()
    for name in EXAMPLES:
        assert f'@one("{name}")' in own
        assert f"examples/{name}.py" in page
