"""A registry of any size for the benchmarks: PostgreSQL tables filled by COPY with a spread as teams would have it.

The first files are real and lie in the blob store; of the others only the rows are there, which is all that lists and
searches read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
import sqlalchemy

from t2.core.digests import sha256
from t2.core.expertfile import encode_expert
from t2.core.manifest import BaseModelRef, Kind, Manifest
from t2.registry.blobs.base import BlobStore
from t2.registry.db import models
from t2.registry.db.database import Database
from t2.registry.schemas import Expert, Version

TASKS = ("gsm8k", "math500", "arc_easy", "arc_challenge", "mbpp", "humaneval", "boolq", "hellaswag")
DOMAINS = ("math", "math", "reasoning", "reasoning", "code", "code", "reading", "commonsense")
ADJECTIVES = ("brave", "calm", "eager", "fancy", "gentle", "happy", "jolly", "kind", "lucky", "merry", "proud", "witty")
NOUNS = ("badger", "condor", "dolphin", "falcon", "gazelle", "heron", "ibex", "jaguar", "lemur", "marmot", "otter")
TAGS = ("nightly", "paper", "ablation", "sweep", "candidate", "released", "deprecated", "team:nlp", "team:code")
TAG_SHARES = (0.5, 0.1, 0.15, 0.3, 0.05, 0.02, 0.05, 0.2, 0.2)
RARE_TAG = "rare"
"""A tag of three experts: the first, one in the middle and the last."""
ALONE = 31.25
"""A value of the metric ``latency`` that one expert has, in the middle; those of all others are below 10."""
REAL_FILES = 50
LONG_CURVE, CURVE = 20_000, 200

_LAYERS, _RANKS = 30, {"q": 576, "k": 192, "v": 192, "o": 576, "gate": 576, "up": 576, "down": 576}


def targets() -> dict[str, int]:
    """The matrices and ranks of SmolLM2-135M: 210 of them, 97,920 numbers, a file of about 400 KB."""
    block = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"}
    return {
        f"model.layers.{layer}.{block.get(name, 'mlp')}.{name}_proj.weight": rank
        for layer in range(_LAYERS)
        for name, rank in _RANKS.items()
    }


def expert_file(seed: int, **fields: Any) -> bytes:
    """An expert of about 400 KB; other seeds give other contents."""
    generator = np.random.default_rng(seed)
    manifest = Manifest(
        **{
            "name": "benchmark",
            "base": BaseModelRef(id="org/model-0", fingerprint=fingerprint(0)),
            "targets": targets(),
            "task": TASKS[0],
            "domain": DOMAINS[0],
            "method": "reinforce",
            **fields,
        }
    )
    vectors = {name: generator.normal(1, 0.1, rank).astype(np.float32) for name, rank in manifest.targets.items()}
    return encode_expert(manifest, vectors)


def fingerprint(model: int) -> str:
    """Of the base model with this number."""
    return sha256(f"model {model}".encode())


def fill(
    database: Database, store: BlobStore, experts: int, points: int, seed: int = 0, versions: int = 5
) -> list[str]:
    """Fill the empty tables of a migrated PostgreSQL database.

    Namespaces have very different sizes, the largest a sixth of all experts; one in four experts has 2 to ``versions``
    versions; half have the alias ``production``. Curves have 200 points, and a twelfth of the points belongs to curves
    of 20,000.

    Args:
        experts: how many that are not deleted; one deleted is added for fifty.
        points: of reward curves, altogether.
        versions: that an expert has at most.

    Returns:
        Paths of experts whose first version has a curve; the first is a long one if there are points enough.
    """
    random = np.random.default_rng(seed)
    experts += experts // 50
    start = datetime(2025, 1, 1, tzinfo=UTC)
    files = [expert_file(seed) for seed in range(min(REAL_FILES, experts))]
    for data in files:
        store.put(sha256(data), data)
    namespaces, bases = max(2, experts // 500), 12
    of_namespace = random.choice(namespaces, experts, p=_falling(namespaces))
    of_base = random.choice(bases, experts, p=_falling(bases))
    of_task = random.integers(0, len(TASKS), experts)
    versions_of = np.where(random.random(experts) < 0.25, random.integers(min(2, versions), versions + 1, experts), 1)
    seconds = np.sort(random.random(experts)) * 400 * 86400
    manifests = _manifests(bases)
    fingerprints = [fingerprint(base) for base in range(bases)]

    tables = ("expert", "blob", "version", "metric", "tag", "alias", "alias_event")
    rows: dict[str, list[Sequence[Any]]] = {table: [] for table in tables}
    version_id = 0
    curved: list[tuple[int, str]] = []
    for i in range(experts):
        expert, space, task, base = i + 1, int(of_namespace[i]), int(of_task[i]), int(of_base[i])
        name = f"{ADJECTIVES[i % 12]}-{NOUNS[i % 11]}-{i}"
        path = f"team-{space}/{name}"
        made = start + timedelta(seconds=float(seconds[i]))
        updated = made + timedelta(seconds=float(random.random() * 20 * 86400))
        kind: Kind = "mixture" if i % 10 == 9 else "classifier" if i % 10 == 8 else "expert"
        description = f"{TASKS[task]} run {i % 997} with {ADJECTIVES[(i // 7) % 12]} settings"
        number = int(versions_of[i])
        score = None
        for each in range(1, number + 1):
            version_id += 1
            digest = sha256(files[i]) if each == 1 and i < len(files) else sha256(f"{i} {each}".encode())
            size = len(files[i]) if each == 1 and i < len(files) else 400_000
            rows["blob"].append((digest, size, made, made))
            # fmt: off
            rows["version"].append((
                version_id, expert, each, digest, kind, base + 1, TASKS[task], DOMAINS[task], "reinforce", "",
                len(_RANKS) * _LAYERS, sum(_RANKS.values()) * _LAYERS, 1000,
                manifests[base, task], made, "api:seed", None,
            ))
            # fmt: on
            score = round(float(random.beta(5, 3)), 4) if random.random() < 0.9 else None
            metrics = {"validation.score": score} if score is not None else {}
            metrics[f"{TASKS[task]}/acc,none"] = float(random.random())
            alone = i == experts // 2 and each == number
            metrics["latency"] = ALONE if alone else float(random.random() * 10)
            rows["metric"] += [(version_id, *metric) for metric in metrics.items()]
            if each == 1 and i % 51 != 50:
                curved.append((version_id, path))
        chosen = {tag for tag, share in zip(TAGS, TAG_SHARES, strict=True) if random.random() < share}
        chosen.add(f"run:{i // 20}")
        if i in (0, experts // 3, experts - 2):
            chosen.add(RARE_TAG)
        rows["tag"] += [(expert, tag) for tag in sorted(chosen)]
        if i % 2 == 0:
            rows["alias"].append((expert, "production", number, updated, "api:seed"))
            rows["alias_event"].append((expert, "production", number, None, updated, "api:seed", ""))
        deleted = updated if i % 51 == 50 else None
        latest = Version(
            name=path,
            version=number,
            digest=digest,
            size=size,
            kind=kind,
            task=TASKS[task],
            domain=DOMAINS[task],
            method="reinforce",
            description="",
            base_model=f"org/model-{base}",
            base_fingerprint=fingerprints[base],
            matrices=len(_RANKS) * _LAYERS,
            values=sum(_RANKS.values()) * _LAYERS,
            training_docs=1000,
            aliases=("production",) if i % 2 == 0 else (),
            metrics=dict(sorted(metrics.items())),
            created_at=made,
            created_by="api:seed",
            deleted_at=None,
        )
        card = Expert(
            name=path,
            kind=kind,
            description=description,
            tags=tuple(sorted(chosen)),
            versions=number,
            latest=latest,
            created_at=made,
            updated_at=updated,
            deleted_at=deleted,
        )
        # fmt: off
        rows["expert"].append((
            expert, space + 1, name, path, kind, description, f"{path} {TASKS[task]} {description}".lower(),
            number, number, number, TASKS[task], DOMAINS[task], base + 1, score, made, updated,
            deleted, card.model_dump_json(), updated,
        ))
        # fmt: on

    raw = database.engine.raw_connection()
    try:
        connection = raw.driver_connection
        assert isinstance(connection, psycopg.Connection)
        connection.execute("SET statement_timeout = 0")
        spaces = ((i + 1, f"team-{i}", "", start) for i in range(namespaces))
        _copy(connection, "namespace", "id name description created_at", spaces)
        model = ((i + 1, fingerprint(i), f"org/model-{i}", None, json.dumps(targets()), start) for i in range(bases))
        _copy(connection, "base_model", "id fingerprint model_id revision targets created_at", model)
        _copy(connection, "blob", "digest size created_at touched_at", rows["blob"])
        _copy(
            connection,
            "expert",
            "id namespace_id name path kind description search_text last live latest task domain base_model_id score "
            "created_at updated_at deleted_at card carded_at",
            rows["expert"],
        )
        _copy(
            connection,
            "version",
            'id expert_id number digest kind base_model_id task domain method description matrices "values" '
            "training_docs manifest created_at created_by deleted_at",
            rows["version"],
        )
        _copy(connection, "metric", "version_id name value", rows["metric"])
        _copy(connection, "tag", "expert_id tag", rows["tag"])
        _copy(connection, "alias", "expert_id alias number updated_at updated_by", rows["alias"])
        _copy(connection, "alias_event", 'expert_id alias number previous at "by" reason', rows["alias_event"])
        lengths = _curve_lengths(points, len(curved))
        spread = [curved[i] for i in random.permutation(len(curved))[: len(lengths)]]
        fields = "version_id step split reward score kl learning_rate gradient_norm seconds"
        curves = ((version, length) for (version, _), length in zip(spread, lengths, strict=True))
        _copy(connection, "curve_point", fields, _curve_points(curves, random))
        for table in models.Table.metadata.sorted_tables:
            if "id" in table.c and isinstance(table.c.id.type, sqlalchemy.Integer):
                sequence = f"pg_get_serial_sequence('{table.name}', 'id')"
                connection.execute(f"SELECT setval({sequence}, coalesce(max(id), 1)) FROM {table.name}".encode())
        connection.commit()
        connection.autocommit = True
        connection.execute("VACUUM (ANALYZE)")
        # Else the database writes what was filled in to disk while it is measured, for minutes.
        connection.execute("CHECKPOINT")
        connection.autocommit = False
    finally:
        raw.invalidate()
        raw.close()
    return [path for _, path in spread]


def _falling(count: int) -> npt.NDArray[np.float64]:
    """Shares of which the n-th is an n-th of the first."""
    shares: npt.NDArray[np.float64] = 1 / np.arange(1, count + 1)
    shares /= shares.sum()
    return shares


def _manifests(bases: int) -> dict[tuple[int, int], str]:
    found = {}
    for base in range(bases):
        for task in range(len(TASKS)):
            manifest = Manifest(
                name="benchmark",
                base=BaseModelRef(id=f"org/model-{base}", fingerprint=fingerprint(base)),
                targets=targets(),
                task=TASKS[task],
                domain=DOMAINS[task],
                method="reinforce",
            )
            found[base, task] = json.dumps(manifest.model_dump(mode="json", exclude={"training_docs"}))
    return found


def _curve_lengths(points: int, most: int) -> list[int]:
    long = points // 12 // LONG_CURVE
    rest = points - long * LONG_CURVE
    short = min(rest // CURVE, most - long)
    return [LONG_CURVE] * long + [CURVE] * short


def _curve_points(curves: Iterable[tuple[int, int]], random: np.random.Generator) -> Iterable[Sequence[Any]]:
    for version, length in curves:
        validation = length // 10
        train = length - validation
        noise = random.normal(0, 0.05, length)
        for i in range(train):
            reward = 1 - 0.9 ** (i * 40 / train) + noise[i]
            yield version, i, "train", reward, reward, 0.01, 2e-3, 1.0, i * 3.5
        for i in range(validation):
            score = 0.5 + 0.3 * i / validation + noise[train + i]
            yield version, i * 9, "validation", score, score, None, None, None, i * 31.5


def _copy(connection: psycopg.Connection[Any], table: str, columns: str, rows: Iterable[Sequence[Any]]) -> None:
    command = f"COPY {table} ({', '.join(columns.split())}) FROM STDIN"
    with connection.cursor() as cursor, cursor.copy(command.encode()) as copy:
        for row in rows:
            copy.write_row(row)
