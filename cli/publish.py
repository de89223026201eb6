"""``t2 expert push``, ``pull``, ``tag``, ``describe``, ``alias``, ``delete``, ``restore``: experts in the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from t2.cli.output import print_fields, print_json, print_table
from t2.cli.shelves import AsJson, Registry, parse_metrics
from t2.core.digests import sha256
from t2.core.errors import ArgumentError, NotFoundError, StorageError, nearest
from t2.core.expertfile import read_expert
from t2.core.files import atomic_write
from t2.core.references import ExpertName, Reference, is_name, parse_alias, parse_name, parse_reference
from t2.harness.catalogue import find_expert
from t2.harness.leaderboard import require_verdict
from t2.harness.publishing import push
from t2.harness.registry import every, fetch, registry
from t2.registry.names import check_tag
from t2.registry.schemas import MAX_PAGE

_Name = Annotated[str, typer.Argument(help="The expert: namespace/name.")]
_Versioned = Annotated[str, typer.Argument(help="The expert, namespace/name, or one version of it, namespace/name@3.")]


def add_to(experts: typer.Typer) -> None:
    """Add the commands to ``t2 expert``."""
    experts.command("push")(_push)
    experts.command("pull")(_pull)
    experts.command("tag")(_tag)
    experts.command("describe")(_describe)
    experts.command("alias")(_alias)
    experts.command("delete")(_delete)
    experts.command("restore")(_restore)


def _push(
    expert: Annotated[str, typer.Argument(help="A file, a folder of t2 train, or a name in T2_EXPERTS_DIR.")],
    name: Annotated[
        str | None, typer.Argument(help="Its name there, namespace/name; without it default/ and its own.")
    ] = None,
    alias: Annotated[str | None, typer.Option(help="Point an alias to it, such as production.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Tag the expert; may be repeated.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="A number about it: acc=0.75; may be repeated.")] = None,
    description: Annotated[str, typer.Option(help="A note on this version.")] = "",
    registry_: Registry = None,
    as_json: AsJson = False,
) -> None:
    """Publish an expert as a new version.

    The curve and the scores that lie beside its file go with it.
    """
    file = find_expert(expert)
    found = read_expert(file, canonical=True)
    if name is None and not is_name(found.manifest.name):
        raise ArgumentError(
            f"{file} calls itself {found.manifest.name!r}, which no registry takes as a name; give one: "
            f"t2 expert push {expert} namespace/name"
        )
    target = parse_name(name if name is not None else found.manifest.name)
    metrics = parse_metrics(metric or ())
    for one in tag or ():
        check_tag(one)
    if alias is not None:
        parse_alias(alias)
    with registry(registry_) as client:
        version = push(client, target, file, metrics=metrics, tags=tag or (), alias=alias, description=description)
        location = client.location
    if as_json:
        print_json(version.model_dump(mode="json"))
        return
    print_fields(
        [
            ("published", version.reference if version.created else f"{version.reference}, which was there already"),
            ("registry", location),
            ("digest", version.digest),
            ("aliases", ", ".join(version.aliases) or "-"),
            *((key, f"{value:.6g}") for key, value in version.metrics.items()),
        ]
    )


def _pull(
    reference: Annotated[str, typer.Argument(help="namespace/name, @version, @alias or @sha256:…")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A file, or a folder for it; without it <name>.safetensors."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another file that is there.")] = False,
    registry_: Registry = None,
    as_json: AsJson = False,
) -> None:
    """Write an expert of the registry to a file, and check its digest."""
    wanted = parse_reference(reference)
    found = fetch(wanted, registry_)
    name = wanted.expert.name if wanted.expert is not None else found.file.digest[:12]
    path = output if output is not None else Path(f"{name}.safetensors")
    if path.is_dir():
        path = path / f"{name}.safetensors"
    try:
        there = sha256(path.read_bytes()) if path.exists() else None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    if there not in (None, found.file.digest) and not overwrite:
        raise ArgumentError(f"{path} exists and is another expert; name another file, or give --overwrite")
    if there != found.file.digest:
        atomic_write(path, found.data)
    if as_json:
        print_json({"path": str(path), "reference": found.reference, "digest": found.file.digest})
    else:
        print_fields([("expert", found.reference), ("digest", found.file.digest), ("file", path)])


def _tag(
    name: _Name,
    tags: Annotated[list[str] | None, typer.Argument(help="Tags to add.")] = None,
    remove: Annotated[list[str] | None, typer.Option(help="A tag to remove; may be repeated.")] = None,
    registry_: Registry = None,
    as_json: AsJson = False,
) -> None:
    """Add tags to an expert, remove some, or list them."""
    expert = parse_name(name)
    with registry(registry_) as client:
        changed = (
            client.change_tags(expert, add=tags or (), remove=remove or ())
            if tags or remove
            else client.get_expert(expert)
        )
    if as_json:
        print_json(list(changed.tags))
    else:
        print("\n".join(changed.tags) or "no tags")


def _describe(
    name: _Name,
    text: Annotated[str, typer.Argument(help="What the expert is.")],
    registry_: Registry = None,
    as_json: AsJson = False,
) -> None:
    """Set an expert's description, which searches look through."""
    with registry(registry_) as client:
        changed = client.describe_expert(parse_name(name), text)
    if as_json:
        print_json(changed.model_dump(mode="json"))
    else:
        print(f"described {changed.name}" if text else f"{changed.name} has no description now")


