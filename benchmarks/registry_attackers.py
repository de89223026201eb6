"""A registry server under attack, beside honest clients: their waiting times, and the server's peak memory.

    python -m benchmarks.registry_attackers [--seconds 12] [--clients 4] [--only NAME] [--source 127.0.0.1]

Run it in the repository's root. For each attacker it copies a small registry (SQLite and a folder, one curve of 100,000
points), starts ``t2 registry serve`` with default settings on a free port of this machine, and lets honest clients list
experts, upload a small expert and ask ``/healthz``, each on a new connection, while the attacker does its worst from a
process of its own. ``--python`` serves by another installation, such as an older version. ``--source`` is the
attacker's address; 127.0.0.2 is another one than the clients'. All traffic stays on this machine.

A request that fails is tried again after what ``Retry-After`` says, at least 0.1 s; its time counts until it succeeds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, describe_versions
from benchmarks.open_loop import percentile
from t2.core.curve import CurvePoint
from t2.core.manifest import BaseModelRef
from t2.core.references import parse_name
from t2.registry.open import open_embedded
from tests.registry.samples import expert_bytes
from tests.registry.servers import free_port

HOST = "127.0.0.1"
CURVE_POINTS = 100_000
LARGE_BYTES = 60 * 1000 * 1000
PATIENCE = 30.0
"""Seconds after which an honest request counts as lost."""
BEGINNING = 3.0
"""Seconds for which an attacker is alone."""
BINARY = "application/octet-stream"
CURVE = "/v1/experts/team/long/versions/1/curve"
VERSIONS = "/v1/experts/team/attacked/versions"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each attack, at most 15")
    parser.add_argument("--clients", type=int, default=4, help="honest clients")
    parser.add_argument("--only", choices=["none", *ATTACKS], action="append")
    parser.add_argument("--source", default=HOST, help="the attackers' address")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the installation that serves")
    parser.add_argument("--attack", nargs=3, metavar=("NAME", "PORT", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.seconds = min(args.seconds, 15.0)
    if args.attack:
        name, port, folder = args.attack
        asyncio.run(attack(name, Target(int(port), args.source, Path(folder)), args.seconds))
        return
    with tempfile.TemporaryDirectory() as temporary:
        template = Path(temporary) / "template"
        fill(template)
        print(describe_machine())
        print(describe_versions("uvicorn", "fastapi", "pydantic"))
        print(f"{args.clients} honest clients, {args.seconds:g} s, attackers from {args.source}; ms, p50 / p99\n")
        print("| attacker | lists | small uploads | /healthz | tried again | lost | peak MiB |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for name in args.only or ["none", *ATTACKS]:
            folder = Path(temporary) / name
            shutil.copytree(template, folder)
            print(measure(name, folder, args), flush=True)
            shutil.rmtree(folder)


def fill(folder: Path) -> None:
    """Make the registry that is attacked."""
    with open_embedded(folder) as service:
        for seed in range(60):
            service.publish(parse_name(f"team/expert-{seed}"), expert_bytes(seed))
        service.publish(parse_name("team/long"), expert_bytes(1000))
        service.publish(parse_name("team/attacked"), expert_bytes(1001))
        for start in range(0, CURVE_POINTS, 10_000):
            points = [
                CurvePoint(step=step, split="train", reward=step / 7, score=step / 9, kl=step / 11, seconds=step * 1.1)
                for step in range(start, start + 10_000)
            ]
            service.add_points(parse_name("team/long"), 1, points)
    other = BaseModelRef(id="large", fingerprint="f" * 64)
    (folder / "large").write_bytes(expert_bytes(0, matrices=1, rank=LARGE_BYTES // 4, base=other))


def measure(name: str, folder: Path, args: argparse.Namespace) -> str:
    """One line of the table."""
    port = free_port()
    environment = {**os.environ, "T2_REGISTRY_URL": str(folder), "T2_REGISTRY_LOG_LEVEL": "error"}
    command = [args.python, "-m", "t2.cli", "registry", "serve", "--port", str(port)]
    with subprocess.Popen(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        attacker: subprocess.Popen[bytes] | None = None
        try:
            assert server.stdout is not None
            assert " on http" in server.stdout.readline()
            if name != "none":
                own = [sys.executable, "-m", "benchmarks.registry_attackers", "--attack", name, str(port), str(folder)]
                own += ["--source", args.source, "--seconds", str(args.seconds)]
                attacker = subprocess.Popen(own, stdout=subprocess.PIPE)
                assert attacker.stdout is not None
                attacker.stdout.readline()  # when all of it has begun
            clients = Clients(port, args.clients, args.seconds - BEGINNING)
            clients.run()
            peak = peak_bytes(server.pid)
        finally:
            if attacker is not None:
                attacker.kill()
                attacker.wait()
            server.kill()
    cells = [clients.cell(what) for what in Clients.KINDS]
    return f"| {name} | {' | '.join(cells)} | {clients.again} | {clients.lost} | {peak / 2**20:.0f} |"


def peak_bytes(process: int) -> int:
    """The most memory that a process has had."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


