"""Grids over the tiny model, also in a process that gets killed: ``grids.py FOLDER OUTPUT CELLS``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task

from t2.harness.compare.folder import GridFolder, Result
from t2.harness.compare.methods import Cell, parse_controls, parse_methods, parse_seeds
from t2.harness.compare.plan import Request
from t2.harness.compare.running import run
from t2.harness.evaluating import RunForm
from tests.harness import tiny

SEARCH = {"shots": 6, "population": 5, "generations": 2}
SMALL = "base,mix,cem"
TASKS: Mapping[str, Callable[..., Task]] = {"tiny_choice": tiny.choice_task, "tiny_text": tiny.text_task}


def request(
    folder: Path,
    methods: str = "base,expert,mix,best,prompt,cem",
    *,
    tasks: Mapping[str, Callable[[], Task]] = TASKS,
    controls: str = "none,shuffle",
    seeds: str = "0",
    experts: str | None = "alpha+beta+gamma",
    search: Mapping[str, Any] = SEARCH,
    adapters: Sequence[Path] = (),
    form: Mapping[str, Any] | None = None,
    **model_args: Any,
) -> Request:
    return Request(
        tasks=tuple(tasks),
        methods=parse_methods(methods),
        controls=parse_controls(controls),
        seeds=parse_seeds(seeds),
        experts=None if experts is None else tuple(experts.split("+")),
        adapters=tuple(map(str, adapters)),
        model_args={"pretrained": str(folder), **search, **model_args},
        form=RunForm(device="cpu", batch_size=3, **form or {}),
        load=lambda name: tasks[name](),
    )


def main() -> None:
    folder, output, cells = sys.argv[1:]
    left, finish = [int(cells)], GridFolder.finish

    def stopping(self: GridFolder, cell: Cell, result: Result) -> None:
        left[0] -= 1
        if left[0] == 0:
            # Its samples are written by now, and it is not yet marked as done.
            os.kill(os.getpid(), signal.SIGKILL)
        finish(self, cell, result)

    GridFolder.finish = stopping  # type: ignore[method-assign]
    run(request(Path(folder), SMALL), Path(output))


if __name__ == "__main__":
    main()
