"""A registry server of 100,000 experts and a million curve points under an open loop of 200 requests a second.

    python -m benchmarks.registry_load [--experts 100000] [--points 1000000] [--rate 200] [--seconds 60] [--workers 2]

Run it in the repository's root. It starts PostgreSQL as it comes (or uses ``T2_TEST_POSTGRES_URL``), migrates, fills
the tables, starts ``t2 registry serve`` and asks it, with an access token, for lists in every order and by every
filter, searches by text, experts, versions, references and curves. Lists and searches are of 50 experts. A page after
99% of the list is asked for as often as the first one, in the same minute.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import psycopg
from sqlalchemy import select

from benchmarks import registry_data as data
from benchmarks.machine import cpu_seconds, describe_machine, describe_versions, resident_bytes
from benchmarks.open_loop import Request, Result, percentile, run_open_loop
from t2.registry.blobs.local import LocalBlobs
from t2.registry.db import migrate, models
from t2.registry.db.database import Database
from t2.registry.services.actor import Actor
from t2.registry.services.service import Service
from tests.registry.servers import free_port, new_database, postgres

TARGET = 0.050
HOST = "127.0.0.1"
DEEP = ("-updated", "name")
Maker = Callable[[np.random.Generator], str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=100_000)
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--connections", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2, help="processes of the server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="2,000 experts for 5 seconds: whether it works")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    if args.quick:
        args.experts, args.points, args.seconds, args.rate = 2000, 20_000, 5.0, 50.0
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        url = stack.enter_context(new_database(stack.enter_context(postgres(folder))))
        database = Database(url, timeout=600)
        migrate.migrate(database)
        began = time.perf_counter()
        store = LocalBlobs(folder / "blobs")
        curved = data.fill(database, store, args.experts, args.points, args.seed)
        print(f"filled in {time.perf_counter() - began:.0f} s", flush=True)
        service = Service(database, store, Actor("cli", "benchmark"))
        token = service.create_token("benchmark", ["read"]).secret
        sizes = table_sizes(url)
        with database.read() as session:
            live = select(models.Expert.path).where(models.Expert.deleted_at.is_(None)).order_by(models.Expert.id)
            paths = session.scalars(live).all()
        database.close()
        port = free_port()
        process = stack.enter_context(server(url, folder, port, args.workers))
        deep = {sort: cursor_after(port, token, sort, len(paths) * 99 // 100) for sort in DEEP}
        mix = kinds(list(paths), curved, deep, args.experts)
        headers = {"Authorization": f"Bearer {token}"}
        shape = {"connections": args.connections, "headers": headers}
        run_open_loop(HOST, port, draw(mix, int(args.rate * 3), args.seed + 1), rate=args.rate / 2, **shape)
        machine = describe_machine()
        requests = draw(mix, int(args.rate * args.seconds), args.seed)
        parts = {"server": process.pid, "PostgreSQL": postmaster(url)}
        roots = {part: root for part, root in parts.items() if root}
        before = {part: cpu_seconds(root) for part, root in roots.items()} | {"the loop": time.process_time()}
        result = run_open_loop(HOST, port, requests, rate=args.rate, **shape)
        after = {part: cpu_seconds(root) for part, root in roots.items()} | {"the loop": time.process_time()}
        spent = {part: (after[part] - before[part]) * 1000 / len(requests) for part in after}
        memory = resident_bytes(process.pid)
        with psycopg.connect(url) as connection:
            postgres_version = connection.info.parameter_status("server_version")
        versions = describe_versions("fastapi", "uvicorn", "SQLAlchemy", "psycopg", "pydantic")
        report = {
            "command": " ".join(["python -m benchmarks.registry_load", *sys.argv[1:]]),
            "machine": machine,
            "versions": f"PostgreSQL {postgres_version}, {versions}",
            "workers": args.workers,
            "tables": sizes,
            "server_bytes": memory,
            "cpu_ms_a_request": spent,
            "errors": result.errors,
            "rows": summary(result),
        }
    print_report(report, result, requests, args)
    if args.output:
        args.output.write_text(json.dumps(report, indent=2))


def kinds(
    paths: list[str], curved: list[str], deep: dict[str, str], experts: int
) -> dict[str, tuple[float, list[Maker]]]:
    """The kinds of requests: what share each has, and what makes one."""

    def lists(**query: Any) -> Maker:
        return lambda random: (
            "/v1/experts?"
            + urlencode(
                {name: value(random) if callable(value) else value for name, value in query.items()}, doseq=True
            )
        )

    def show(pattern: str, among: list[str]) -> Maker:
        return lambda random: pattern.format(quote(pick(random, among)), reference=quote(pick(random, among), safe=""))

    def pick(random: np.random.Generator, among: Any) -> Any:
        return among[int(random.integers(len(among)))]

    def one_of(among: Any) -> Callable[[np.random.Generator], Any]:
        return lambda random: pick(random, among)

    base = one_of([f"org/model-{i}" for i in range(12)])
    task, domain, tag = one_of(data.TASKS), one_of(sorted(set(data.DOMAINS))), one_of(data.TAGS)
    sorts = ("-updated", "updated", "name", "-name", "-score", "score", "-created", "created")
    namespaces = [f"team-{i}" for i in range(max(2, (experts + experts // 50) // 500))]
    return {
        "list: sorted": (0.12, [lists(sort=sort) for sort in sorts]),
        "list: namespace": (0.05, [lists(namespace=one_of(namespaces)), lists(namespace="team-0", sort="name")]),
        "list: base model": (0.05, [lists(base=base), lists(base=base, sort="-score")]),
        "list: task or domain": (0.05, [lists(task=task), lists(domain=domain), lists(kind="mixture", domain=domain)]),
        "list: tag": (
            0.05,
            [
                lists(tag=tag),
                lists(tag=lambda random: f"run:{int(random.integers(experts // 20))}"),
                lists(tag=["nightly", "paper"]),
            ],
        ),
        "list: metric range": (
            0.05,
            [
                lists(metric="validation.score:0.5:", sort="-score"),
                lists(metric=lambda random: f"latency:{random.random() * 10:.3f}:"),
            ],
        ),
        "list: several filters": (
            0.03,
            [
                lists(base=base, task=task, tag=tag, sort="-score"),
                lists(namespace="team-0", domain=domain, kind="expert"),
            ],
        ),
        "list: rare or nothing": (
            0.05,
            [
                lists(tag=data.RARE_TAG, sort="updated"),
                lists(tag="nowhere"),
                lists(metric=f"latency:{data.ALONE - 1}:"),
                lists(metric="validation.score:2:"),
                lists(base="org/unheard-of"),
                lists(task="gsm8k", domain="code"),
                lists(text="zzz-nothing"),
                lists(deleted="true"),
            ],
        ),
        "list: first page": (0.06, [lists(sort=sort) for sort in DEEP]),
        "list: after 99%": (0.06, [lists(sort=sort, cursor=cursor) for sort, cursor in deep.items()]),
        "search: text": (
            0.15,
            [
                lists(text=one_of(data.ADJECTIVES)),
                lists(text=one_of(data.NOUNS), sort="name"),
                lists(text=lambda random: f"{pick(random, data.NOUNS)}-{int(random.integers(experts))}"),
                lists(text=lambda random: f"run {int(random.integers(997))} with"),
                lists(text=one_of(data.NOUNS), base=base),
            ],
        ),
        "show: expert": (0.10, [show("/v1/experts/{}", paths)]),
        "show: version": (0.06, [show("/v1/experts/{}/versions/1", paths), show("/v1/experts/{}/versions", paths)]),
        "show: reference": (0.06, [show("/v1/resolve?reference={reference}", paths)]),
        "show: curve": (0.06, [show("/v1/experts/{}/versions/1/curve?points=100", curved)]),
    }


def draw(mix: dict[str, tuple[float, list[Maker]]], count: int, seed: int) -> list[Request]:
    """So many requests of the mix, in random order."""
    random = np.random.default_rng(seed)
    names = list(mix)
    shares = np.array([mix[name][0] for name in names])
    made = []
    for i in random.choice(len(names), count, p=shares / shares.sum()):
        makers = mix[names[i]][1]
        made.append(Request(names[i], makers[int(random.integers(len(makers)))](random)))
    return made


@contextlib.contextmanager
def server(url: str, folder: Path, port: int, workers: int) -> Iterator[subprocess.Popen[bytes]]:
    """``t2 registry serve`` over the database, ready."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("T2_REGISTRY_")}
    environment |= {
        "T2_REGISTRY_DATABASE_URL": url,
        "T2_REGISTRY_BLOBS": str(folder / "blobs"),
        "T2_REGISTRY_HOST": HOST,
        "T2_REGISTRY_PORT": str(port),
        "T2_REGISTRY_WORKERS": str(workers),
    }
    command = [sys.executable, "-m", "t2.cli", "registry", "serve"]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(600):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://{HOST}:{port}/readyz", timeout=5).read()
                break
            if process.poll() is not None:
                raise SystemExit((folder / "server.log").read_text())
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait(60)


