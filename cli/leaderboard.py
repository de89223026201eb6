"""``t2 leaderboard``: what was measured, with which experts, and which is best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

import pydantic
import typer

from t2.cli.leaderboard_check import check
from t2.cli.output import print_fields, print_json, print_table
from t2.cli.shelves import AsJson, Registry
from t2.core.errors import ArgumentError, NotFoundError, nearest
from t2.core.files import atomic_write
from t2.core.references import DEFAULT_NAMESPACE, PRODUCTION, parse_reference
from t2.harness.leaderboard import fetch_file, find_run, push_results
from t2.harness.registry import every, registry
from t2.registry.client.base import RegistryClient
from t2.registry.schemas import MAX_PAGE, Board, BoardPage, BoardQuery, Run, RunQuery, RunScore

_leaderboard = typer.Typer(help="Push results of lm-eval, see the best, judge candidates.", no_args_is_help=True)
_leaderboard.command("check")(check)
_Run = Annotated[str, typer.Argument(help="The run: its digest, or its first characters; namespace/ may come before.")]
_Limit = Annotated[int, typer.Option(min=1, help="At most so many.")]
_All = Annotated[bool, typer.Option("--all", help="All of them.")]
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class _Page(Protocol[T_co]):
    @property
    def items(self) -> Sequence[T_co]: ...

    @property
    def next(self) -> str | None: ...


def add_to(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.add_typer(_leaderboard, name="leaderboard")


@_leaderboard.command("push")
def _push(
    results: Annotated[Path, typer.Argument(help="The folder that lm_eval got as --output_path, or a results file.")],
    namespace: Annotated[str, typer.Option(help="Where to.")] = DEFAULT_NAMESPACE,
    registry_: Registry = None,
    as_json: AsJson = False,
) -> None:
    """Put results of lm-eval on the boards, each task as a run, with its samples.

    Run lm_eval with --log_samples. The same results again change nothing.
    """
    with registry(registry_) as client:
        runs = push_results(client, namespace, results)
    if as_json:
        print_json([run.model_dump(mode="json") for run in runs])
        return
    _print_runs(runs, [("pushed", ["new" if run.created else "there already" for run in runs])])


@_leaderboard.command("list")
def _list(
    namespace: Annotated[str | None, typer.Option(help="Those of one namespace.")] = None,
    task: Annotated[str | None, typer.Option(help="Of a task.")] = None,
    base: Annotated[str | None, typer.Option(help="By a base model: its name, identity or fingerprint.")] = None,
    expert: Annotated[
        str | None, typer.Option(help="With an expert: any version of team/math, team/math@3, or @sha256:….")
    ] = None,
    strategy: Annotated[str | None, typer.Option(help="Adapted by a strategy, such as cem.")] = None,
    limit: _Limit = 50,
    everything: _All = False,
    registry_: Registry = None,
    as_json: AsJson = False,
) -> None:
    """List runs, newest first."""
    query = _checked(
        RunQuery, {"namespace": namespace, "task": task, "base": base, "expert": expert, "strategy": strategy}
    )
    with registry(registry_) as client:
        runs, more = _first(lambda cursor, size: client.list_runs(query, cursor=cursor, limit=size), limit, everything)
    if as_json:
        print_json([run.model_dump(mode="json") for run in runs])
    else:
        _print_runs(runs)
    _tell_more(more, limit)


@_leaderboard.command("show")
def _show(run: _Run, registry_: Registry = None, as_json: AsJson = False) -> None:
    """Show a run: what was asked, what answered, and its scores."""
    with registry(registry_) as client:
        found = find_run(client, run)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    header = found.header
    print_fields(
        [
            ("run", found.reference),
            ("task", f"{found.task} {found.task_version}, {found.n_shot} shots, {found.docs} documents"),
            ("model", found.model),
            ("base model", found.base + (f" at {found.base_revision}" if found.base_revision else "")),
            ("fingerprint", found.base_fingerprint or "-"),
            ("identity", found.base_identity or "-"),
            ("strategy", _strategy(found)),
            *(("expert", f"{expert.digest}  {_expert(expert.name, expert.references)}") for expert in found.experts),
            *((score.metric + f",{score.filter}", f"{_score(score)}, n = {score.n}") for score in found.scores),
            *((f"settings.{key}", value) for key, value in sorted(header["settings"].items()) if value is not None),
            *((f"seeds.{key}", value) for key, value in sorted(header["seeds"].items())),
            ("record", found.record_digest or "-"),
            ("documents", found.docs_digest),
            ("prompts", found.prompts_digest),
            ("samples", f"{found.samples_digest}, {found.samples_size} bytes"),
            ("evaluated", f"{found.evaluated_at:%Y-%m-%d %H:%M}" if found.evaluated_at else "-"),
            ("pushed", f"{found.created_at:%Y-%m-%d %H:%M} by {found.created_by}"),
        ]
    )


@_leaderboard.command("board")
def _board(
    task: Annotated[str | None, typer.Argument(help="The task; without one the boards are listed.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model: name, identity or fingerprint; needed where there are several.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="By a metric; without, the task's first one.")] = None,
    filter_: Annotated[str | None, typer.Option("--filter", help="By a filter of lm-eval's.")] = None,
    task_version: Annotated[
        str | None, typer.Option(help="Of a version of the task; without, the newest run's.")
    ] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="With so many shots; without, the newest run's.")] = None,
    limit: _Limit = 50,
    everything: _All = False,
    registry_: Registry = None,
    as_json: AsJson = False,
) -> None:
    """Show the runs of a task by a base model, the best first, with 95% intervals.

    Scores that the run's samples do not confirm are marked and follow the confirmed ones. A board has only runs of one
    version of the task, with the same number of shots and the same documents.
    """
    given = {"metric": metric, "filter": filter_, "task_version": task_version, "n_shot": shots}
    with registry(registry_) as client:
        if task is None:
            if any(value is not None for value in given.values()):
                raise ArgumentError("--metric, --filter, --task-version and --shots are about the board of a task")
            _list_boards(client, base, as_json)
            return
        query = _checked(BoardQuery, {**given, "task": task, "base": base or _only_base(client, task)})
        pages: list[BoardPage] = []

        def page(cursor: str | None, size: int) -> BoardPage:
            pages.append(client.board(query, cursor=cursor, limit=size))
            return pages[-1]

        entries, more = _first(page, limit, everything)
        board = pages[0]
        _report_namesakes(client, board.board)
    if as_json:
        print_json({**board.model_dump(mode="json"), "items": [entry.model_dump(mode="json") for entry in entries]})
        return
    told = board.board
    best = "highest" if board.higher_is_better else "lowest"
    print(
        f"{told.task} {told.task_version}, {told.n_shot} shots, {told.docs} documents, by {told.base}: "
        f"{board.metric},{board.filter}, the {best} first"
    )
    rows = [
        (
            number,
            _score(entry.score, told.docs),
            _strategy(entry.run),
            _experts(entry.run),
            entry.run.model,
            _name(entry.run),
        )
        for number, entry in enumerate(entries, start=1)
    ]
    print_table(("rank", "score and 95% interval", "strategy", "experts", "model", "run"), rows, none="no runs")
    _tell_more(more, limit)


@_leaderboard.command("history")
def _history(
    expert: Annotated[str, typer.Argument(help="The expert and an alias, team/math@production, the default alias.")],
    task: Annotated[str | None, typer.Option(help="Runs of one task.")] = None,
    registry_: Registry = None,
    as_json: AsJson = False,
) -> None:
    """List the runs of the versions that an alias points or pointed to, newest first."""
    reference = parse_reference(expert)
    if reference.expert is None or reference.pinned:
        raise ArgumentError(f"{expert} names no alias; write namespace/name@alias")
    name, alias = reference.expert, reference.alias or PRODUCTION
    with registry(registry_) as client:
        runs = list(every(lambda cursor: client.alias_runs(name, alias, cursor=cursor, limit=MAX_PAGE)))
    found = [each for each in runs if task is None or each.run.task == task]
    if as_json:
        print_json([each.model_dump(mode="json") for each in found])
        return
    versions = [f"{name}@{each.version}" + (f" ({alias})" if each.current else "") for each in found]
    _print_runs(
        [each.run for each in found],
        [("version", versions), ("since", [f"{each.since:%Y-%m-%d %H:%M}" for each in found])],
    )


@_leaderboard.command("pull")
def _pull(
    run: _Run,
    file: Annotated[Path | None, typer.Argument(help="Where to; without, a file named after the run, here.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    registry_: Registry = None,
    as_json: AsJson = False,
) -> None:
    """Download a run with its samples, checked: a line of JSON that tells the run, then one for each sample."""
    with registry(registry_) as client:
        found = find_run(client, run)
        target = file if file is not None else Path(f"{found.task}-{found.digest[:12]}.jsonl".replace("/", "_"))
        if target.exists() and not overwrite:
            raise ArgumentError(f"{target} exists; give another name, or --overwrite")
        data, _ = fetch_file(client, found)
    atomic_write(target, data)
    if as_json:
        print_json({"file": str(target), "run": found.reference, "samples": found.docs})
    else:
        print_fields([("file", target), ("run", found.reference), ("samples", found.docs)])


@_leaderboard.command("delete")
def _delete(run: _Run, registry_: Registry = None, as_json: AsJson = False) -> None:
    """Take a run off the boards, for ever. It can be pushed again."""
    with registry(registry_) as client:
        found = find_run(client, run)
        client.delete_run(found.namespace, found.digest)
    if as_json:
        print_json({"deleted": found.reference})
    else:
        print_fields([("deleted", found.reference)])


Q = TypeVar("Q", bound=pydantic.BaseModel)


def _checked(query: type[Q], fields: dict[str, object]) -> Q:
    try:
        return query.model_validate(fields)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ArgumentError(f"{str(first['loc'][0]).replace('_', '-')}: {first['msg']}") from None


def _first(page: Callable[[str | None, int], _Page[T]], limit: int, everything: bool) -> tuple[list[T], bool]:
    """The first items of a list, and whether there are more."""
    found: list[T] = []
    cursor: str | None = None
    while True:
        got = page(cursor, MAX_PAGE if everything else min(MAX_PAGE, limit - len(found)))
        found += got.items
        cursor = got.next
        if cursor is None or (not everything and len(found) >= limit):
            return found, cursor is not None


def _tell_more(more: bool, limit: int) -> None:
    if more:
        typer.echo(f"t2: there are more than these {limit}; give --limit or --all", err=True)


def _report_namesakes(client: RegistryClient, shown: Board) -> None:
    """Report boards that differ from the shown one only in a model of the same name."""
    others = [
        str(board.base_identity)
        for board in every(
            lambda cursor: client.list_boards(task=shown.task, base=shown.base, cursor=cursor, limit=MAX_PAGE)
        )
        if (board.task_version, board.n_shot, board.docs_digest)
        == (shown.task_version, shown.n_shot, shown.docs_digest)
        and board.base_identity not in (None, shown.base_identity)
    ]
    if others:
        typer.echo(
            f"t2: other models named {shown.base} have separate boards; choose one with --base: {', '.join(others)}",
            err=True,
        )


def _only_base(client: RegistryClient, task: str) -> str:
    """The base model of all boards of a task."""
    bases = {board.base for board in every(lambda cursor: client.list_boards(task=task, cursor=cursor, limit=MAX_PAGE))}
    if not bases:
        tasks = {board.task for board in every(lambda cursor: client.list_boards(cursor=cursor, limit=MAX_PAGE))}
        raise NotFoundError(f"{client.location}: there is no run of {task}{nearest(task, tasks)}")
    if len(bases) > 1:
        raise ArgumentError(
            f"{task} has boards of several base models; give --base, one of: {', '.join(sorted(bases))}"
        )
    return bases.pop()


def _list_boards(client: RegistryClient, base: str | None, as_json: bool) -> None:
    boards = list(every(lambda cursor: client.list_boards(base=base, cursor=cursor, limit=MAX_PAGE)))
    if as_json:
        print_json([board.model_dump(mode="json") for board in boards])
        return
    header = ("task", "version", "shots", "documents", "base model", "runs")
    models = {(each.base, each.base_identity) for each in boards if each.base_identity is not None}
    names = Counter(name for name, _ in models)
    rows = [
        (
            *(each.task, each.task_version, each.n_shot, each.docs),
            f"{each.base} ({str(each.base_identity)[:12]})" if names[each.base] > 1 else each.base,
            each.runs,
        )
        for each in boards
    ]
    print_table(header, rows, none="no boards")


def _print_runs(runs: Sequence[Run], more: Sequence[tuple[str, Sequence[str]]] = ()) -> None:
    header = ("task", "base model", "strategy", "experts", "metric", "score and 95% interval", "run")
    rows = [
        (
            run.task,
            run.base,
            _strategy(run),
            _experts(run),
            f"{run.scores[0].metric},{run.scores[0].filter}",
            _score(run.scores[0], run.docs),
            _name(run),
            *(column[number] for _, column in more),
        )
        for number, run in enumerate(runs)
    ]
    print_table((*header, *(name for name, _ in more)), rows, none="no runs")


def _score(score: RunScore, docs: int = 0) -> str:
    """Format a score; show the number of documents if it is below ``docs``."""
    if score.score is None:
        return "-"
    text = f"{score.score:.4g}"
    if score.low is not None and score.high is not None:
        text += f" [{score.low:.4g}, {score.high:.4g}]"
    if score.n < docs:
        text += f", n = {score.n}"
    return text if score.confirmed else f"{text}, unconfirmed"


def _strategy(run: Run) -> str:
    control = f", {run.control}" if run.control != "none" else ""
    return f"{run.strategy}{control}" + (f", seed {run.seed}" if run.seed is not None else "")


def _experts(run: Run) -> str:
    return ", ".join(_expert(expert.name, expert.references) for expert in run.experts) or "-"


def _expert(name: str, references: Sequence[str]) -> str:
    return references[0] if references else name


def _name(run: Run) -> str:
    return f"{run.namespace}/{run.digest[:12]}"
