"""The client's environment: proxies, authorities and folders; errors are one line."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from t2.core import settings
from t2.core.errors import ArgumentError, RegistryError, UnavailableError
from t2.registry.client.http import HttpRegistry
from t2.registry.client.retry import RetryPolicy

LOCALHOST = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgWT71wdvOyszFNxD4
/s3zdQet60e50PsQp8Py7aaOUEOhRANCAAQxe3fYym9XyECAd40MBOOZgEABMZfp
OjXp1x57o2BqaHHS9TyZCGVECqS19XOnNeoPiiqUf9ZtMeDzUOQ+B/Db
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBmjCCAUGgAwIBAgIUY4AcT0lum9WSyT/vmnkXQnW5QvQwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyOTIwMzkzN1oYDzIxMjYxMTA1
MjAzOTM3WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAQxe3fYym9XyECAd40MBOOZgEABMZfpOjXp1x57o2BqaHHS9TyZCGVE
CqS19XOnNeoPiiqUf9ZtMeDzUOQ+B/Dbo28wbTAdBgNVHQ4EFgQUXXCkAxhx82Z8
Gp0csM9TLYQ8wrIwHwYDVR0jBBgwFoAUXXCkAxhx82Z8Gp0csM9TLYQ8wrIwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDRwAwRAIgDTtEiXrnt8nu9ByQnjxixkSJjiWd6YU2u2eZm4/SVWcCIF3k
Du7tUvqz9QnG9MaoEiRohwaCxpN3zWaF+JKIJgXZ
-----END CERTIFICATE-----
"""
"""Key and self-signed certificate of localhost, valid for a hundred years."""
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXIES, *map(str.lower, PROXIES), "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)


class Empty(BaseHTTPRequestHandler):
    """A server that answers every request with an empty page."""

    def do_GET(self) -> None:
        body = json.dumps({"items": [], "next": None}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    path = tmp_path / "localhost.pem"
    path.write_text(LOCALHOST)
    return path


@pytest.fixture
def tls_server(certificate: Path) -> Iterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Empty)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"https://localhost:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def call(url: str) -> None:
    with HttpRegistry(url, None, retries=RetryPolicy(attempts=1)) as registry:
        registry.list_namespaces()


def test_a_local_server_is_trusted_by_the_certificate_file_and_not_without(
    tls_server: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RegistryError, match="set SSL_CERT_FILE to the file of the authority's certificate"):
        call(tls_server)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")  # ignored for servers on this machine
    call(tls_server)


@pytest.mark.parametrize("url", ["https://registry.example", "http://registry.example", "https://localhost:1"])
@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
@pytest.mark.parametrize("kind", ["absent", "empty", "no certificate"])
def test_what_holds_no_certificates_is_refused_by_its_variable(
    kind: str, name: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "authorities.pem"
    if kind != "absent":
        path.write_text("" if kind == "empty" else "-----BEGIN CERTIFICATE-----\nx\n")
    monkeypatch.setenv(name, str(path))
    with pytest.raises(ArgumentError, match=f"^{name}: no .* of certificates: {path} .*unset it$") as caught:
        call(url)
    assert "\n" not in str(caught.value)


def test_a_server_without_encryption_on_this_machine_needs_no_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/absent")
    with pytest.raises(UnavailableError, match=r"the registry http://localhost:1: .*is it running"):
        call("http://localhost:1")


@pytest.mark.parametrize("name", ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("socks5://user:secret@127.0.0.1:1080", "needs the package socksio; run: pip install socksio"),
        ("socks5h://127.0.0.1:1080", "needs the package socksio"),
        ("socks4://127.0.0.1:1080", "is not a proxy that t2 can use; write http://host:port"),
        ("ftp://proxy:21", "is not a proxy"),
        ("http://[::1", "is not a proxy"),
        ("http://proxy:port", "is not a proxy"),
        ("http://proxy:99999", "is not a proxy"),
        ("http://", "is not a proxy"),
        ("://proxy", "is not a proxy"),
        ("http://a proxy:1", "is not a proxy"),
        ("http://pro\x7fxy:1", "is not a proxy"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_refused_by_its_variable(
    value: str, message: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ArgumentError, match=f"^{name}: .*{message}.*, or unset it$") as caught:
        call("https://registry.example")
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(UnavailableError, match=r"cannot reach the registry https://localhost\.invalid: "):
        call("https://localhost.invalid")


def test_a_proxy_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        with pytest.raises(UnavailableError, match=f"through the proxy of {name}: .*check {name}, or name the host in"):
            call("https://registry.example")
        monkeypatch.delenv(name)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Empty)  # answers CONNECT with 501
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(UnavailableError, match="through the proxy of HTTPS_PROXY: 501 "):
        call("https://registry.example")
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("T2_DATA_DIR", settings.data_dir),
        ("T2_DATA_HOME", settings.data_home),
        ("T2_CACHE_DIR", settings.cache_dir),
        ("T2_EXPERTS_DIR", settings.experts_dir),
        ("T2_REGISTRY_URL", settings.registry_dir),
    ],
)
def test_a_home_folder_that_does_not_exist_is_refused_by_its_variable(
    name: str, read: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "~no-such-user/t2")
    assert callable(read)
    with pytest.raises(ArgumentError, match=f"^{name}: no such home folder: ~no-such-user/t2; write"):
        read()
