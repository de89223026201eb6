"""The program ``t2``: its commands, and what all of them share.

Exit codes: 0 done, 1 a defect of t2 or of a program it runs, 2 a mistake that the user can mend (one line on standard
error, no traceback), 130 stopped by Ctrl-C, 141 the reader of the output is gone. ``t2 leaderboard check`` has its own
meanings of 0, 1 and 3.
"""

from __future__ import annotations

import sys

from t2.cli import interrupt

with interrupt.exiting_on_interrupt():
    import importlib.metadata
    from typing import Annotated, Any

    import typer

    from t2.cli import basis, compare, data, evaluate, expert, leaderboard, registry, rerun, train
    from t2.cli.output import print_error
    from t2.core.errors import T2Error
    from t2.harness.excepthook import BROKEN_PIPE, flush_output

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
    interrupt.raise_on_interrupt()
    output = sys.stdout
    status: Any = 2
    try:
        status = app(prog_name="t2", standalone_mode=False)
    except T2Error as error:
        print_error(str(error))
    except _Misuse as error:
        text = error.format_message()
        if "\n" in text:  # the help, where a command is missing
            print(text, file=sys.stderr)
        else:
            print_error(f"{text.rstrip('.')}; see {error.ctx.command_path if error.ctx is not None else 't2'} --help")
    except KeyboardInterrupt:
        status = interrupt.STATUS
    except SystemExit as stop:
        # typer replaces the streams and exits with 1 if the reader is gone.
        status = stop.code if sys.stdout is output else BROKEN_PIPE
    except OSError:
        status = flush_output(output, "\n")
        if not status:
            raise
    if not {"ray", "vllm"} & sys.modules.keys():  # these have processes of their own to end
        interrupt.exit_on_interrupt()
    sys.exit(flush_output(output) or status)
