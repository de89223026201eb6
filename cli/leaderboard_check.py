"""``t2 leaderboard check``: whether a candidate is worse than a baseline, for people and for CI."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from t2.cli.output import print_json, print_table
from t2.cli.shelves import AsJson, Registry
from t2.core.comparison import compare_results
from t2.core.comparison_summary import HEADER, as_json, as_markdown, notes, row, sentence
from t2.core.errors import ArgumentError, NotFoundError, StorageError
from t2.core.files import atomic_write
from t2.core.results import TaskResult, read_results
from t2.core.verdicts import Verdict
from t2.harness.leaderboard import runs_of
from t2.harness.registry import registry
from t2.registry.run_references import parse_expert

EXIT_CODES = {Verdict.NO_CHANGE: 0, Verdict.IMPROVED: 0, Verdict.REGRESSED: 1, Verdict.UNDERPOWERED: 3}
"""2 is that of an error, as of every command."""


def check(
    baseline: Annotated[str, typer.Option(help="Results to compare with: of lm_eval, a run, or an expert.")],
    candidate: Annotated[str, typer.Option(help="Results to judge.")],
    margin: Annotated[float, typer.Option(help="The largest drop that does not matter: 0.02 is two points.")],
    noise: Annotated[
        list[str] | None,
        typer.Option(help="Repeats of one evaluation, joined by +; a drop within their spread is none."),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Compare this task; may be repeated. Else all.")] = None,
    metric: Annotated[str | None, typer.Option(help="Compare by this metric; else by each task's first.")] = None,
    filter_: Annotated[str | None, typer.Option("--filter", help="The metric's filter.")] = None,
    level: Annotated[float, typer.Option(help="Of the intervals; a false REGRESSED is said at most 1 - level.")] = 0.95,
    power: Annotated[float, typer.Option(help="Of the smallest drop that is told.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the bootstrap, for scores that are not 0 or 1.")] = 0,
    markdown: Annotated[
        Path | None, typer.Option(help="Write a summary; it goes to $GITHUB_STEP_SUMMARY in any case.")
    ] = None,
    registry_: Registry = None,
    as_json_: AsJson = False,
) -> None:
    """Judge a candidate beside a baseline, document by document.

    Exit code 0: IMPROVED or NO CHANGE; 1: REGRESSED; 2: the two cannot be compared; 3: UNDERPOWERED.
    """
    comparison = compare_results(
        _results(candidate, registry_),
        _results(baseline, registry_),
        margin=margin,
        noise=[_results(reference, registry_) for reference in _repeats(noise or ())],
        tasks=task or (),
        metric=metric,
        filter=filter_,
        skip_unpaired=any(not _is_path(one) and parse_expert(one) for one in (candidate, baseline)),
        level=level,
        power=power,
        seed=seed,
    )
    summary = as_markdown(comparison, candidate, baseline)
    if markdown is not None:
        atomic_write(markdown, summary.encode())
    _tell_github(summary)
    if as_json_:
        print_json(as_json(comparison))
    else:
        print_table(HEADER, [row(each) for each in comparison.tasks])
        print()
        for line in (*notes(comparison), sentence(comparison)):
            print(line)
    raise typer.Exit(EXIT_CODES[comparison.verdict])


def _results(reference: str, registry_: str | None) -> list[TaskResult]:
    """Of a path that is there or can be nothing else; of anything else in the registry."""
    if not reference.strip():
        raise ArgumentError("results to compare are named by an empty text; give a folder, a run or an expert")
    if _is_path(reference):
        return read_results(Path(reference).expanduser())
    try:
        with registry(registry_) as client:
            return runs_of(client, reference)
    except NotFoundError as error:
        raise NotFoundError(f"{reference} is no file or folder here, and: {error}") from error


def _is_path(reference: str) -> bool:
    return Path(reference).expanduser().exists() or reference.endswith(".json") or reference.startswith((".", "/", "~"))


def _repeats(given: list[str] | tuple[()]) -> list[str]:
    """References joined by ``+``, unless a path has one in its name."""
    found = [
        part for text in given for part in ([text] if Path(text).expanduser().exists() else text.split("+")) if part
    ]
    if len(found) == 1:
        raise ArgumentError("--noise takes at least two results, joined by +: the spread of repeats is the noise floor")
    if len(set(found)) < len(found):
        raise ArgumentError("--noise names the same results twice, which are no repeat of themselves; give others")
    return found


def _tell_github(summary: str) -> None:
    """Append to the summary of a GitHub Actions step, where this is one."""
    file = os.environ.get("GITHUB_STEP_SUMMARY")
    if not file:
        return
    try:
        with Path(file).open("a", encoding="utf-8") as out:
            out.write(summary + "\n")
    except OSError as error:
        raise StorageError(f"cannot write GITHUB_STEP_SUMMARY {file}: {error.strerror or error}") from error
