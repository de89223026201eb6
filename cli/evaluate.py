"""``t2 eval``: lm-eval's command line, with t2 made known to it first."""

from __future__ import annotations

import sys

import typer

from t2.cli.extras import needs_eval
from t2.harness import discovery, excepthook


def add_to(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(
        "eval",
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        help="Run lm_eval, with t2's model and tasks. It gets the arguments that follow.",
    )(_eval)


def _eval(context: typer.Context) -> None:
    with needs_eval("t2 eval"):
        from lm_eval.__main__ import cli_evaluate

    discovery.install()
    # lm-eval reads sys.argv and prints its program's name from it.
    sys.argv = ["lm_eval", *context.args]
    try:
        cli_evaluate()
    except KeyboardInterrupt as stop:
        if excepthook.tell(stop):
            excepthook.leave(130)
        raise
