"""Side by side with MLflow's model registry: publishing files of 400 KB, and listing pages of 10,000 entries.

    python -m benchmarks.registry_mlflow [--entries 10000] [--files 120] [--quick] [--mlflow-python PATH]

Run it in the repository's root. One PostgreSQL as it comes, with a database for each; both servers run on this machine,
one after the other, with as many processes and their files in a local folder, and are asked over HTTP by their own
Python clients.

* **Publishing** a file under a new name. MLflow: ``create_run``, ``log_artifact`` (through the server, which keeps the
  file), ``create_registered_model``, ``create_model_version``. t2: ``publish``, one upload, of which the server checks
  every tensor and the digest, and which is synced to the disk. By one client in turn, and by 8 threads.
* **Listing** 50 entries by name, the first page and one after 99% of them: ``search_registered_models`` and
  ``list_experts``. Both tell the latest version, the tags and the aliases of each entry. Every entry has one version,
  every second one an alias; MLflow's have one tag, t2's two or three, and metrics. By one client in turn, and by 8
  threads.

The entries to list are written straight into both databases; in t2's there are manifests of 210 matrices, curves and
deleted experts beside them. MLflow's own defaults hold but for the number of processes. It is installed into an
environment of its own in the user's cache folder, unless ``--mlflow-python`` names the Python of one that has it.
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
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy

from benchmarks import registry_data as data
from benchmarks.machine import describe_machine, describe_versions
from benchmarks.registry_load import HOST, server
from t2.core.settings import cache_dir
from t2.registry.blobs.local import LocalBlobs
from t2.registry.db import migrate
from t2.registry.db.database import Database
from tests.registry.servers import free_port, new_database, postgres

REQUIREMENTS = ("mlflow==3.17.2", "psycopg2-binary==2.9.13")
CLIENTS = Path(__file__).with_name("registry_clients.py")
THREADS = (1, 8)
TARGET = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--files", type=int, default=120, help="published by each number of clients")
    parser.add_argument("--seconds", type=float, default=10.0, help="for which each page is asked for")
    parser.add_argument("--workers", type=int, default=2, help="processes of each server")
    parser.add_argument("--mlflow-python", type=Path, help="a Python that has MLflow and psycopg2")
    parser.add_argument("--quick", action="store_true", help="small: whether it works")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    if args.quick:
        args.entries, args.files, args.seconds = 400, 10, 1.0
    python = args.mlflow_python or install_mlflow()
    asked = "import importlib.metadata as m; print('MLflow', m.version('mlflow'))"
    version = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        postgres_url = stack.enter_context(postgres(folder))
        for threads in THREADS:
            write_files(folder / f"files-{threads}", args.files, threads)
        with new_database(postgres_url) as url, psycopg.connect(url) as connection:
            postgres_version = connection.info.parameter_status("server_version")
        machine = describe_machine()
        with new_database(postgres_url) as url, mlflow_server(python, url, folder, args) as address:
            theirs = measure(python, "mlflow", address, folder, args, lambda: fill_mlflow(url, args.entries))
        with new_database(postgres_url) as url, t2_server(url, folder, args) as address:
            ours = measure(
                Path(sys.executable), "t2", address, folder, args, lambda: fill_t2(url, folder, args.entries)
            )
    report = {
        "command": " ".join(["python -m benchmarks.registry_mlflow", *sys.argv[1:]]),
        "machine": machine,
        "versions": f"PostgreSQL {postgres_version}, {version}, {describe_versions('fastapi', 'uvicorn')}",
        "workers": args.workers,
        "mlflow": theirs,
        "t2": ours,
    }
    print_report(report, args)
    if args.output:
        args.output.write_text(json.dumps(report, indent=2))


def install_mlflow() -> Path:
    """The Python of an environment with MLflow in the user's cache folder, made when it is not there."""
    folder = cache_dir() / "benchmarks" / REQUIREMENTS[0]
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        print(f"installing {' and '.join(REQUIREMENTS)} into {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        (folder / "installed").touch()
    return python


def write_files(folder: Path, count: int, seed: int) -> None:
    """Experts of 400 KB, each of another content; to MLflow they are just files."""
    folder.mkdir()
    for i in range(count):
        (folder / f"file-{seed}-{i}.safetensors").write_bytes(data.expert_file(1000 * seed + i + 10**6))


@contextlib.contextmanager
def mlflow_server(python: Path, url: str, folder: Path, args: argparse.Namespace) -> Iterator[str]:
    """``mlflow server`` with its tables made, its files in a folder, and answering."""
    port = free_port()
    parsed = sqlalchemy.make_url(url).set(drivername="postgresql+psycopg2")
    command = [str(python), "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
    command += ["--workers", str(args.workers), "--artifacts-destination", str(folder / "mlartifacts")]
    command += ["--backend-store-uri", parsed.render_as_string(hide_password=False)]
    with (folder / "mlflow.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        wait(f"http://{HOST}:{port}/health", process, folder / "mlflow.log")
        yield f"http://{HOST}:{port}"
    finally:
        # Its processes do not all go with the first one.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        process.wait(60)


@contextlib.contextmanager
def t2_server(url: str, folder: Path, args: argparse.Namespace) -> Iterator[str]:
    """``t2 registry serve`` with its tables made, its files in a folder, and answering."""
    database = Database(url)
    migrate.migrate(database)
    database.close()
    port = free_port()
    with server(url, folder, port, args.workers):
        yield f"http://{HOST}:{port}"


def wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(1200):
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(address, timeout=5).read()
            return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


def measure(
    python: Path, product: str, address: str, folder: Path, args: argparse.Namespace, fill: Any
) -> dict[str, Any]:
    """Publish, then fill the tables, then list."""
    found: dict[str, Any] = {}
    for threads in THREADS:
        options = ["--files", str(folder / f"files-{threads}"), "--prefix", "zz-"]
        found[f"publish {threads}"] = client(python, product, address, "publish", threads, *options)
    fill()
    for threads in THREADS:
        options = ["--entries", str(args.entries), "--seconds", str(args.seconds)]
        found[f"list {threads}"] = client(python, product, address, "list", threads, *options)
    return found


def client(python: Path, product: str, address: str, command: str, threads: int, *options: str) -> dict[str, Any]:
    arguments = [str(python), str(CLIENTS), product, address, command, "--threads", str(threads), *options]
    environment = os.environ | {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def fill_mlflow(url: str, entries: int) -> None:
    """Registered models with a version, a tag and, every second one, an alias, in the tables of MLflow 3.17."""
    every = f"FROM generate_series(1, {entries}) AS i"
    name, now = "'model-' || lpad(i::text, 8, '0')", "1760000000000 + i"
    statements = (
        f"""INSERT INTO registered_models (name, creation_time, last_updated_time, description)
            SELECT {name}, {now}, {now}, 'gsm8k run ' || i % 997 {every}""",
        f"""INSERT INTO model_versions
            (name, version, creation_time, last_updated_time, description, current_stage, source, run_id, status)
            SELECT {name}, 1, {now}, {now}, '', 'None', 'mlflow-artifacts:/0/' || md5(i::text) || '/artifacts/model',
                   md5(i::text), 'READY' {every}""",
        f"INSERT INTO registered_model_tags (key, value, name) SELECT 'stage', 'nightly', {name} {every}",
        f"""INSERT INTO registered_model_aliases (name, alias, version)
            SELECT {name}, 'production', 1 {every} WHERE i % 2 = 0""",
    )
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())
        connection.execute("VACUUM (ANALYZE)")
        connection.execute("CHECKPOINT")


def fill_t2(url: str, folder: Path, entries: int) -> None:
    """Experts with a version, a tag and, every second one, an alias, and what else belongs to experts."""
    with psycopg.connect(url) as connection:
        tables = "namespace, base_model, blob, expert, version, metric, tag, alias, alias_event, curve_point, parent"
        connection.execute(f"TRUNCATE {tables}, idempotency_key".encode())
    database = Database(url, timeout=600)
    data.fill(database, LocalBlobs(folder / "blobs"), entries, 10 * entries, versions=1)
    database.close()


def print_report(report: dict[str, Any], args: argparse.Namespace) -> None:
    for key in ("command", "machine", "versions"):
        print(f"{key}: {report[key]}")
    print(f"{args.entries} entries, {args.files} files of 400 KB, {args.workers} processes of each server\n")
    print("| | MLflow | t2 | ratio |\n|---|---|---|---|")
    ratios = []

    def row(name: str, theirs: float, ours: float, unit: str) -> None:
        ratios.append(ours / theirs)
        print(f"| {name} | {theirs:.1f} {unit}/s | {ours:.1f} {unit}/s | {ours / theirs:.1f} |")

    theirs, ours = report["mlflow"], report["t2"]
    for threads in THREADS:
        of = "1 client" if threads == 1 else f"{threads} clients"
        key = f"publish {threads}"
        row(f"publish 400 KB, {of}", theirs[key]["rate"], ours[key]["rate"], "files")
    for threads in THREADS:
        of = "1 client" if threads == 1 else f"{threads} clients"
        for where in ("first", "deep"):
            key = f"list {threads}"
            name = "first page" if where == "first" else f"page after {ours[key]['depth']} entries"
            row(f"list 50, {name}, {of}", theirs[key][where]["rate"], ours[key][where]["rate"], "pages")
    verdict = "met" if min(ratios) >= TARGET else f"missed, the smallest is {min(ratios):.1f}"
    print(f"\ntarget of {TARGET:.0f} times MLflow's rates: {verdict}")


if __name__ == "__main__":
    main()
