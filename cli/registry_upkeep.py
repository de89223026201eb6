"""``t2 registry migrate|token|gc|doctor|export|import``: on the configured database and files, not on a server.

So the first token can be made before a server listens, and a registry be looked at while its server is away.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t2.cli.output import print_fields, print_json, print_table
from t2.core.errors import ArgumentError, InvalidRequestError, StorageError
from t2.core.files import atomic_file

if TYPE_CHECKING:
    from t2.registry.services.service import Service
    from t2.registry.settings import ServerSettings

_Config = Annotated[Path | None, typer.Option("--config", help="A TOML file of the server's settings.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_token = typer.Typer(help="Make, list and revoke access tokens of a registry server.", no_args_is_help=True)


def add_to(registry: typer.Typer) -> None:
    """Add the commands to ``t2 registry``."""
    registry.command("migrate")(_migrate)
    registry.add_typer(_token, name="token")
    registry.command("gc")(_gc)
    registry.command("doctor")(_doctor)
    registry.command("export")(_export)
    registry.command("import")(_import)


def _migrate(
    revision: Annotated[
        str, typer.Argument(help="Where to: a revision, head, or base for an empty database.")
    ] = "head",
    yes: Annotated[
        bool, typer.Option("--yes", help="Go back to an older revision, and lose what it cannot hold.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be done.")] = False,
    config: _Config = None,
    as_json: _Json = False,
) -> None:
    """Bring the database to the newest schema, or to another. It is made where there is none."""
    from t2.registry.db import migrate
    from t2.registry.open import open_database

    database = open_database(_settings(config))
    try:
        before = migrate.current(database)
        steps = migrate.planned(database, revision)
        down = bool(steps) and before is not None and steps[0] == before
        if down and not (yes or dry_run):
            raise ArgumentError(f"going back to {revision} drops tables and what is in them; add --yes after a backup")
        if not dry_run:
            migrate.migrate(database, revision)
        after = before if dry_run else migrate.current(database)
    finally:
        database.close()
    if as_json:
        print_json({"before": before, "after": after, "down": down, "steps": steps})
    elif not steps:
        print(f"nothing to do: the database is at revision {before or 'base'}")
    else:
        verb = ("would undo" if dry_run else "undid") if down else ("would run" if dry_run else "ran")
        print(f"{verb} {', '.join(steps)}; the database is at revision {after or 'base'}")


@_token.command("create")
def _create(
    name: Annotated[str, typer.Argument(help="Whom or what it is for; stands in the audit log.")],
    scope: Annotated[list[str], typer.Option("--scope", help="read, write or admin; may be repeated.")] = ["read"],  # noqa: B006 - typer copies it
    days: Annotated[float | None, typer.Option("--days", help="Days until it expires; never without.")] = None,
    config: _Config = None,
    as_json: _Json = False,
) -> None:
    """Make a token and print it. This once: only its hash is kept."""
    with _registry(config) as service:
        token = service.create_token(name, scope, days=days)  # type: ignore[arg-type]  # the service checks them
    if as_json:
        print_json(token.model_dump(mode="json"))
    else:
        print(token.secret)


@_token.command("list")
def _list(config: _Config = None, as_json: _Json = False) -> None:
    """List tokens, without their secrets."""
    with _registry(config) as service:
        tokens = service.list_tokens()
    if as_json:
        print_json([token.model_dump(mode="json") for token in tokens])
        return
    print_table(
        ("id", "name", "begins with", "scopes", "created", "expires", "last used", "revoked"),
        [
            (
                token.id,
                token.name,
                token.prefix,
                "+".join(token.scopes),
                *map(_day, (token.created_at, token.expires_at, token.last_used_at, token.revoked_at)),
            )
            for token in tokens
        ],
        none="no tokens",
    )


@_token.command("revoke")
def _revoke(
    id: Annotated[int, typer.Argument(help="Its id, from the list.")],
    config: _Config = None,
    as_json: _Json = False,
) -> None:
    """Revoke a token, for ever."""
    with _registry(config) as service:
        token = service.revoke_token(id)
    if as_json:
        print_json(token.model_dump(mode="json"))
    else:
        print(f"revoked {token.prefix}… ({token.name})")


def _gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would go, and remove nothing.")] = False,
    grace: Annotated[
        float | None, typer.Option("--grace", help="Seconds for which bytes without a version are left alone.")
    ] = None,
    retention: Annotated[
        float | None, typer.Option("--retention", help="Days for which what was deleted can be restored.")
    ] = None,
    config: _Config = None,
    as_json: _Json = False,
) -> None:
    """Remove what was deleted long ago, and files of no version."""
    from t2.registry.services.garbage import Policy, collect

    settings = _settings(config, gc_grace_seconds=grace, retention_days=retention)
    policy = Policy(
        grace=timedelta(seconds=settings.gc_grace_seconds),
        retention=timedelta(days=settings.retention_days),
        keys=timedelta(hours=settings.idempotency_hours),
    )
    with _opened(settings) as service:
        removed = collect(service.database, service.store, service.actor, policy, dry_run=dry_run)
    freed = sum(item.bytes for item in removed)
    if as_json:
        print_json({"dry_run": dry_run, "bytes": freed, "removed": [asdict(item) for item in removed]})
        return
    if removed:
        print_table(("kind", "bytes", "what"), [(item.kind, item.bytes or "-", item.name) for item in removed])
    kinds = Counter(item.kind for item in removed)
    told = ", ".join(f"{count} {kind}{'s' if count != 1 and kind != 'keys' else ''}" for kind, count in kinds.items())
    print(f"{'would remove' if dry_run else 'removed'} {told or 'nothing'}; {freed} bytes")


def _doctor(
    deep: Annotated[
        bool, typer.Option("--deep", help="Read and hash every file, instead of looking at sizes.")
    ] = False,
    fix: Annotated[
        bool, typer.Option("--fix", help="First write anew the copies in experts' rows that are wrong.")
    ] = False,
    config: _Config = None,
    as_json: _Json = False,
) -> None:
    """Check that all that the registry promises is there. Exits with 2 where something is wrong."""
    from t2.registry.db import migrate
    from t2.registry.open import open_blobs, open_database, user_name
    from t2.registry.services.actor import Actor
    from t2.registry.services.doctor import Examined, examine, mend

    settings = _settings(config)
    database, store = open_database(settings), open_blobs(settings)
    seen, wrong, findings, mended = Examined(), False, [], list[str]()
    try:
        if fix:
            migrate.check_current(database)
            mended = mend(database, Actor("cli", user_name()))
            if not as_json:
                for path in mended:
                    print(f"fixed  row: {path}: what its row copies is written anew")
        for finding in examine(
            database, store, deep=deep, grace=timedelta(seconds=settings.gc_grace_seconds), seen=seen
        ):
            wrong = wrong or finding.wrong
            findings.append(asdict(finding))
            if not as_json:
                print(f"{'WRONG' if finding.wrong else 'note '}  {finding.check}: {finding.text}")
    finally:
        database.close()
    if as_json:
        print_json({"healthy": not wrong, "fixed": mended, "findings": findings, "examined": asdict(seen)})
    else:
        print_fields(
            [
                ("database", database.location),
                ("store", store.location),
                ("experts", seen.experts),
                ("versions", seen.versions),
                ("runs", seen.runs),
                ("files", f"{seen.blobs} of {seen.bytes} bytes, {seen.hashed} bytes hashed"),
                ("healthy", "no" if wrong else "yes"),
            ]
        )
    if wrong:
        raise typer.Exit(2)


def _export(
    file: Annotated[Path, typer.Argument(help="The archive to write.")],
    namespace: Annotated[str | None, typer.Option("--namespace", help="Only this namespace.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    config: _Config = None,
    as_json: _Json = False,
) -> None:
    """Write the registry or a namespace to one file. Any registry can import it."""
    from t2.registry.portable.exporting import export

    if file.exists() and not overwrite:
        raise ArgumentError(f"{file} exists; give another name, or --overwrite")
    with _registry(config) as service, atomic_file(file) as out:
        counts = export(service.database, service.store, out, namespace=namespace)
    _print_counts(counts, as_json, {"file": str(file), "bytes": file.stat().st_size})


def _import(
    file: Annotated[Path, typer.Argument(help="An archive that `t2 registry export` wrote.")],
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Also take its access tokens; their holders can then use this registry.")
    ] = False,
    config: _Config = None,
    as_json: _Json = False,
) -> None:
    """Read an archive into the registry, empty or not. The same again changes nothing."""
    from t2.registry.portable.importing import restore

    with _registry(config) as service:
        try:
            source = file.open("rb")
        except OSError as error:
            raise StorageError(f"cannot read {file}: {error.strerror or error}") from error
        with source:
            try:
                result = restore(
                    service.database, service.store, service.actor, source, tokens=tokens, limits=service.limits
                )
            except InvalidRequestError as error:
                raise InvalidRequestError(f"{file}: {error}") from error
    if as_json:
        print_json({"file": str(file), **asdict(result)})
        return
    _print_counts(result.counts, False, {})
    for line in result.kept:
        print(f"kept  {line}")
    if result.differing > len(result.kept):
        print(f"kept  and {result.differing - len(result.kept)} more")


def _print_counts(counts: dict[str, int], as_json: bool, more: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps({**more, "counts": counts}, indent=2))
    elif fields := [*more.items(), *counts.items()]:
        print_fields(fields)
    else:
        print("nothing")


def _settings(config: Path | None, **overrides: Any) -> ServerSettings:
    from t2.registry.settings import load_settings

    return load_settings(config, **overrides)


@contextmanager
def _registry(config: Path | None) -> Iterator[Service]:
    with _opened(_settings(config)) as service:
        yield service


@contextmanager
def _opened(settings: ServerSettings) -> Iterator[Service]:
    from t2.registry.open import open_configured

    with open_configured(settings) as service:
        yield service


def _day(at: datetime | None) -> str:
    return f"{at:%Y-%m-%d %H:%M}" if at is not None else "-"