def cursor_after(port: int, token: str, sort: str, entries: int) -> str:
    """The cursor of the page after so many entries, by walking there."""
    cursor, seen = "", 0
    while seen < entries:
        size = min(200, entries - seen)
        query = urlencode({"sort": sort, "limit": size} | ({"cursor": cursor} if cursor else {}))
        headers = {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(f"http://{HOST}:{port}/v1/experts?{query}", headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            cursor = json.load(answer)["next"]
        seen += size
    return cursor


def table_sizes(url: str) -> dict[str, dict[str, int]]:
    """Rows and bytes, with indexes, of every table."""
    query = """
        SELECT relname, reltuples::bigint, pg_relation_size(oid), pg_indexes_size(oid), pg_total_relation_size(oid)
        FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND reltuples > 0
        ORDER BY pg_total_relation_size(oid) DESC
    """
    with psycopg.connect(url) as connection:
        found = connection.execute(query).fetchall()
    return {
        name: {"rows": rows, "heap": heap, "indexes": ind, "bytes": total} for name, rows, heap, ind, total in found
    }


def postmaster(url: str) -> int | None:
    """The process id of the server of PostgreSQL, where it runs on this machine."""
    with psycopg.connect(url) as connection:
        stat = Path(f"/proc/{connection.info.backend_pid}/stat")
        if not stat.exists() or "postgres" not in stat.read_text():
            return None
        return int(stat.read_text().rpartition(")")[2].split()[1])


def summary(result: Result) -> dict[str, dict[str, float]]:
    """Count and latencies in milliseconds of each kind, and of lists, searches, shows and all together."""
    groups: dict[str, list[float]] = {}
    for kind, latencies in result.latencies.items():
        for group in (kind, kind.partition(":")[0] + " (all)", "all"):
            groups.setdefault(group, []).extend(latencies)
    rows = {}
    for group in sorted(groups, key=lambda name: (name == "all", name.endswith("(all)"), name)):
        values = sorted(groups[group])
        shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
        rows[group] = {"count": float(len(values))} | {
            name: percentile(values, share) * 1000 for name, share in shares.items()
        }
    return rows


def print_report(report: dict[str, Any], result: Result, requests: list[Request], args: argparse.Namespace) -> None:
    rows = report["rows"]
    for key in ("command", "machine", "versions"):
        print(f"{key}: {report[key]}")
    print(
        f"{args.experts} experts, {args.points} curve points; {args.rate:g} requests/s for {args.seconds:g} s over "
        f"{args.connections} connections; {args.workers} server processes\n"
    )
    print("| request | count | p50 ms | p95 ms | p99 ms | max ms |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['count']:.0f} | "
            + " | ".join(f"{row[p]:.1f}" for p in ("p50", "p95", "p99", "max"))
            + " |"
        )
    answered = sum(len(values) for values in result.latencies.values())
    print(f"\nachieved {answered / result.seconds:.1f} requests/s; errors: {result.errors or 'none'}; ", end="")
    print(f"the loop itself was late by {result.late * 1000:.1f} ms at most")
    spent = ", ".join(f"{part} {milliseconds:.2f}" for part, milliseconds in report["cpu_ms_a_request"].items())
    print(f"processor time of a request, in ms: {spent}")
    first, deep = rows["list: first page"], rows["list: after 99%"]
    print(f"a page after 99% of the list takes {deep['p50'] / first['p50']:.2f} times the first (p50), ", end="")
    print(f"{deep['p99'] / first['p99']:.2f} times (p99)")
    total = sum(table["bytes"] for table in report["tables"].values())
    print(f"the database has {total / 2**20:.0f} MiB, {total / args.experts:.0f} bytes an expert; ", end="")
    print(f"the server's processes {report['server_bytes'] / 2**20:.0f} MiB together")
    print("| table | rows | MiB | of it indexes |\n|---|---|---|---|")
    for name, table in report["tables"].items():
        print(f"| {name} | {table['rows']} | {table['bytes'] / 2**20:.1f} | {table['indexes'] / 2**20:.1f} |")
    groups = [f"{name} (all)" for name in ("list", "search", "show")]
    missed = [name for name in groups if rows[name]["p99"] >= TARGET * 1000]
    verdict = f"missed by {', '.join(missed)}" if missed else "met"
    print(f"\ntarget p99 < {TARGET * 1000:.0f} ms for lists, searches and shows: {verdict}")
    assert len(requests) == answered + sum(result.errors.values())


if __name__ == "__main__":
    main()