def _alias(
    name: _Name,
    alias: Annotated[str | None, typer.Argument(help="The alias; without it all are listed.")] = None,
    version: Annotated[int | None, typer.Argument(help="The version that it is to point to.")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the alias.")] = False,
    history: Annotated[bool, typer.Option("--history", help="List who moved it, when, from where to where.")] = False,
    reason: Annotated[str, typer.Option(help="Why, for the history.")] = "",
    margin: Annotated[
        float | None,
        typer.Option(
            "--require-verdict",
            metavar="MARGIN",
            help="Move it only where the runs of the version show no drop above this beside the one it points to.",
        ),
    ] = None,
    registry_: Registry = None,
    as_json: AsJson = False,
) -> None:
    """Point an alias to a version, remove it, or list aliases."""
    expert = parse_name(name)
    if (version is not None or delete) and history:
        raise ArgumentError("--history only lists; leave out the version and --delete")
    if delete and (alias is None or version is not None):
        raise ArgumentError("--delete removes one alias: t2 expert alias NAME ALIAS --delete")
    if reason and version is None and not delete:
        raise ArgumentError("--reason is for a change; give a version or --delete")
    if margin is not None and version is None:
        raise ArgumentError("--require-verdict is for a move; give the alias and a version")
    if alias is not None:
        parse_alias(alias)
    with registry(registry_) as client:
        if history:
            events = list(every(lambda cursor: client.alias_history(expert, alias, cursor=cursor, limit=MAX_PAGE)))
            if as_json:
                print_json([event.model_dump(mode="json") for event in events])
                return
            print_table(
                ("at", "alias", "from", "to", "by", "reason"),
                [
                    (
                        f"{event.at:%Y-%m-%d %H:%M:%S}",
                        event.alias,
                        event.previous or "-",
                        event.version or "-",
                        event.by,
                        event.reason or "-",
                    )
                    for event in events
                ],
                none=f"no alias of {expert} was ever set" if alias is None else f"{expert} never had an alias {alias}",
            )
            return
        if delete:
            assert alias is not None
            client.delete_alias(expert, alias, reason=reason)
        elif version is not None:
            assert alias is not None
            if margin is not None and any(one.alias == alias for one in client.list_aliases(expert)):
                found_so = require_verdict(client, expert, alias, version, margin)
                reason = f"{reason}; {found_so}" if reason else found_so
            client.set_alias(expert, alias, version, reason=reason)
        aliases = client.list_aliases(expert)
    found = [one for one in aliases if delete or alias in (None, one.alias)]
    if alias is not None and not delete and not found:
        raise NotFoundError(f"{expert} has no alias {alias}{nearest(alias, [one.alias for one in aliases])}")
    if as_json:
        print_json([one.model_dump(mode="json") for one in found])
    else:
        print_table(
            ("alias", "version", "digest", "since", "by"),
            [
                (one.alias, one.version, one.digest[:12], f"{one.updated_at:%Y-%m-%d %H:%M}", one.updated_by)
                for one in found
            ],
            none=f"{expert} has no aliases",
        )


def _delete(
    name: _Versioned,
    registry_: Registry = None,
    as_json: AsJson = False,
) -> None:
    """Take an expert or a version out of all lists. It can be restored."""
    expert, version = _named(name)
    with registry(registry_) as client:
        client.delete(expert, version)
    if as_json:
        print_json({"deleted": str(Reference(expert, version=version))})
    else:
        written = Reference(expert, version=version)
        print(f"deleted {written}; until it is collected, t2 expert restore {written} brings it back")


def _restore(
    name: _Versioned,
    registry_: Registry = None,
    as_json: AsJson = False,
) -> None:
    """Bring back an expert, or one version, that was deleted."""
    expert, version = _named(name)
    with registry(registry_) as client:
        client.restore(expert, version)
    if as_json:
        print_json({"restored": str(Reference(expert, version=version))})
    else:
        print(f"restored {Reference(expert, version=version)}")


def _named(text: str) -> tuple[ExpertName, int | None]:
    reference = parse_reference(text)
    if reference.expert is None or reference.alias is not None or reference.digest is not None:
        raise ArgumentError(f"{text}: name an expert, namespace/name, or one version by its number, namespace/name@3")
    return reference.expert, reference.version
