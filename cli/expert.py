"""``t2 expert``: look at expert files and check them, without a model; what needs one is in ``convert.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from t2.cli import convert
from t2.cli.output import print_error, print_fields, print_json, print_table
from t2.core.errors import ExpertFileError
from t2.core.expertfile import ExpertFile, read_expert, unfinished
from t2.core.manifest import unpack_hashes
from t2.core.settings import experts_dir
from t2.harness.shipped import PREFIX, demo_dir

_expert = typer.Typer(help="Look at expert files, check them, make and merge them.", no_args_is_help=True)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the program."""
    convert.add_to(_expert)
    app.add_typer(_expert, name="expert")


@_expert.command("show")
def _show(
    file: Annotated[Path, typer.Argument(help="An expert's file.")],
    as_json: _Json = False,
) -> None:
    """Show what one expert says of itself, and how far it is from the base model."""
    expert = read_expert(file)
    if as_json:
        print_json(_describe(file, expert))
        return
    manifest = expert.manifest
    ranks = sorted(set(manifest.targets.values()))
    distance = _distance(expert)
    print_fields(
        [
            ("name", manifest.name),
            ("kind", manifest.kind),
            ("domain", manifest.domain or "-"),
            ("task", manifest.task or "-"),
            ("method", manifest.method or "-"),
            ("digest", expert.digest),
            ("base model", manifest.base.id + (f" at {manifest.base.revision}" if manifest.base.revision else "")),
            ("fingerprint", manifest.base.fingerprint),
            ("matrices", f"{len(manifest.targets)} of rank {', '.join(map(str, ranks))}"),
            ("values", sum(manifest.targets.values())),
            ("|z - 1|", f"mean {distance['mean']:.4g}, largest {distance['max']:.4g}"),
            ("trained on", f"documents of {len(unpack_hashes(manifest.training_docs))} hashes"),
            *((f"training.{key}", value) for key, value in sorted(manifest.training.items())),
            *(("parent", f"{parent.alpha:+.6g} × {parent.digest}") for parent in manifest.parents),
        ]
    )


@_expert.command("verify")
def _verify(
    files: Annotated[list[Path], typer.Argument(help="Expert files.")],
    as_json: _Json = False,
) -> None:
    """Check expert files against the strict profile; exits with 2 when one breaks it."""
    checked = [_read(file) for file in files]
    if as_json:
        print_json([entry for entry, _ in checked])
    for entry, error in checked:
        if error is not None:
            print_error(error)
        elif not as_json:
            print(f"{entry['digest']}  {entry['path']}")
    if any(error for _, error in checked):
        raise typer.Exit(2)


@_expert.command("list")
def _list(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Expert files, or folders of them; without any, yours and the demo's.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """List experts; files that are not valid are named on standard error, and the exit code is then 2."""
    experts: list[dict[str, Any]] = []
    failed = False
    for file in _files(paths or [experts_dir(), demo_dir()]):
        try:
            experts.append(_describe(file, read_expert(file)))
        except ExpertFileError as error:
            print_error(str(error))
            failed = True
    if as_json:
        print_json(experts)
    else:
        print_table(
            ("name", "kind", "domain", "task", "base model", "matrices", "digest", "file"),
            [
                (
                    entry["name"],
                    entry["manifest"]["kind"],
                    entry["manifest"]["domain"] or "-",
                    entry["manifest"]["task"] or "-",
                    entry["manifest"]["base"]["id"],
                    len(entry["manifest"]["targets"]),
                    entry["digest"][:12],
                    entry["path"],
                )
                for entry in experts
            ],
        )
    if failed:
        raise typer.Exit(2)


def _files(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from (file for file in sorted(path.rglob("*.safetensors")) if not unfinished(file))
        elif path.exists() or path != experts_dir():
            yield path


def _read(file: Path) -> tuple[dict[str, Any], str | None]:
    try:
        expert = read_expert(file)
    except ExpertFileError as error:
        return {"path": str(file), "valid": False, "error": str(error)}, str(error)
    return {"path": str(file), "valid": True, "digest": expert.digest}, None


def _distance(expert: ExpertFile) -> dict[str, float]:
    offsets = np.abs(np.concatenate(list(expert.vectors.values())).astype(np.float64) - 1.0)
    return {"mean": float(offsets.mean()), "max": float(offsets.max())}


def _describe(file: Path, expert: ExpertFile) -> dict[str, Any]:
    shipped = file.parent.parent == demo_dir()
    return {
        "path": str(file),
        "name": f"{PREFIX}{file.parent.name}" if shipped else expert.manifest.name,
        "digest": expert.digest,
        "distance": _distance(expert),
        "manifest": expert.manifest.model_dump(mode="json"),
    }
