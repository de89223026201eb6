"""Who asks: access tokens, and what they allow.

A token that was found good is believed for :data:`CACHE_SECONDS` without another look into the database, which costs
more than a millisecond. So a revocation works everywhere within that time, and at once in the process that did it.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sqlalchemy import select
from starlette.requests import Request

from t2.core.digests import sha256
from t2.core.errors import ForbiddenError, T2Error, UnauthorizedError
from t2.registry.db import models
from t2.registry.schemas import Scope, TokenInfo
from t2.registry.server.limits import LEASE, Lease, Workers, parse_address
from t2.registry.server.log import log
from t2.registry.services import audit, tokens
from t2.registry.services.actor import Actor
from t2.registry.services.service import Service

CACHE_SECONDS = 5.0
CACHE_TOKENS = 1000
THREADS = 4
"""In which tokens are looked up."""
ANONYMOUS = "anonymous"
"""The subject of the audit log while the registry is open."""


_BY_PROXY = re.compile(
    r"forwarded|via|x-forwarded.*|x-real-ip|x-original-.*|x-envoy-.*|x-client-ip|true-client-ip|cf-.*|x-cluster-client-ip"
    r"|x-proxyuser-ip|proxy-.*",
    re.IGNORECASE,
)
"""Headers that proxies add."""


@dataclass(frozen=True)
class _Known:
    token: TokenInfo
    service: Service
    until: float


class Authenticator:
    """Finds the token of a request and the registry that acts for it."""

    def __init__(self, service: Service, *, may_be_open: bool, wait: float = 5.0) -> None:
        """Prepare.

        Args:
            may_be_open: whether requests of this machine without a token pass while the database holds none at all.
            wait: seconds that a request may wait for a thread.
        """
        self._threads = Workers(THREADS, "checks of access tokens", wait)
        self._service = service
        self._open = service.acting_for(Actor("api", ANONYMOUS))
        self._may_be_open = may_be_open
        self._is_open = False
        self._open_until = 0.0
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._changes = 0
        self._lock = threading.Lock()
        self._recorder = ThreadPoolExecutor(1, "last-use")

    async def __call__(self, request: Request, scope: Scope) -> Service:
        """The registry acting for whoever asks.

        Raises:
            UnauthorizedError: no token where one is needed, or one that is not good.
            ForbiddenError: it lacks the scope.
        """
        lease: Lease = request.scope[LEASE]
        given = request.headers.getlist("authorization")
        if not given:
            if self._may_be_open and time.monotonic() >= self._open_until:
                await self._threads.run(lease.owner, self._look_whether_open)
            if not (self._is_open and _is_local(request)):
                raise UnauthorizedError(
                    "the registry wants an access token; send the header Authorization: Bearer TOKEN "
                    "(t2 registry token create makes one on the server's machine)"
                )
            return self._open
        kind, _, secret = given[0].partition(" ")
        secret = secret.strip()
        if len(given) > 1 or kind.lower() != "bearer" or not secret:
            raise UnauthorizedError("the header Authorization is not understood; write: Authorization: Bearer TOKEN")
        # The secret itself stays out of the table.
        key = sha256(secret.encode())
        known = self._known.get(key)
        if known is None or known.until <= time.monotonic() or _expired(known.token):
            known = await self._threads.run(lease.owner, lambda: self._look_up(key, secret))
        if not tokens.allows(known.token, scope):
            raise ForbiddenError(
                f"the token {known.token.prefix}… has the scope {' and '.join(known.token.scopes)}, this needs {scope}"
            )
        lease.own(("token", known.token.id))
        return known.service

    def forget(self) -> None:
        """Look into the database again at the next request, after tokens have changed."""
        with self._lock:
            # What is being looked up this moment may have been read before the change.
            self._changes += 1
            self._known.clear()
            self._open_until = 0.0

    def close(self) -> None:
        """Wait for what is still to be recorded."""
        self._recorder.shutdown()
        self._threads.close()

    def _look_whether_open(self) -> None:
        at, changes = time.monotonic(), self._changes
        with self._service.database.read() as session:
            found = self._may_be_open and session.scalar(select(models.Token.id).limit(1)) is None
        with self._lock:
            if changes == self._changes:
                self._is_open, self._open_until = found, at + CACHE_SECONDS

    def _look_up(self, key: str, secret: str) -> _Known:
        at, changes = time.monotonic(), self._changes
        with self._service.database.read() as session:
            token = tokens.authenticate(session, secret)
        known = _Known(token, self._service.acting_for(Actor("api", token.name)), at + CACHE_SECONDS)
        with self._lock:
            if changes == self._changes:
                self._known[key] = known
            while len(self._known) > CACHE_TOKENS:
                self._known.popitem(last=False)
        used = token.last_used_at
        if used is None or (audit.now() - used).total_seconds() >= tokens.LAST_USE_SECONDS:
            self._recorder.submit(self._record, token.id)
        return known

    def _record(self, id: int) -> None:
        # Beside the request: on SQLite it may wait for another writer, and a read should not.
        try:
            with self._service.database.write() as session:
                tokens.used(session, id)
        except T2Error as error:
            log.warning("the last use of the token %d is not recorded: %s", id, error)


def is_loopback(host: str) -> bool:
    """Whether a name or an address, with or without a port, is this machine's own."""
    name = host.lower()
    if name.startswith("["):
        name, bracket, port = name[1:].partition("]")
        if not bracket or (port and not re.fullmatch(r":[0-9]*", port)):
            return False
    elif name.count(":") == 1:
        name, _, port = name.partition(":")
        if not re.fullmatch(r"[0-9]*", port):
            return False
    address = parse_address(name)
    return name == "localhost" or (address is not None and bool(address.is_loopback))


def may_be_open(host: str, allowed_hosts: Sequence[str]) -> bool:
    """Whether a server may give rights to requests without a token: nobody but this machine is meant to reach it."""
    return is_loopback(host) and all(is_loopback(name) for name in allowed_hosts)


def _is_local(request: Request) -> bool:
    """Whether a program of this machine speaks to the server without a proxy between, as far as can be seen."""
    hosts = request.headers.getlist("host")
    return (
        request.client is not None
        and is_loopback(request.client.host)
        and len(hosts) == 1
        and is_loopback(hosts[0])
        and not any(_BY_PROXY.fullmatch(name) for name in request.headers)
    )


def _expired(token: TokenInfo) -> bool:
    return token.expires_at is not None and token.expires_at <= audit.now()
