"""``t2 expert import``, ``extract``, ``mix`` and ``merge``: experts in and out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from t2.cli.extras import needs_eval, pairs
from t2.cli.output import print_fields
from t2.core.errors import ArgumentError, nearest

if TYPE_CHECKING:
    from t2.api import AdaptationRecord, Model, SavedExpert

_ModelArgs = Annotated[
    str,
    typer.Option(help="The base model: arguments of lm-eval's hf model, such as pretrained=…; else the demo model."),
]
_Name = Annotated[str, typer.Option(help="The expert's name.")]
_Domain = Annotated[str | None, typer.Option(help="What it is for.")]
_Task = Annotated[str | None, typer.Option(help="The task it was made for.")]
_Output = Annotated[Path | None, typer.Option(help="Folder of experts; without it T2_EXPERTS_DIR.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
_Experts = Annotated[str, typer.Option(help="Names, references, files or folders, joined by +.")]
_Alpha = Annotated[str | None, typer.Option(help="A coefficient for each, joined by +; without it their mean.")]
_Space = Annotated[str, typer.Option(help="paper: z' = sum(a z); delta: z' = 1 + sum(a (z-1)).")]
_Normalise = Annotated[str, typer.Option(help="none; sum divides the coefficients by their sum.")]
_Rescale = Annotated[str, typer.Option(help="none; nuclear keeps the nuclear norm of each matrix.")]
_Layers = Annotated[str | None, typer.Option(help="Only these decoder layers, such as 0-15+20.")]
_Rank = Annotated[int | None, typer.Option(help="Only the first so many components move.")]
_Transfer = Annotated[
    str, typer.Option(help="Experts of other weights: none; strict where ranks agree; resample fits them.")
]


def add_to(experts: typer.Typer) -> None:
    """Add the commands to ``t2 expert``."""
    experts.command("import")(_import)
    experts.command("extract")(_extract)
    experts.command("mix")(_mix)
    experts.command("merge")(_merge)


def _import(
    file: Annotated[Path, typer.Argument(help="policy_params.pt or learnable_params.pt of the public code.")],
    name: _Name,
    model_args: _ModelArgs = "",
    domain: _Domain = None,
    task: _Task = None,
    max_mult: Annotated[float, typer.Option(help="max_mult of its configuration.")] = 1.0,
    output: _Output = None,
    overwrite: _Overwrite = False,
) -> None:
    """Make an expert of a checkpoint of Transformer²'s public code."""
    with needs_eval("t2 expert import"):
        from t2.adapters.convert.public import read_public
        from t2.api.saved import place
    place(name, output, overwrite)
    read_public(file)  # what is wrong with the file is said before a model is loaded
    model = _load("t2 expert import", model_args)
    _print(
        model.import_public(file, name, domain=domain, task=task, max_mult=max_mult, folder=output, overwrite=overwrite)
    )


def _extract(
    tuned: Annotated[str, typer.Argument(help="The tuned model: a folder or a Hub name.")],
    name: _Name,
    model_args: _ModelArgs = "",
    tuned_args: Annotated[str, typer.Option(help="Arguments of lm-eval's hf model for the tuned one.")] = "",
    domain: _Domain = None,
    task: _Task = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest part of a matrix's difference that may be something else, beyond rounding.")
    ] = 0.05,
    output: _Output = None,
    overwrite: _Overwrite = False,
) -> None:
    """Make an expert of the difference between two checkpoints.

    It is refused where the difference is no change of singular values.
    """
    with needs_eval("t2 expert extract"):
        from t2.api.saved import place
    place(name, output, overwrite)
    arguments = pairs("--tuned-args", tuned_args)
    model = _load("t2 expert extract", model_args)
    _print(
        model.extract(
            tuned,
            name,
            tuned_args=arguments,
            domain=domain,
            task=task,
            tolerance=tolerance,
            folder=output,
            overwrite=overwrite,
        )
    )


