"""The program ``t2``: its commands, and what all of them share.

Exit codes: 0 done, 1 a defect of t2 or of a program it runs, 2 a mistake that the user can mend (one line on standard
error, no traceback), 130 stopped by Ctrl-C. ``t2 leaderboard check`` answers with 0, 1 and 3 besides.
"""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Annotated, Any

import typer

from t2.cli import basis, compare, data, evaluate, expert, leaderboard, registry, rerun, train
from t2.cli.output import print_error
from t2.core.errors import T2Error

_Misuse: Any = typer.BadParameter.__base__
"""What typer raises for an option, argument or command that does not exist or is missing."""

app = typer.Typer(
    name="t2",
    help="Self-adaptive language models at evaluation time: experts, adaptation, and lm-evaluation-harness.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(f"t2 {importlib.metadata.version('t2-eval')}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for _command in (evaluate, compare, rerun, data, expert, registry, leaderboard, train, basis):
    _command.add_to(app)


def main() -> None:
    """Run ``t2`` on the command line's arguments."""
    try:
        sys.exit(app(prog_name="t2", standalone_mode=False))
    except T2Error as error:
        print_error(str(error))
    except _Misuse as error:
        text = error.format_message()
        if "\n" in text:  # the help, where a command is missing
            print(text, file=sys.stderr)
        else:
            print_error(f"{text.rstrip('.')}; see {error.ctx.command_path if error.ctx is not None else 't2'} --help")
    sys.exit(2)
