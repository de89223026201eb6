"""``t2 expert``: look at experts and check them, without a model; what needs one is in ``convert.py``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import pydantic
import typer

from t2.cli import convert, publish
from t2.cli.output import print_error, print_fields, print_json, print_table
from t2.cli.shelves import (
    AsJson,
    Registry,
    curve_fields,
    curve_rows,
    describe_file,
    distance,
    local_file,
    parse_ranges,
)
from t2.core.curve import CurvePoint
from t2.core.errors import (
    ArgumentError,
    ExpertFileError,
    RegistryError,
    StorageError,
    T2Error,
    UnavailableError,
    nearest,
)
from t2.core.expertfile import ExpertFile, decode_expert, is_no_expert, read_bytes, read_expert, rewrite_expert
from t2.core.files import atomic_write
from t2.core.manifest import Kind, Parent, unpack_hashes
from t2.core.references import Reference, parse_name, parse_reference
from t2.core.settings import experts_dir, is_registry_configured
from t2.harness.catalogue import shipped_experts
from t2.harness.registry import every, find, read_version, registry
from t2.harness.runs import read_run
from t2.harness.shipped import demo_dir
from t2.registry.client.base import RegistryClient
from t2.registry.names import check_tag
from t2.registry.schemas import (
    MAX_PAGE,
    VALIDATION_SCORE,
    Expert,
    ExpertQuery,
    Lineage,
    Sort,
    Version,
    VersionDetail,
    VersionQuery,
)

_expert = typer.Typer(help="Find, check, publish, make and merge experts.", no_args_is_help=True)
_POINTS = 200
"""Points of a curve that a summary is drawn from."""


def add_to(app: typer.Typer) -> None:
    """Add the commands to the program."""
    publish.add_to(_expert)
    convert.add_to(_expert)
    app.add_typer(_expert, name="expert")


@_expert.command("show")
def _show(
    expert: Annotated[str, typer.Argument(help="A file or folder, or an expert of the registry: team/math@3.")],
    curve: Annotated[bool, typer.Option("--curve", help="Print every point of the reward curve.")] = False,
    versions: Annotated[bool, typer.Option("--versions", help="List all versions.")] = False,
    lineage: Annotated[bool, typer.Option("--lineage", help="List what it was mixed of, and what of it.")] = False,
    registry_: Registry = None,
    as_json: AsJson = False,
) -> None:
    """Show an expert: what it says of itself and the registry knows.

    Of a file also how far it is from the base model.
    """
    file = local_file(expert)
    if file is not None and (versions or lineage):
        raise ArgumentError(f"{expert} is a file; --versions and --lineage are for experts of a registry")
    if file is None:
        reference = parse_reference(expert)
        try:
            with registry(registry_) as client:
                _show_version(client, reference, curve, versions, lineage, as_json)
                return
        except (StorageError, UnavailableError):
            file = shipped_experts().get(expert)
            if file is None:
                raise
    _show_file(file, curve, as_json)


@_expert.command("verify")
def _verify(
    experts: Annotated[list[str], typer.Argument(help="Files, or references to a registry.")],
    fix: Annotated[
        bool, typer.Option("--fix", help="Rewrite files whose layout is not canonical; their digests change.")
    ] = False,
    registry_: Registry = None,
    as_json: AsJson = False,
) -> None:
    """Check experts as a registry checks uploads.

    Exits with 2 if one breaks the strict profile.
    """
    checked = [_check(expert, registry_, fix) for expert in experts]
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
        list[Path] | None,
        typer.Argument(help="Expert files, or folders of them; without any, the registry's and your own."),
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Those of one namespace.")] = None,
    base: Annotated[str | None, typer.Option(help="For a base model: its name or fingerprint.")] = None,
    task: Annotated[str | None, typer.Option(help="Trained on a task.")] = None,
    domain: Annotated[str | None, typer.Option(help="Of a domain.")] = None,
    kind: Annotated[str | None, typer.Option(help=f"Of a kind: {', '.join(get_args(Kind))}.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="With a tag; may be repeated.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help='With a metric in a range: "validation.score>=0.5"; may be repeated.')
    ] = None,
    text: Annotated[str | None, typer.Option(help="With a text in name, description or task.")] = None,
    deleted: Annotated[bool, typer.Option("--deleted", help="Those that were deleted instead.")] = False,
    sort: Annotated[str, typer.Option(help=f"{', '.join(get_args(Sort))}.")] = "name",
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    registry_: Registry = None,
    as_json: AsJson = False,
) -> None:
    """List experts of the registry, and your own.

    Your own are those in T2_EXPERTS_DIR that are not in it. Files that are not valid are named on standard error, and
    the exit code is then 2.
    """
    given = {
        "namespace": namespace,
        "base": base,
        "task": task,
        "domain": domain,
        "kind": kind,
        "tags": tuple(tag or ()),
        "metrics": parse_ranges(metric or ()),
        "text": text,
        "deleted": deleted,
    }
    narrowed = any(given.values())
    if paths and (narrowed or registry_ is not None):
        raise ArgumentError("files are listed as they are; leave out the paths, or what narrows the registry's list")
    failed: list[str] = []
    experts: list[Expert] = []
    files: list[tuple[Path, ExpertFile]] = []
    more = False
    if paths:
        files = list(_read_files(paths, failed))
    else:
        query = _query({**given, "sort": sort})
        own = [] if narrowed else list(_read_files([experts_dir()], failed))
        try:
            with registry(registry_) as client:
                experts, more = _page(client, query, None if everything else limit)
                files = [(file, one) for file, one in own if not _is_known(client, one.digest)]
        except (StorageError, UnavailableError) as error:
            if narrowed or registry_ is not None or is_registry_configured():
                raise
            failed.append(str(error))
            files = [*own, *_read_files([demo_dir()], failed)]
    if as_json:
        told = [expert.model_dump(mode="json") for expert in experts]
        print_json([*(describe_file(file, one) for file, one in files), *told])
    else:
        _print_list(experts, files)
    if more:
        print(f"t2: there are more than these {limit}; give --limit or --all", file=sys.stderr)
    for line in failed:
        print_error(line)
    if failed:
        raise typer.Exit(2)


def _query(fields: dict[str, Any]) -> ExpertQuery:
    for option, known in (("kind", get_args(Kind)), ("sort", get_args(Sort))):
        if fields[option] is not None and fields[option] not in known:
            raise ArgumentError(f"--{option} {fields[option]} is not one{nearest(fields[option], known)}")
    for tag in fields["tags"]:
        check_tag(tag)
    try:
        return ExpertQuery(**fields)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = str(first["loc"][0]).rstrip("s") if first["loc"] else "list"
        raise ArgumentError(f"--{where}: {first['msg']}") from None


def _page(client: RegistryClient, query: ExpertQuery, limit: int | None) -> tuple[list[Expert], bool]:
    """The first experts of a list, and whether there are more."""
    found: list[Expert] = []
    cursor: str | None = None
    while True:
        wanted = MAX_PAGE if limit is None else min(MAX_PAGE, limit - len(found))
        page = client.list_experts(query, cursor=cursor, limit=wanted)
        found += page.items
        cursor = page.next
        if cursor is None or len(found) == limit:
            return found, cursor is not None


def _is_known(client: RegistryClient, digest: str) -> bool:
    return bool(client.search_versions(VersionQuery(digest=digest), limit=1).items)


def _print_list(experts: Sequence[Expert], files: Sequence[tuple[Path, ExpertFile]]) -> None:
    header = (
        "name",
        "version",
        "kind",
        "domain",
        "task",
        "base model",
        "score",
        "aliases",
        "tags",
        "digest",
        "file",
    )
    rows: list[Sequence[object]] = []
    for file, one in files:
        entry, manifest = describe_file(file, one), one.manifest
        score = _score(file)
        rows.append(
            (
                entry["name"],
                "-",
                manifest.kind,
                manifest.domain or "-",
                manifest.task or "-",
                manifest.base.id,
                score,
                "-",
                "-",
                one.digest[:12],
                file,
            )
        )
    print_table(header, [*rows, *map(_row, experts)], none="no experts")


def _row(expert: Expert) -> Sequence[object]:
    latest, tags = expert.latest, ", ".join(expert.tags) or "-"
    if latest is None:
        return (expert.name, "-", expert.kind, "-", "-", "-", "-", "-", tags, "-", "-")
    score = latest.metrics.get(VALIDATION_SCORE)
    return (
        expert.name,
        latest.version,
        expert.kind,
        latest.domain or "-",
        latest.task or "-",
        latest.base_model,
        "-" if score is None else f"{score:.4g}",
        ", ".join(_aliases(expert, latest)) or "-",
        tags,
        latest.digest[:12],
        "-",
    )


def _aliases(expert: Expert, latest: Version) -> Sequence[str]:
    """Aliases of an expert; an alias of an older version is shown with the version."""
    if expert.aliases is None:
        return latest.aliases
    return [
        alias if number == latest.version else f"{alias} → {number}" for alias, number in sorted(expert.aliases.items())
    ]


def _score(file: Path) -> str:
    try:
        score = read_run(file).score
    except T2Error:
        return "-"
    return "-" if score is None else f"{score:.4g}"


def _read_files(paths: Sequence[Path], failed: list[str]) -> Iterator[tuple[Path, ExpertFile]]:
    for path in paths:
        inside = path.is_dir()
        files = [file for file in sorted(path.rglob("*.safetensors")) if not is_no_expert(file)] if inside else [path]
        if not inside and not path.exists() and path == experts_dir():
            continue
        for file in files:
            try:
                yield file, read_expert(file)
            except ExpertFileError as error:
                failed.append(str(error))


def _rewrite(file: Path) -> None:
    """Rewrite a file in the canonical layout if it has another."""
    data = read_bytes(file)
    rewritten = rewrite_expert(data, str(file))
    if rewritten != data:
        atomic_write(file, rewritten)


def _check(text: str, where: str | None, fix: bool) -> tuple[dict[str, Any], str | None]:
    try:
        file = local_file(text)
        if file is not None:
            if fix:
                _rewrite(file)
            expert, path = read_expert(file, canonical=True), str(file)
        else:
            if fix:
                raise ArgumentError(f"--fix: not a file: {text}; pull the expert first, a registry never rewrites one")
            with registry(where) as client:
                version = find(client, parse_reference(text))
                data = client.download(version.digest)
                read_version(data, version, client.location)
            expert, path = decode_expert(data, version.reference), version.reference
    except (ArgumentError, ExpertFileError, RegistryError, StorageError) as error:
        return {"path": text, "valid": False, "error": str(error)}, str(error)
    return {"path": path, "valid": True, "digest": expert.digest}, None


def _show_file(file: Path, whole_curve: bool, as_json: bool) -> None:
    expert = read_expert(file)
    run = read_run(file)
    if as_json:
        told = describe_file(file, expert)
        if run.metrics:
            told["metrics"] = dict(run.metrics)
        if whole_curve:
            told["curve"] = [point.model_dump(mode="json") for point in run.curve]
        print_json(told)
        return
    manifest = expert.manifest
    far = distance(expert)
    print_fields(
        [
            ("name", manifest.name),
            *_manifest_fields(manifest.kind, manifest.domain, manifest.task, manifest.method, expert.digest),
            ("base model", manifest.base.id + (f" at {manifest.base.revision}" if manifest.base.revision else "")),
            ("fingerprint", manifest.base.fingerprint),
            ("matrices", f"{len(manifest.targets)} of rank {_ranks(manifest.targets)}"),
            ("values", sum(manifest.targets.values())),
            ("|z - 1|", f"mean {far['mean']:.4g}, largest {far['max']:.4g}"),
            ("trained on", f"{len(unpack_hashes(manifest.training_docs))} documents"),
            *((f"training.{key}", value) for key, value in sorted(manifest.training.items())),
            *_parent_fields(manifest.parents),
            *((name, f"{value:.6g}") for name, value in run.metrics.items()),
            *curve_fields(run.curve, len(run.curve)),
        ]
    )
    if whole_curve:
        _print_curve(run.curve)


def _show_version(
    client: RegistryClient, reference: Reference, whole_curve: bool, versions: bool, lineage: bool, as_json: bool
) -> None:
    version = find(client, reference)
    name = parse_name(version.name)
    expert = client.get_expert(name)
    points = client.curve(name, version.version, points=None if whole_curve else _POINTS)
    listed: list[Version] | None = None
    if versions:
        listed = list(every(lambda cursor: client.list_versions(name, cursor=cursor, limit=MAX_PAGE)))
    tree = client.lineage(version.digest) if lineage else None
    if as_json:
        told = {**version.model_dump(mode="json"), "tags": list(expert.tags), "points": points.total}
        if whole_curve:
            told["curve"] = [point.model_dump(mode="json") for point in points.points]
        if listed is not None:
            told["versions"] = [one.model_dump(mode="json") for one in listed]
        if tree is not None:
            told["lineage"] = tree.model_dump(mode="json")
        print_json(told)
        return
    print_fields(_version_fields(version, expert, points.points, points.total))
    if listed is not None:
        _print_versions(listed)
    if tree is not None:
        _print_lineage(tree)
    if whole_curve:
        _print_curve(points.points)


def _version_fields(
    version: VersionDetail, expert: Expert, points: Sequence[CurvePoint], total: int
) -> list[tuple[str, object]]:
    targets: dict[str, int] = version.manifest["targets"]
    training: dict[str, Any] = version.manifest["training"]
    parents = [Parent.model_validate(parent) for parent in version.manifest["parents"]]
    notes = [("about", expert.description), ("description", version.description)]
    return [
        ("name", version.reference),
        *((key, note) for key, note in notes if note),
        *_manifest_fields(version.kind, version.domain, version.task, version.method, version.digest),
        ("base model", version.base_model),
        ("fingerprint", version.base_fingerprint),
        ("matrices", f"{version.matrices} of rank {_ranks(targets)}"),
        ("values", version.values),
        ("size", f"{version.size} bytes"),
        ("trained on", f"{version.training_docs} documents"),
        ("published", f"{version.created_at:%Y-%m-%d %H:%M} UTC by {version.created_by}"),
        ("aliases", ", ".join(version.aliases) or "-"),
        ("tags", ", ".join(expert.tags) or "-"),
        *((f"training.{key}", value) for key, value in sorted(training.items())),
        *_parent_fields(parents),
        *((key, f"{value:.6g}") for key, value in version.metrics.items()),
        *curve_fields(points, total),
    ]


def _manifest_fields(
    kind: str, domain: str | None, task: str | None, method: str | None, digest: str
) -> list[tuple[str, object]]:
    return [
        ("kind", kind),
        ("domain", domain or "-"),
        ("task", task or "-"),
        ("method", method or "-"),
        ("digest", digest),
    ]


def _parent_fields(parents: Sequence[Parent]) -> list[tuple[str, object]]:
    return [("parent", f"{parent.alpha:+.6g} × {parent.digest}") for parent in parents]


def _ranks(targets: dict[str, int]) -> str:
    return ", ".join(map(str, sorted(set(targets.values()))))


def _print_curve(points: Sequence[CurvePoint]) -> None:
    print()
    print_table(*curve_rows(points))


def _print_versions(versions: Sequence[Version]) -> None:
    print()
    print_table(
        ("version", "published", "by", "score", "aliases", "digest", "description"),
        [
            (
                f"{one.version} (deleted)" if one.deleted_at is not None else one.version,
                f"{one.created_at:%Y-%m-%d %H:%M}",
                one.created_by,
                f"{one.metrics[VALIDATION_SCORE]:.4g}" if VALIDATION_SCORE in one.metrics else "-",
                ", ".join(one.aliases) or "-",
                one.digest[:12],
                one.description or "-",
            )
            for one in versions
        ],
    )


def _print_lineage(tree: Lineage) -> None:
    references = {node.digest: ", ".join(node.references) for node in tree.nodes}

    def name(digest: str) -> str:
        # A newer registry may have kinds of experts that this t2 leaves out of the nodes.
        return references.get(digest) or f"@sha256:{digest}"

    print()
    print_table(
        ("expert", "α", "of"),
        [(name(edge.child), f"{edge.alpha:.6g}", name(edge.parent)) for edge in tree.edges],
        none="mixed of nothing, and nothing mixed of it",
    )
    if tree.truncated:
        print("t2: there is more of this family than the registry tells at once", file=sys.stderr)
