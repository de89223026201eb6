"""Whole registries on each kind of storage, something to put into them, and everything that is in them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from t2.core.curve import CurvePoint
from t2.core.manifest import Parent
from t2.core.references import parse_name
from t2.core.results import EvaluatedBase
from t2.registry.blobs.base import BlobStore
from t2.registry.blobs.local import LocalBlobs
from t2.registry.blobs.s3 import Credentials, S3Blobs
from t2.registry.db import migrate
from t2.registry.db.database import Database
from t2.registry.schemas import ExpertQuery, Page
from t2.registry.services.actor import Actor
from t2.registry.services.service import Service
from tests.registry import servers
from tests.registry.samples import FINGERPRINT, expert_bytes, run_bytes

STORAGES = ("sqlite+folder", "postgres+s3")
ACTOR = Actor("embedded", "tester")
MATH, MIX, OTHER = parse_name("team/math"), parse_name("team/mix"), parse_name("others/code")


@contextlib.contextmanager
def registry(storage: str, folder: Path, request: pytest.FixtureRequest) -> Iterator[Service]:
    """An empty registry."""
    with contextlib.ExitStack() as stack:
        store: BlobStore
        if storage == "sqlite+folder":
            url = f"sqlite:///{folder / 'registry.db'}"
            store = LocalBlobs(folder / "blobs")
        else:
            url = stack.enter_context(servers.new_database(request.getfixturevalue("postgres_server")))
            server: servers.S3 = request.getfixturevalue("s3_server")
            credentials = Credentials(server.access_key, server.secret_key)
            store = S3Blobs(server.bucket(), "experts", endpoint=server.endpoint, credentials=credentials)
        database = Database(url, pool=5)
        migrate.migrate(database)
        yield stack.enter_context(Service(database, store, ACTOR))


def fill(service: Service) -> None:
    """Something of everything."""
    service.create_namespace("team", "the team")
    ranks = {f"model.layers.{layer}.mlp.up_proj.weight": 8 for layer in range(5)}
    service.put_base_model(FINGERPRINT, "org/model", "main", ranks)
    first = service.publish(MATH, expert_bytes(0), description="the first", idempotency_key="k")
    service.publish(MATH, expert_bytes(1))
    service.publish(MATH, expert_bytes(2))
    service.publish(MIX, expert_bytes(3, kind="mixture", parents=(Parent(digest=first.digest, alpha=0.5),)))
    service.publish(OTHER, expert_bytes(0))
    service.publish(OTHER, expert_bytes(4))
    service.describe_expert(MATH, "solves problems ✓")
    service.change_tags(MATH, add=["best", "team:ours"])
    service.set_metrics(MATH, 2, {"validation.score": 0.1 + 0.2, "x": -1e-300})
    service.add_points(
        MATH, 1, [CurvePoint(step=i, split="train", reward=i / 3, score=0, kl=None, seconds=i) for i in range(2500)]
    )
    service.add_points(MATH, 1, [CurvePoint(step=9, split="validation", reward=1, score=0.25, kl=0.5, seconds=9)])
    service.set_alias(MATH, "production", 1, reason="first")
    service.set_alias(MATH, "production", 2, reason="better")
    service.set_alias(MATH, "staging", 3)
    service.delete_alias(MATH, "staging", reason="broken")
    service.delete(MATH, 3)
    service.delete(OTHER)
    service.push_run("team", run_bytes(0, experts=(first.digest, "0" * 64)))
    service.push_run("team", run_bytes(1, experts=(first.digest,)))  # with the same samples
    service.push_run("others", run_bytes(0, answers=1, base=EvaluatedBase(id="org/plain")))
    service.create_token("ci", ["write"], days=3)


def pages(fetch: Callable[..., Page[Any]]) -> list[Any]:
    """All items of a list."""
    items: list[Any] = []
    cursor = None
    while True:
        page = fetch(cursor=cursor)
        items += page.items
        cursor = page.next
        if cursor is None:
            return items


def contents(service: Service) -> dict[str, Any]:
    """All that a registry shows, and the bytes of every version; ids and order of making are not in it."""
    experts: dict[str, Any] = {}
    for deleted in (False, True):
        query = ExpertQuery(sort="name", deleted=deleted)
        for expert in pages(partial(service.list_experts, query, limit=2)):
            name = parse_name(expert.name)
            experts[expert.name] = {"expert": expert.model_dump(mode="json")}
            if deleted:
                continue
            versions = pages(partial(service.list_versions, name, limit=2))
            live = [version for version in versions if version.deleted_at is None]
            experts[expert.name] |= {
                "versions": [version.model_dump(mode="json") for version in versions],
                "aliases": [alias.model_dump(mode="json") for alias in service.list_aliases(name)],
                "history": [entry.model_dump(mode="json") for entry in service.alias_history(name).items],
                "curves": [service.curve(name, version.version).model_dump(mode="json") for version in live],
                "bytes": [service.store.get(version.digest) for version in versions],
                "lineage": [service.lineage(version.digest).model_dump(mode="json") for version in live],
            }
    return {
        "experts": experts,
        "runs": [
            (service.get_run(run.namespace, run.digest).model_dump(mode="json"), service.download(run.samples_digest))
            for run in pages(partial(service.list_runs, limit=2))
        ],
        "boards": [row.model_dump(mode="json") for row in pages(service.list_boards)],
        "namespaces": [row.model_dump(mode="json") for row in pages(service.list_namespaces)],
        "base models": [row.model_dump(mode="json") for row in pages(service.list_base_models)],
    }


def log(service: Service) -> list[dict[str, Any]]:
    """The audit log without ids."""
    return [entry.model_dump(mode="json", exclude={"id"}) for entry in pages(service.audit)]


def age(service: Service, table: str, column: str, days: float) -> None:
    """Let the times of a table be so long ago."""
    change = (
        f"datetime({column}, '-{days} days')" if service.database.is_sqlite else f"{column} - interval '{days} days'"
    )
    with service.database.write() as session:
        session.execute(text(f"UPDATE {table} SET {column} = {change} WHERE {column} IS NOT NULL"))
