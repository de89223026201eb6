"""``t2 rerun``: repeat results and compare them sample for sample."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from t2.cli.extras import needs_eval
from t2.cli.output import print_json, print_table


def add_to(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("rerun")(_rerun)


def _rerun(
    paths: Annotated[
        list[Path], typer.Argument(metavar="RESULTS…", help="Files of results, or folders such as one of t2 compare.")
    ],
    include_path: Annotated[Path | None, typer.Option(help="A folder of further lm-eval tasks.")] = None,
    confirm_run_unsafe_code: Annotated[
        bool, typer.Option("--confirm-run-unsafe-code", help="Run what the model writes, where a task does.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Repeat results, and compare their samples.

    Results of lm_eval --model t2 or hf are repeated with their recorded flags; exit code 1 if a sample differs.
    """
    with needs_eval("t2 rerun"):
        from t2.harness.rerun import find_results, read_stored, rerun
    where = None if include_path is None else str(include_path)
    stored = [
        read_stored(path, include_path=where, confirm_run_unsafe_code=confirm_run_unsafe_code)
        for path in find_results(paths)
    ]
    found = list(rerun(stored, say=lambda text: print(f"t2: {text}", file=sys.stderr)))
    same = sum(one.same for one in found)
    if as_json:
        print_json([{**asdict(one), "path": str(one.path), "same": one.same} for one in found])
    else:
        print_table(
            ("results", "task", "samples", "differing", "digest"),
            [(one.path, one.task, one.of, one.differing, one.after[:12]) for one in found],
        )
        print(f"{same} of {len(found)} give the same samples, digest for digest")
    if same < len(found):
        raise typer.Exit(1)
