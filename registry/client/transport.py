"""Requests to a registry server: errors told as the registry means them, and safe requests tried again.

Tried again are requests that do no harm twice (reading, setting, deleting, uploads under an idempotency key), when the
connection fails or the answer is 429, 502, 503 or 504; others only where the server cannot have seen them. A server's
``Retry-After`` is honoured, and the whole is bounded in time.
"""

from __future__ import annotations

import json
import os
import re
import ssl
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

import httpx2

from t2.core.errors import (
    ArgumentError,
    ForbiddenError,
    NotFoundError,
    RegistryError,
    UnauthorizedError,
    UnavailableError,
)
from t2.core.settings import registry_allow_http
from t2.registry.client.retry import STATUSES, RetryPolicy, retry_after

API = "/v1"
MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""A curve of 100,000 points has 20 MB."""
MAX_REDIRECTS = 3
CONNECT_SECONDS = 10.0

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_UNSEEN = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
"""The request was never sent."""


@dataclass(frozen=True)
class Answer:
    """A successful answer; ``asked`` is what was asked, for people."""

    status: int
    content: bytes
    asked: str


class _RepeatableError(Exception):
    """An attempt failed and another may succeed."""

    def __init__(self, error: RegistryError, *, seen: bool, after: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.seen = seen
        self.after = after


class Transport:
    """A pool of connections to one server. Instances may be shared between threads."""

    def __init__(
        self, url: str, token: str | None, *, timeout: float, retries: RetryPolicy, allow_http: bool | None
    ) -> None:
        """As :class:`~t2.registry.client.http.HttpRegistry`."""
        self._base = _server(url)
        self.location = str(self._base).rstrip("/")
        self._retries = retries
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "t2"}
        # The token is not among the headers of the pool: redirects to other hosts go through it too.
        self._authorization = {} if token is None else {"Authorization": f"Bearer {_token(token)}"}
        if allow_http is None:
            allow_http = registry_allow_http()
        local = _is_loopback(self._base)
        if token is not None and self._base.scheme == "http" and not local and not allow_http:
            raise ArgumentError(
                f"the access token would go to {self.location} unencrypted; use an https URL, or on a network that you "
                "trust set T2_REGISTRY_ALLOW_HTTP=1"
            )
        self._proxied = not local  # requests to this machine never go through a proxy
        if self._proxied:
            _check_proxies()
        # A local server may redirect downloads to a remote store, so it needs the authorities too.
        trusted = _load_certificates(required=self._proxied or self._base.scheme == "https")
        self._client = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
            trust_env=self._proxied,
            verify=trusted,
            limits=httpx2.Limits(max_connections=20, max_keepalive_connections=10, keepalive_expiry=4.0),
        )

    def send(
        self,
        method: str,
        path: str,
        *,
        params: Sequence[tuple[str, str]] = (),
        content: bytes = b"",
        headers: Mapping[str, str] | None = None,
        repeatable: bool = False,
        limit: int = MAX_ANSWER_BYTES,
        follow: bool = False,
    ) -> Answer:
        """Make a request, again where that is of use.

        Args:
            path: under ``/v1``, quoted.
            repeatable: whether doing it twice is as good as once.
            limit: bytes of the answer at most.
            follow: whether the answer may be a redirect to another place, which does not get the token.

        Raises:
            RegistryError: the server's own error, as the class that its code names; or it is no registry.
            UnavailableError: it cannot be reached, or was overloaded throughout.
        """
        try:
            url = self._base.copy_with(path=self._base.path.rstrip("/") + API, query=None)
            request_url = httpx2.URL(f"{url}{path}", params=params) if params else httpx2.URL(f"{url}{path}")
        except (httpx2.InvalidURL, UnicodeEncodeError) as error:
            raise RegistryError(f"the request {method} {path[:100]} cannot be sent: {error}") from error
        policy = self._retries
        deadline = policy.clock() + policy.total
        unsure = False
        for attempt in range(1, policy.attempts + 1):
            try:
                return self._attempt(method, request_url, content, headers or {}, limit, follow, deadline)
            except NotFoundError:
                if method == "DELETE" and unsure:
                    # The answer to an attempt before was lost, and it did what was asked.
                    return Answer(204, b"", f"{method} {API}{path}")
                raise
            except _RepeatableError as failure:
                unsure = unsure or failure.seen
                wait = policy.wait(attempt, failure.after)
                again = repeatable or not failure.seen
                if not again or attempt == policy.attempts or policy.clock() + wait >= deadline:
                    raise failure.error from failure.__cause__
                policy.sleep(wait)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _attempt(
        self,
        method: str,
        url: httpx2.URL,
        content: bytes,
        headers: Mapping[str, str],
        limit: int,
        follow: bool,
        deadline: float,
    ) -> Answer:
        asked = f"{method} {url.path}"
        sent = {**headers, **self._authorization}
        for _ in range(MAX_REDIRECTS + 1):
            status, answered, body = self._exchange(method, url, content, sent, limit, deadline)
            if status in _REDIRECTS and follow:
                url = self._redirected(url, answered.get("location", ""))
                sent = {**headers, **(self._authorization if _origin(url) == _origin(self._base) else {})}
                continue
            if 200 <= status < 300:
                return Answer(status, body, asked)
            raise self._failure(status, answered, body, asked, url)
        raise RegistryError(f"{self.location} redirects {asked} more than {MAX_REDIRECTS} times")

    def _exchange(
        self, method: str, url: httpx2.URL, content: bytes, headers: Mapping[str, str], limit: int, deadline: float
    ) -> tuple[int, httpx2.Headers, bytes]:
        """One request and the whole of its answer."""
        where = f"{url.scheme}://{url.netloc.decode('ascii', 'replace')}"
        proxy = _proxy_variable(url) if self._proxied else None
        way = f" through the proxy of {proxy}" if proxy is not None else ""
        check = "is it running, and the URL right?" if proxy is None else f"check {proxy}, or name the host in NO_PROXY"
        try:
            request = self._client.build_request(method, url, content=content or None, headers=dict(headers))
            response = self._client.send(request, stream=True)
            try:
                body = b"".join(self._bounded(response, limit, deadline))
            finally:
                response.close()
        except _UNSEEN as error:
            if _certificate(error):
                raise RegistryError(
                    f"the certificate of {where} cannot be verified: {_reason(error)}; set SSL_CERT_FILE to the "
                    "file of the authority's certificate"
                ) from error
            message = f"cannot reach the registry {where}{way}: {_reason(error)}; {check}"
            raise _RepeatableError(UnavailableError(message), seen=False) from error
        except httpx2.ProxyError as error:
            message = f"cannot reach the registry {where}{way}: {_reason(error)}; {check}"
            raise _RepeatableError(UnavailableError(message), seen=False) from error
        except httpx2.TransportError as error:
            message = f"the connection to the registry {where}{way} failed: {_reason(error)}; try again"
            raise _RepeatableError(UnavailableError(message), seen=True) from error
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            raise RegistryError(f"the registry {where} cannot be asked: {_reason(error)}") from error
        return response.status_code, response.headers, body

    def _bounded(self, response: httpx2.Response, limit: int, deadline: float) -> Iterator[bytes]:
        size = 0
        for chunk in response.iter_raw():
            size += len(chunk)
            if size > limit:
                raise RegistryError(f"{self.location} answered more than {limit} bytes; it is no t2 registry")
            if self._retries.clock() > deadline:
                raise UnavailableError(
                    f"{self.location} has not ended its answer after {self._retries.total:g} s; try again"
                )
            yield chunk

    def _redirected(self, url: httpx2.URL, location: str) -> httpx2.URL:
        try:
            target = url.join(location)
        except (httpx2.InvalidURL, ValueError) as error:
            raise RegistryError(f"{self.location} redirects to what is no URL") from error
        if not location or not _is_web(target):
            raise RegistryError(f"{self.location} redirects to {target.scheme}: and not to a web server; refused")
        if url.scheme == "https" and target.scheme == "http":
            raise RegistryError(f"{self.location} redirects from https to http ({target.host}); refused")
        return target

    def _failure(self, status: int, headers: httpx2.Headers, body: bytes, asked: str, url: httpx2.URL) -> Exception:
        problem = _problem(headers, body)
        error: RegistryError
        if problem is not None:
            error = _error(status, problem)
        elif _origin(url) != _origin(self._base):
            error = _foreign(status, url)
        else:
            error = self._not_ours(status, headers, asked)
        if status in STATUSES:
            return _RepeatableError(error, seen=status != 429, after=retry_after(headers.get("retry-after")))
        if problem is not None and isinstance(error, UnauthorizedError) and not self._authorization:
            return UnauthorizedError(
                f"{self.location} wants an access token; set T2_REGISTRY_TOKEN, which goes to the server of "
                "T2_REGISTRY_URL and to no other"
            )
        return error

    def _not_ours(self, status: int, headers: httpx2.Headers, asked: str) -> RegistryError:
        """An answer that a registry does not give: of a proxy, or of another server."""
        kind = _plain(headers.get("content-type", "nothing").partition(";")[0])
        said = f"{self.location} answered {status} ({kind}) to {asked}"
        if status in STATUSES:
            return UnavailableError(f"{said}: what stands before the registry cannot reach it now; try again")
        if status in _REDIRECTS:
            return RegistryError(f"{said}, a redirect to {_plain(headers.get('location', ''))}; use that server's URL")
        if status == UnauthorizedError.status:
            return UnauthorizedError(f"{said}: what stands before the registry wants other credentials")
        if status == ForbiddenError.status:
            return ForbiddenError(f"{said}: what stands before the registry refuses")
        return RegistryError(f"{said}, and not as a t2 registry does; check the URL")


def _server(url: str) -> httpx2.URL:
    hint = "write https://host or http://host:port"
    try:
        parsed = httpx2.URL(url.strip())
    except (httpx2.InvalidURL, UnicodeError) as error:
        raise ArgumentError(f"the registry URL cannot be read ({error}); {hint}") from error
    if not _is_web(parsed):
        raise ArgumentError(f"the registry URL is none of a server; {hint}")
    if parsed.userinfo:
        raise ArgumentError("the registry URL holds a user name; leave it out and set T2_REGISTRY_TOKEN")
    if parsed.query or parsed.fragment:
        raise ArgumentError(f"the registry URL has a ? or # part; {hint}")
    return parsed


def _load_certificates(*, required: bool) -> ssl.SSLContext:
    """Load the trusted authorities of ``SSL_CERT_FILE`` or ``SSL_CERT_DIR``, else the default.

    Raises:
        ArgumentError: the variable names no certificates, and they are required.
    """
    name = next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), None)
    if name is None:
        return httpx2.create_ssl_context()
    try:
        if name == "SSL_CERT_DIR":
            # OpenSSL accepts any path as a folder, even one that does not exist.
            next(Path(os.environ[name]).iterdir(), None)
        return httpx2.create_ssl_context()
    except (OSError, ValueError) as error:
        if not required:
            return httpx2.create_ssl_context(trust_env=False)
        kind = "file" if name == "SSL_CERT_FILE" else "folder"
        raise ArgumentError(
            f"{name}: no {kind} of certificates: {_plain(os.environ[name])} ({_system_reason(error)}); name one in PEM "
            "format, or unset it"
        ) from error


def _check_proxies() -> None:
    """Refuse proxies of the environment that the HTTP library cannot use.

    Raises:
        ArgumentError: a proxy cannot be used; the message names the variable.
    """
    proxies = getproxies_environment()
    if "*" in (host.strip() for host in proxies.get("no", "").split(",")):
        return
    for scheme, value in proxies.items():
        if scheme not in ("http", "https", "all"):
            continue
        text = value if "://" in value else f"http://{value}"
        try:
            url = httpx2.URL(text)
            good = bool(url.host) and "%" not in url.host and 0 < (url.port or 1) < 65536
        except (httpx2.InvalidURL, UnicodeError):
            good = False
        if good and url.scheme in ("http", "https"):
            continue
        if good and url.scheme in ("socks5", "socks5h"):
            if find_spec("socksio") is not None:
                continue
            problem, remedy = "needs the package socksio", "run: pip install socksio, name a proxy by http://"
        else:
            problem, remedy = "is not a proxy that t2 can use", "write http://host:port"
        shown = _plain(re.sub(r"//.*@", "//…@", text))  # hides the password
        raise ArgumentError(f"{_variable(scheme)}: {shown} {problem}; {remedy}, or unset it")


def _proxy_variable(url: httpx2.URL) -> str | None:
    """Name of the variable whose proxy a request uses; None without a proxy."""
    proxies = getproxies_environment()
    if proxy_bypass_environment(url.host, proxies):
        return None
    return next((_variable(scheme) for scheme in (url.scheme, "all") if scheme in proxies), None)


def _variable(scheme: str) -> str:
    # urllib prefers the lower-case name.
    lower = f"{scheme}_proxy"
    return lower if os.environ.get(lower) else lower.upper()


def _system_reason(error: Exception) -> str:
    return _plain(getattr(error, "strerror", None) or str(error))


def _is_web(url: httpx2.URL) -> bool:
    # A % in the host is what the library makes of characters that no host has.
    return url.scheme in ("http", "https") and bool(url.host) and "%" not in url.host


def _token(token: str) -> str:
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ArgumentError("the access token is empty or has characters that no token has; copy it again")
    return token


def _is_loopback(url: httpx2.URL) -> bool:
    host = url.host
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _origin(url: httpx2.URL) -> tuple[str, str, int]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}[url.scheme]


def _problem(headers: httpx2.Headers, body: bytes) -> dict[str, Any] | None:
    """An RFC 9457 answer with our ``code``; None where it is none."""
    if not headers.get("content-type", "").startswith("application/problem+json"):
        return None
    try:
        problem = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return problem if isinstance(problem, dict) and isinstance(problem.get("code"), str) else None


def _error(status: int, problem: Mapping[str, Any]) -> RegistryError:
    text = _plain(str(problem.get("detail") or problem.get("title") or f"the registry answered {status}"), 2000)
    classes: list[type[RegistryError]] = [RegistryError, *RegistryError.__subclasses__()]
    found = [each for each in classes if each.code == problem["code"]] or [
        each for each in classes if each.status == status
    ]
    if found:
        return found[0](text)
    error = RegistryError(text)
    error.status = status
    return error


def _foreign(status: int, url: httpx2.URL) -> RegistryError:
    """The store that a download was sent to refuses."""
    text = f"the store {url.host}, where the registry sent this download, answered {status}"
    return UnavailableError(f"{text}; try again") if status >= 500 or status == 429 else RegistryError(text)


def _certificate(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLCertVerificationError):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _reason(error: BaseException) -> str:
    if isinstance(error, httpx2.TimeoutException):
        return f"no answer in time ({type(error).__name__})"
    return _plain(str(error)) or type(error).__name__


def _plain(text: str, limit: int = 300) -> str:
    """A text of another machine's as part of one line: no control characters, not too long."""
    cleaned = "".join(character if character.isprintable() else " " for character in text)
    return cleaned if len(cleaned) <= limit else cleaned[:limit] + "…"
