"""``t2 leaderboard``: what was measured, with which experts, and which is best."""

from __future__ import annotations

import typer

from t2.cli.leaderboard_check import check

_leaderboard = typer.Typer(help="Compare results of lm-eval.", no_args_is_help=True)
_leaderboard.command("check")(check)


def add_to(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.add_typer(_leaderboard, name="leaderboard")


@_leaderboard.callback()
def _group() -> None:
    pass
