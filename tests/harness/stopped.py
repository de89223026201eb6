"""Adapts a tiny model and gets a signal after some batches: ``stopped.py FOLDER TASK SIGNAL BATCHES``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable
from typing import Any

from t2.harness import excepthook
from t2.harness.journal import Journal
from t2.harness.model import T2LM
from tests.harness import tiny

SEARCH = {"adapt": "cem", "population": 6, "generations": 4, "shots": 6, "economy": "none"}


def main() -> None:
    folder, task, name, batches = sys.argv[1:]
    left, add = [int(batches)], Journal.add

    def stopping(self: Journal, kind: str, cells: Iterable[tuple[Any, Any]]) -> None:
        add(self, kind, cells)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.Signals[name])

    Journal.add = stopping  # type: ignore[method-assign]
    excepthook.install()
    lm = T2LM.create_from_arg_obj({"pretrained": folder, **SEARCH}, {"device": "cpu", "batch_size": 3})
    tiny.evaluate(lm, [getattr(tiny, task)()])


if __name__ == "__main__":
    main()
