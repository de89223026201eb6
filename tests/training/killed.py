"""Runs ``t2`` and dies by SIGKILL at a place of a step: ``killed.py PLACE STEP``, then the arguments of ``t2``."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import t2.training.trainer
from t2.cli.main import main
from t2.training.choices import ChoiceProblem
from t2.training.rollouts import GenerationProblem

PLACE, STEP = sys.argv[1], int(sys.argv[2])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_the_step(problem: type[Any]) -> None:
    whole = problem.accumulate

    def accumulate(self: Any, z: Any, docs: Any, step: int) -> Any:
        measured = whole(self, z, docs, step)
        if step == STEP:
            die()
        return measured

    problem.accumulate = accumulate


def die_around_the_checkpoint() -> None:
    module: Any = t2.training.trainer
    files: Any = os
    whole, replace = module.save_checkpoint, files.replace

    def dying_replace(source: Any, target: Any) -> None:
        die()

    def save(path: Any, checkpoint: Any) -> None:
        if checkpoint.progress.step == STEP:
            if PLACE == "before-checkpoint":
                die()
            if PLACE == "in-checkpoint":
                files.replace = dying_replace
        whole(path, checkpoint)
        files.replace = replace
        if checkpoint.progress.step == STEP:
            die()

    module.save_checkpoint = save


if PLACE == "in-step":
    die_in_the_step(ChoiceProblem)
    die_in_the_step(GenerationProblem)
else:
    die_around_the_checkpoint()
sys.argv = ["t2", *sys.argv[3:]]
main()