def _mix(
    name: _Name,
    experts: Annotated[str | None, typer.Option(help="Names, references, files or folders, joined by +.")] = None,
    record: Annotated[
        Path | None, typer.Option(help="Instead of --experts: a record, whose adaptation found the mixture.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="With --record, the task whose adaptation is meant.")] = None,
    alpha: _Alpha = None,
    space: _Space = "paper",
    normalise: _Normalise = "none",
    rescale: _Rescale = "none",
    layers: _Layers = None,
    rank: _Rank = None,
    transfer: _Transfer = "none",
    model_args: Annotated[
        str, typer.Option(help="The base model, which --rescale nuclear and --transfer resample need.")
    ] = "",
    domain: _Domain = None,
    output: _Output = None,
    overwrite: _Overwrite = False,
) -> None:
    """Make a mixture of experts, or of what an adaptation found."""
    with needs_eval("t2 expert mix"):
        from t2.api import mix
        from t2.api.saved import mix_record, place, read_named
    place(name, output, overwrite)
    if record is not None:
        defaults = (None, None, "paper", "none", "none", None, None, "none")
        if (experts, alpha, space, normalise, rescale, layers, rank, transfer) != defaults:
            raise ArgumentError("--record says what was mixed and how; leave out --experts and the mixture's options")
        found = _record(record, task)
        model = _load("t2 expert mix", model_args) if model_args else None
        _print(mix_record(found, name, model=model, domain=domain, folder=output, overwrite=overwrite))
        return
    if experts is None:
        raise ArgumentError("give --experts, joined by +, or --record, a file of an adaptation that found a mixture")
    if task is not None:
        raise ArgumentError("--task is for --record; leave it out")
    read_named(experts)
    model = _load("t2 expert mix", model_args) if rescale != "none" or transfer == "resample" else None
    if model_args and model is None:
        raise ArgumentError(
            "--model-args: only --rescale nuclear and --transfer resample need the base model; leave it out"
        )
    _print(
        mix(
            name,
            experts,
            alpha,
            space=space,
            normalise=normalise,
            rescale=rescale,
            layers=layers,
            rank=rank,
            transfer=transfer,
            model=model,
            domain=domain,
            folder=output,
            overwrite=overwrite,
        )
    )


def _merge(
    folder: Annotated[Path, typer.Argument(help="The checkpoint's folder, new or empty.")],
    experts: _Experts,
    alpha: _Alpha = None,
    space: _Space = "paper",
    normalise: _Normalise = "none",
    rescale: _Rescale = "none",
    layers: _Layers = None,
    rank: _Rank = None,
    transfer: _Transfer = "none",
    model_args: _ModelArgs = "",
    overwrite: _Overwrite = False,
) -> None:
    """Write base and mixture as an ordinary Hugging Face checkpoint."""
    with needs_eval("t2 expert merge"):
        from t2.adapters.convert.merge import check_free
        from t2.api.saved import read_named
    check_free(folder, overwrite)
    read = read_named(experts)
    model = _load("t2 expert merge", model_args)
    adapted = model.adapt(
        "mix",
        experts=read,
        alpha=alpha,
        space=space,
        normalise=normalise,
        rescale=rescale,
        layers=layers,
        rank=rank,
        transfer=transfer,
    )
    path = adapted.merge(folder, overwrite=overwrite)
    shown = ", ".join(f"{key} {value:g}" for key, value in adapted.alpha().items())
    print_fields([("checkpoint", path), ("base model", model.base.id), ("mixture", shown)])


def _record(path: Path, task: str | None) -> AdaptationRecord:
    """The record that is meant among those of a file."""
    from t2.api import read_records

    records = read_records(path)
    tasks = [record.task for record in records]
    if task is None and len(records) == 1:
        return records[0]
    if task is None:
        raise ArgumentError(f"{path} holds records of {', '.join(tasks) or 'no task'}; name one with --task")
    found = [record for record in records if record.task == task]
    if len(found) != 1:
        raise ArgumentError(f"{path} holds {len(found)} records of {task}{nearest(task, tasks)}")
    return found[0]


def _load(command: str, model_args: str) -> Model:
    with needs_eval(command):
        from t2.api import load_model
    return load_model(**pairs("--model-args", model_args))


def _print(saved: SavedExpert) -> None:
    fields: list[tuple[str, object]] = [("expert", saved.path), ("digest", saved.digest)]
    print_fields([*fields, ("note", saved.note)] if saved.note else fields)