class Clients:
    """Honest clients, and how long they waited."""

    KINDS = ("list", "upload", "health")

    def __init__(self, port: int, count: int, seconds: float) -> None:
        self._port, self._count, self._seconds = port, count, seconds
        self._times: dict[str, list[float]] = {kind: [] for kind in self.KINDS}
        self._seeds = itertools.count(10_000)
        self.again = 0
        self.lost = 0

    def run(self) -> None:
        """Let them work until their time is over."""
        end = time.monotonic() + self._seconds
        threads = [threading.Thread(target=self._work, args=(end,)) for _ in range(self._count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def cell(self, kind: str) -> str:
        """Half of the requests took less than the first number of milliseconds, 99 of 100 less than the second."""
        times = sorted(self._times[kind])
        if not times:
            return "none"
        return f"{percentile(times, 0.5) * 1000:.0f} / {percentile(times, 0.99) * 1000:.0f}"

    def _work(self, end: float) -> None:
        while time.monotonic() < end:
            seed = next(self._seeds)
            path = f"/v1/experts/team/honest-{seed}/versions"
            for kind, method, address, body in (
                ("health", "GET", "/healthz", None),
                ("list", "GET", "/v1/experts?limit=50", None),
                ("upload", "POST", path, expert_bytes(seed)),
            ):
                began = time.monotonic()
                while (pause := self._once(method, address, body)) > 0.0:
                    if time.monotonic() > max(end, began + PATIENCE):
                        self.lost += 1
                        break
                    self.again += 1
                    time.sleep(pause)
                self._times[kind].append(time.monotonic() - began)
            time.sleep(0.05)

    def _once(self, method: str, path: str, body: bytes | None) -> float:
        """Send a request; 0 when it succeeded, else how long to wait before the next try."""
        connection = http.client.HTTPConnection(HOST, self._port, timeout=10)
        try:
            connection.request(method, path, body, {"Content-Type": BINARY} if body else {})
            answer = connection.getresponse()
            answer.read()
            return 0.0 if answer.status < 400 else max(0.1, float(answer.headers.get("Retry-After") or 0))
        except (OSError, http.client.HTTPException):
            return 0.1
        finally:
            connection.close()


class Target:
    """The server under attack, and the address that attackers come from."""

    def __init__(self, port: int, source: str, folder: Path) -> None:
        self.port, self.source, self.folder = port, source, folder

    @contextlib.asynccontextmanager
    async def connection(self, data: bytes) -> AsyncIterator[tuple[asyncio.AbstractEventLoop, socket.socket]]:
        """A connection with a small receive buffer, on which something was sent."""
        loop = asyncio.get_running_loop()
        with socket.socket() as made:
            made.setblocking(False)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            made.bind((self.source, 0))
            await loop.sock_connect(made, (HOST, self.port))
            await loop.sock_sendall(made, data)
            yield loop, made


Attack = Callable[[Target], Awaitable[None]]


def request(method: str, path: str, *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


async def attack(name: str, target: Target, seconds: float) -> None:
    """Run several copies of one attacker at once, each in a loop."""
    count, one = ATTACKS[name]

    async def again() -> None:
        while True:
            with contextlib.suppress(OSError):
                await one(target)
            await asyncio.sleep(0.5)

    async def begun() -> None:
        await asyncio.sleep(BEGINNING)
        print("begun", flush=True)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.gather(begun(), *(again() for _ in range(count)))


async def never_read(target: Target) -> None:
    async with target.connection(request("GET", "/v1/openapi.json") * 8) as (_, made):
        await closed(made)


async def long_curve(target: Target) -> None:
    async with target.connection(request("GET", CURVE)) as (_, made):
        await closed(made)


async def stalled_json(target: Target) -> None:
    size = 4 * 1024 * 1024
    head = request("POST", "/v1/namespaces", "Content-Type: application/json", f"Content-Length: {size}")
    async with target.connection(head + b" " * (size - 1)) as (_, made):
        await closed(made)


async def wide_json(target: Target) -> None:
    item = "{" + ",".join(f'"{i}":1' for i in range(60)) + "}"
    body = ('{"points":[' + ",".join([item] * 9000) + "]}").encode()
    head = request("POST", CURVE, "Content-Type: application/json", f"Content-Length: {len(body)}")
    async with target.connection(head + body) as (loop, made):
        await loop.sock_recv(made, 4096)


async def large_uploads(target: Target) -> None:
    data = LARGE.setdefault("data", (target.folder / "large").read_bytes())
    head = request("POST", VERSIONS, f"Content-Type: {BINARY}", f"Content-Length: {len(data)}")
    async with target.connection(head + data) as (loop, made):
        await loop.sock_recv(made, 4096)


async def partial_heads(target: Target) -> None:
    async with target.connection(request("GET", "/v1/experts")[:-2]) as (loop, made):
        while True:
            await asyncio.sleep(1.0)
            await loop.sock_sendall(made, b"X-A: b\r\n")


async def slow_uploads(target: Target) -> None:
    head = request("POST", VERSIONS, f"Content-Type: {BINARY}", f"Content-Length: {LARGE_BYTES}")
    async with target.connection(head) as (loop, made):
        while True:
            await loop.sock_sendall(made, b"x" * 8192)
            await asyncio.sleep(0.1)


async def waiting_writers(target: Target) -> None:
    if not LARGE.setdefault("locking", False):
        LARGE["locking"] = True
        threading.Thread(target=lock, args=(target.folder / "registry.db",), daemon=True).start()
    body = json.dumps({"description": "x"}).encode()
    head = request(
        "PATCH", "/v1/experts/team/attacked", "Content-Type: application/json", f"Content-Length: {len(body)}"
    )
    async with target.connection(head + body) as (loop, made):
        await loop.sock_recv(made, 4096)


def lock(file: Path) -> None:
    """Hold the database's lock of writers most of the time, as a long import does."""
    with contextlib.closing(sqlite3.connect(file, timeout=60, isolation_level=None)) as connection:
        while True:
            connection.execute("BEGIN IMMEDIATE")
            time.sleep(1.5)
            connection.execute("COMMIT")
            time.sleep(0.3)


async def closed(made: socket.socket) -> None:
    """Wait until the server has closed a connection from which nothing is read."""
    while True:
        await asyncio.sleep(0.25)
        # TCP_INFO begins with the state of the connection; 1 is established.
        if made.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != 1:
            return


LARGE: dict[str, Any] = {}
ATTACKS: dict[str, tuple[int, Attack]] = {
    "readers that never read": (1000, never_read),
    "reads of one long curve": (80, long_curve),
    "stalled JSON bodies": (250, stalled_json),
    "wide unknown fields": (4, wide_json),
    "large uploads": (4, large_uploads),
    "partial heads": (1200, partial_heads),
    "slow uploads": (4, slow_uploads),
    "waiting writers": (40, waiting_writers),
}
"""How many of each at once, and what one does."""


if __name__ == "__main__":
    main()
