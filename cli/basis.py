"""``t2 basis``: the spectral bases of a model that is too large to build them on the way."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from t2.cli.extras import needs_eval
from t2.cli.output import print_fields, print_json, print_table
from t2.core.errors import ArgumentError, ModelError, nearest

if TYPE_CHECKING:
    from t2.adapters.build_plan import Plan
    from t2.adapters.expert import Z
    from t2.adapters.targets import Ranks

_basis = typer.Typer(help="Spectral bases of large models: plan, build, look.", no_args_is_help=True)
TRANSFERS = ("none", "strict", "resample")
_BY = ("module", "kind", "layer", "matrix")

_Pretrained = Annotated[str, typer.Argument(metavar="PRETRAINED", help="A checkpoint's folder, or a model of the Hub.")]
_Targets = Annotated[str, typer.Option(help="mlp, attn or all.")]
_Layers = Annotated[str | None, typer.Option(help="Only these decoder layers, such as 0-15+20.")]
_Device = Annotated[str | None, typer.Option(help="cpu or cuda; without it the GPU where there is one.")]
_Workers = Annotated[int | None, typer.Option(help="Processes; without it as many as cores and memory bear.")]
_Moe = Annotated[str, typer.Option(help="refuse models with routed experts, or skip those and adapt the rest.")]
_Revision = Annotated[str | None, typer.Option(help="Revision on the Hub.")]
_Transfer = Annotated[
    str, typer.Option(help="Experts of other weights: none; strict where ranks agree; resample fits them.")
]
_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.add_typer(_basis, name="basis")


@_basis.command("plan")
def _plan(
    pretrained: _Pretrained,
    targets: _Targets = "all",
    layers: _Layers = None,
    device: _Device = None,
    workers: _Workers = None,
    moe: _Moe = "refuse",
    revision: _Revision = None,
    as_json: _AsJson = False,
) -> None:
    """Say what building the bases of a model takes: disk, memory, time. Its config.json is enough."""
    with needs_eval("t2 basis"):
        from t2.adapters.building import missing_bases
        from t2.adapters.checkpoint import has_weights, open_checkpoint, outline
        from t2.adapters.digest_memo import DigestMemo
        from t2.adapters.targets import choose, format_left_out, parse_layers
    device = _place(device)
    numbers = parse_layers(layers) if layers is not None else None
    if has_weights(pretrained):
        checkpoint = open_checkpoint(pretrained, revision, moe)
        chosen, rest = choose(checkpoint.targets, targets, numbers), checkpoint.left_out
        missing = missing_bases(checkpoint, list(chosen), DigestMemo(checkpoint))
    else:
        model = outline(pretrained, revision, moe)
        chosen, rest = choose(model.targets, targets, numbers), model.left_out
        missing = list(chosen)
    shapes = {name: target.shape for name, target in chosen.items()}
    plan = _make_plan(shapes, missing, device, workers)
    if as_json:
        numbered = sorted({target.layer for target in chosen.values()})
        print_json({**asdict(plan), "device": device, "layers": numbered, "left_out": dict(rest)})
    else:
        fields = _describe(plan, device, len({target.layer for target in chosen.values()}))
        print_fields([*fields, ("left out", format_left_out(rest))] if rest else fields)


@_basis.command("build")
def _build(
    pretrained: _Pretrained,
    targets: _Targets = "all",
    layers: _Layers = None,
    device: _Device = None,
    workers: _Workers = None,
    moe: _Moe = "refuse",
    revision: _Revision = None,
    as_json: _AsJson = False,
) -> None:
    """Build the bases of a checkpoint into the cache, matrix by matrix. What was stopped goes on where it was."""
    with needs_eval("t2 basis"):
        from t2.adapters.building import build_bases, missing_bases
        from t2.adapters.checkpoint import open_checkpoint
        from t2.adapters.digest_memo import DigestMemo
        from t2.adapters.targets import choose, parse_layers
    device = _place(device)
    numbers = parse_layers(layers) if layers is not None else None
    checkpoint = open_checkpoint(pretrained, revision, moe)
    chosen = choose(checkpoint.targets, targets, numbers)
    missing = missing_bases(checkpoint, list(chosen), DigestMemo(checkpoint))
    plan = _make_plan({name: target.shape for name, target in chosen.items()}, missing, device, workers)
    if not as_json:
        print_fields(_describe(plan, device, len({target.layer for target in chosen.values()})))
    try:
        built = build_bases(checkpoint, list(chosen), device=device, workers=plan.workers, threads=plan.threads)
    except KeyboardInterrupt:
        print("t2: stopped; what was built stays, and the same command goes on from there", file=sys.stderr)
        raise
    if as_json:
        print_json({**asdict(built), "plan": asdict(plan)})
    else:
        print_fields(
            [
                ("built", f"{built.built} bases, {_bytes(built.bytes)}, in {_duration(built.seconds)}"),
                ("were there", built.present),
            ]
        )


@_basis.command("show")
def _show(
    pretrained: _Pretrained,
    rank: Annotated[
        str | None, typer.Option(help="Numbers of components to keep, joined by +; without it a quarter and a half.")
    ] = None,
    experts: Annotated[str | None, typer.Option(help="Experts whose loss is measured, joined by +.")] = None,
    by: Annotated[str, typer.Option(help=f"What matrices are grouped by: {', '.join(_BY)}.")] = "module",
    targets: _Targets = "all",
    layers: _Layers = None,
    transfer: _Transfer = "none",
    moe: _Moe = "refuse",
    revision: _Revision = None,
    as_json: _AsJson = False,
) -> None:
    """Show what the first components of a model's matrices hold of them, and of what experts change."""
    if by not in _BY:
        raise ArgumentError(f"--by {by} is not known{nearest(by, _BY)}")
    with needs_eval("t2 basis"):
        from t2.adapters.basis import cached_sigma
        from t2.adapters.checkpoint import open_checkpoint
        from t2.adapters.digest_memo import DigestMemo
        from t2.adapters.spectrum import kept
        from t2.adapters.targets import Ranks, choose, parse_layers
    ranks = _ranks(rank) if rank is not None else None
    numbers = parse_layers(layers) if layers is not None else None
    checkpoint = open_checkpoint(pretrained, revision, moe)
    chosen = choose(checkpoint.targets, targets, numbers)
    digests = DigestMemo(checkpoint).complete(progress=not as_json)
    found = {name: cached_sigma(digests[name], target.rank) for name, target in chosen.items()}
    sigmas = {name: sigma for name, sigma in found.items() if sigma is not None}
    if not sigmas:
        raise ModelError(f"no basis of {pretrained} is in the cache; run: t2 basis build {pretrained}")
    if ranks is None:
        largest = max(len(sigma) for sigma in sigmas.values())
        ranks = sorted({max(1, largest // 4), max(1, largest // 2)})
    moving = _experts(experts, pretrained, Ranks(checkpoint.targets, digests), transfer)
    groups = {
        name: {
            "module": name.removesuffix(".weight").rpartition(".")[2],
            "kind": target.kind,
            "layer": str(target.layer),
            "matrix": name,
        }[by]
        for name, target in chosen.items()
    }
    rows = kept(sigmas, groups, ranks, moving)
    absent = len(chosen) - len(sigmas)
    if as_json:
        print_json({"by": by, "groups": [asdict(row) for row in rows], "not_built": absent})
        return
    header = (by, "matrices", "rank", "kept", "of Σσ", "of Σσ²", *(f"of {name}" for name in moving))
    print_table(
        header,
        [
            (
                row.group,
                row.matrices,
                row.rank,
                row.k,
                f"{row.sigma:.1%}",
                f"{row.energy:.1%}",
                *("–" if share is None else f"{share:.1%}" for share in row.moved.values()),
            )
            for row in rows
        ],
    )
    if absent:
        print(f"{absent} of {len(chosen)} matrices have no basis yet; run: t2 basis build {pretrained}")


def _experts(names: str | None, pretrained: str, ranks: Ranks, transfer: str) -> dict[str, Z]:
    """z of experts by name, checked against the checkpoint."""
    if transfer not in TRANSFERS:
        raise ArgumentError(f"--transfer {transfer} is not known{nearest(transfer, TRANSFERS)}")
    if names is None:
        return {}
    with needs_eval("t2 basis show"):
        from t2.api.saved import read_named
        from t2.core.manifest import BaseModelRef
        from t2.harness.experts import fit_expert
    base = BaseModelRef(id=Path(pretrained).name, revision=None, fingerprint=ranks.fingerprint)
    fitted = [fit_expert(expert, transfer, base, ranks) for expert in read_named(names)]
    return {expert.name: expert.z for expert in fitted}


def _ranks(text: str) -> list[int]:
    parts = [part.strip() for part in text.split("+")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ArgumentError(f"--rank {text} is not of the form 256+1024: numbers above 0, joined by +")
    return sorted({int(part) for part in parts})


def _place(device: str | None) -> str:
    """The device to build on."""
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ArgumentError(f"--device {device} is not known{nearest(device, ('cpu', 'cuda'))}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ArgumentError(f"--device {device}: torch finds no GPU here; leave it out to build on the CPU")
    return device


def _make_plan(shapes: Mapping[str, tuple[int, int]], missing: list[str], device: str, workers: int | None) -> Plan:
    with needs_eval("t2 basis"):
        from t2.adapters.build_plan import make_plan, probe, share_cores
    processes, threads = share_cores(shapes, device, workers)
    return make_plan(shapes, missing, processes, threads, probe(device, threads) if missing else None)


def _describe(plan: Plan, device: str, layers: int) -> list[tuple[str, object]]:
    """A plan for people."""
    there = f", {plan.present} of them in the cache" if plan.present else ""
    fields: list[tuple[str, object]] = [
        ("matrices", f"{plan.matrices} in {layers} layers, {_bytes(plan.matrix_bytes)} in bfloat16{there}"),
        ("bases", f"{_bytes(plan.bytes)}, {_bytes(plan.missing_bytes)} of them to be built"),
        ("memory", f"{_bytes(plan.worker_bytes)} for each process at most"),
    ]
    if plan.seconds is not None:
        many = f"{plan.workers} processes, threads of each {plan.threads}"
        fields.append(
            ("time", f"about {_duration(plan.seconds)} on {device}{f' ({many})' if plan.workers > 1 else ''}")
        )
    return fields


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
