"""``t2 registry serve`` as a process: what it checks first, what it prints, how it ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from t2.core.errors import ArgumentError, RegistryError, T2Error
from t2.registry.db import migrate
from t2.registry.db.database import Database
from t2.registry.open import open_embedded, open_server
from t2.registry.server import serve
from t2.registry.settings import ServerSettings
from tests.registry import cells
from tests.registry.samples import expert_bytes
from tests.registry.serving import bearer, eventually, process


def get(url: str, headers: dict[str, str] | None = None) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=30) as answer:
        return json.load(answer)


def settings(**given: Any) -> ServerSettings:
    return ServerSettings(**given)


def old(folder: Path) -> str:
    """The URL of a database at the first revision."""
    url = f"sqlite:///{folder / 'registry.db'}"
    database = Database(url)
    migrate.migrate(database, migrate.revisions()[0])
    database.close()
    return url


def test_with_nothing_configured_the_embedded_registry_is_served(tmp_path: Path) -> None:
    with process(T2_REGISTRY_URL=str(tmp_path / "mine")) as (_, url):
        assert url.startswith("http://127.0.0.1:")
        assert get(f"{url}/readyz") == {"status": "ready"}
        assert get(f"{url}/v1/experts")["items"] == []
        assert (tmp_path / "mine" / "registry.db").exists()


def test_an_endless_upload_is_cut_off(tmp_path: Path) -> None:
    with process(T2_REGISTRY_URL=str(tmp_path), T2_REGISTRY_MAX_UPLOAD_BYTES="65536") as (_, url):
        where = urlsplit(url)
        assert where.hostname is not None
        with socket.create_connection((where.hostname, where.port or 0), timeout=60) as connection:
            head = "POST /v1/experts/team/math/versions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
            connection.sendall(f"{head}Content-Type: application/octet-stream\r\n\r\n".encode())
            sent = 0
            with contextlib.suppress(OSError):  # the server closes at some moment
                while sent < 1 << 30:
                    connection.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
                    sent += 4096
        assert sent < 32 << 20  # what the two ends' buffers hold
        assert get(f"{url}/v1/experts")["items"] == []
        assert 'versions",status="413"} 1.0' in _text(f"{url}/metrics")


def test_who_sends_no_whole_head_does_not_hold_a_connection(tmp_path: Path) -> None:
    with open_embedded(tmp_path) as service, cells.serve(service, settings(head_seconds=0.5)) as url:
        where = urlsplit(url)
        assert where.hostname is not None
        request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
        for before in ([], [b"GET /hea"], [request + b"\r\n", request]):
            with socket.create_connection((where.hostname, where.port or 0), timeout=30) as connection:
                for part in before:
                    connection.sendall(part)
                    answer = b""
                    while part.endswith(b"\r\n\r\n") and b"alive" not in answer:
                        answer += connection.recv(65536)
                        assert answer
                assert connection.recv(65536) == b"", before
        # One that is whole may take longer to be answered.
        upload = "POST /v1/experts/team/math/versions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        data = expert_bytes(0)
        with socket.create_connection((where.hostname, where.port or 0), timeout=30) as connection:
            head = f"{upload}Content-Type: application/octet-stream\r\nContent-Length: {len(data)}\r\n\r\n"
            connection.sendall(head.encode())
            time.sleep(1.0)
            connection.sendall(data)
            assert connection.recv(65536).startswith(b"HTTP/1.1 201")


def test_a_head_without_end_is_refused(tmp_path: Path) -> None:
    start = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
    with open_embedded(tmp_path) as service, cells.serve(service, settings()) as url:
        where = urlsplit(url)
        assert where.hostname is not None
        small, large = b"X-Note: " + b"a" * 1000 + b"\r\n", b"X-Note: " + b"a" * settings().max_head_bytes
        for parts in ([start + large + b"\r\n\r\n"], [start, large], [start, *[small] * 40], [b"GET /" + large]):
            with socket.create_connection((where.hostname, where.port or 0), timeout=30) as connection:
                answer = b""
                with contextlib.suppress(OSError):  # the server may close before all is sent
                    for part in parts:
                        connection.sendall(part)
                        time.sleep(0.005)
                    while more := connection.recv(65536):
                        answer += more
                assert answer.startswith(b"HTTP/1.1 400 ") or not answer, parts[0][:40]
                assert b"alive" not in answer
        with socket.create_connection((where.hostname, where.port or 0), timeout=30) as connection:
            for _ in range(3):  # each request of a connection has a head of its own
                connection.sendall(start + small * 20 + b"\r\n")
                answer = b""
                while b"alive" not in answer:
                    answer += connection.recv(65536)
                assert answer.startswith(b"HTTP/1.1 200 ")


def test_what_follows_a_chunked_body_is_no_header(tmp_path: Path) -> None:
    body = expert_bytes(0)
    head = b"POST /v1/experts/team/math/versions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    chunked = b"Content-Type: application/octet-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    with open_embedded(tmp_path) as service, cells.serve(service, settings()) as url:
        service.create_token("someone", ["read"])
        admin = service.create_token("writer", ["write"]).secret
        where = urlsplit(url)
        assert where.hostname is not None
        with socket.create_connection((where.hostname, where.port or 0), timeout=30) as connection:
            connection.sendall(head + chunked + b"%x\r\n" % len(body) + body + b"\r\n0\r\n")
            connection.sendall(f"Authorization: Bearer {admin}\r\n\r\n".encode())
            assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")


def test_uploads_in_flight_finish_when_the_server_is_told_to_stop(tmp_path: Path) -> None:
    data = expert_bytes(0)
    with process(T2_REGISTRY_URL=str(tmp_path)) as (server, url):
        where = urlsplit(url)
        assert where.hostname is not None
        connection = http.client.HTTPConnection(where.hostname, where.port, timeout=60)
        connection.putrequest("POST", "/v1/experts/team/math/versions")
        connection.putheader("Content-Type", "application/octet-stream")
        connection.putheader("Content-Length", str(len(data)))
        connection.endheaders(data[:100])
        eventually(lambda: "requests_running 2.0" in _text(f"{url}/metrics"))
        server.send_signal(signal.SIGTERM)
        eventually(lambda: not _listens(where.hostname or "", where.port or 0))
        connection.send(data[100:])
        answer = connection.getresponse()
        assert answer.status == 201
        digest = json.loads(answer.read())["digest"]
        connection.close()
        assert server.wait(timeout=60) in (0, -signal.SIGTERM)
        assert server.stderr is not None
        log = server.stderr.read()
        assert "POST /v1/experts/team/math/versions 201" in log
        assert "Traceback" not in log
    with open_embedded(tmp_path) as service:
        assert service.download(digest) == data


def test_several_processes_serve_one_registry_and_count_together(postgres_url: str, tmp_path: Path) -> None:
    database = Database(postgres_url)
    migrate.migrate(database)
    database.close()
    config = tmp_path / "registry.toml"
    config.write_text(f'database_url = "{postgres_url}"\nblobs = "{tmp_path / "blobs"}"\ndatabase_pool = 4\n')
    with open_server(settings(database_url=postgres_url, blobs=str(tmp_path / "blobs"))) as service:
        reader = bearer(service.create_token("reader", ["read"]).secret)
    with process("--workers", "2", "--config", str(config)) as (server, url):
        eventually(lambda: _answers(url), seconds=60)
        for _ in range(20):
            assert get(f"{url}/v1/experts", reader)["items"] == []
        line = 't2_registry_requests_total{method="GET",route="/v1/experts",status="200"} 20.0'
        assert line in _text(f"{url}/metrics")
        server.terminate()
        server.wait(timeout=60)


def test_a_public_address_needs_a_usable_token(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    with open_embedded(tmp_path) as service:
        for host in ("0.0.0.0", "::", "10.0.0.7", "registry.example"):
            with pytest.raises(ArgumentError, match=r"no usable access token.*t2 registry token create"):
                serve.prepare(settings(database_url=url, host=host))
        for host in ("127.0.0.1", "127.0.0.2", "::1", "[::1]", "localhost"):
            serve.prepare(settings(database_url=url, host=host))
        short = service.create_token("short", ["read"], days=0.1 / 86400)
        time.sleep(0.2)
        revoked = service.create_token("revoked", ["admin"])
        service.revoke_token(revoked.id)
        assert short.expires_at is not None
        with pytest.raises(ArgumentError, match="no usable access token"):
            serve.prepare(settings(database_url=url, host="0.0.0.0"))
        service.create_token("good", ["read"])
        serve.prepare(settings(database_url=url, host="0.0.0.0"))


def test_a_name_that_others_call_the_server_by_needs_a_usable_token(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    with open_embedded(tmp_path) as service:
        serve.prepare(settings(database_url=url, allowed_hosts=("localhost", "127.0.0.1")))
        with pytest.raises(ArgumentError, match=r"allowed_hosts has registry\.example.*t2 registry token create"):
            serve.prepare(settings(database_url=url, allowed_hosts=("localhost", "registry.example")))
        service.create_token("good", ["read"])
        serve.prepare(settings(database_url=url, allowed_hosts=("registry.example",)))


def test_the_limit_of_open_files_is_raised_to_what_connections_need() -> None:
    code = (
        "import resource; from t2.registry.server import serve; from t2.registry.settings import ServerSettings\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2048))\n"
        "serve._allow_files(ServerSettings())\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
        "serve._allow_files(ServerSettings(max_connections=5000))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert int(done.stdout) >= 1000
    assert "max_connections 5000 needs" in done.stderr.splitlines()[-1]


def test_only_the_embedded_database_is_migrated_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2_REGISTRY_URL", str(tmp_path / "embedded"))
    (tmp_path / "embedded").mkdir()
    old(tmp_path / "embedded")
    serve.prepare(settings())
    (tmp_path / "other").mkdir()
    with pytest.raises(RegistryError, match="run t2 registry migrate"):
        serve.prepare(settings(database_url=old(tmp_path / "other")))


def test_what_stands_in_the_way_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2_REGISTRY_URL", str(tmp_path / "registry"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ArgumentError, match=r"cannot listen on 127\.0\.0\.1 port"):
            serve.serve(port=taken.getsockname()[1])
    with pytest.raises(ArgumentError, match="workers"):
        serve.serve(workers=2)
    config = tmp_path / "settings.toml"
    config.write_text("max_point = 3")
    with pytest.raises(ArgumentError, match="did you mean 'max_points'"):
        serve.serve(config)
    command = [sys.executable, "-m", "t2.cli", "registry", "serve", "--host", "0.0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("t2: error: host 0.0.0.0 ")
    assert "no usable access token" in line


def test_the_password_of_the_database_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in (
        "postgresql://t2:hunter2@127.0.0.1:1/t2?connect_timeout=1",
        "mysql://t2:hunter2@host/t2",
        "postgresql://t2:hunter2@host:port/t2",
    ):
        monkeypatch.setenv("T2_REGISTRY_DATABASE_URL", url)
        with pytest.raises(T2Error) as caught:
            serve.serve(port=0)
        assert "hunter2" not in str(caught.value)
    monkeypatch.delenv("T2_REGISTRY_DATABASE_URL")
    monkeypatch.setenv("T2_REGISTRY_S3_SECRET_KEY", "hunter2")
    with pytest.raises(ArgumentError, match="go together") as refused:
        serve.serve(port=0)
    assert "hunter2" not in str(refused.value)


def _text(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


def _answers(url: str) -> bool:
    try:
        return bool(get(f"{url}/readyz"))
    except OSError:
        return False


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0
