"""``t2 registry``: run a registry server and look after it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from t2.cli import registry_upkeep

_registry = typer.Typer(help="Run a registry of experts and look after it.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Add the commands to the program."""
    registry_upkeep.add_to(_registry)
    app.add_typer(_registry, name="registry")


@_registry.callback()
def _group() -> None:
    pass


@_registry.command("serve")
def _serve(
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port to listen on; 0 takes a free one.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes; more than one needs PostgreSQL.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="A TOML file of settings.")] = None,
) -> None:
    """Serve the registry over HTTP. With nothing configured, the embedded one on this machine."""
    from t2.registry.server.serve import serve

    serve(config, host=host, port=port, workers=workers)
