"""Limits of one worker: bytes held for clients, turns for work, and who has which share of them.

A client paces some of the memory: bodies that arrive and answers that leave are held for as long as it takes. The
server paces the rest: what checking and storing an upload needs. Both parts of ``memory_bytes`` are counted apart, so
that no client can keep the server's own work from ending.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any, TypeVar

from t2.core.errors import TooLargeError
from t2.registry.server.problems import HttpError

T = TypeVar("T")
Address = str
Owner = tuple[str, Hashable]

SMALL = 64 * 1024
"""Bytes of one request or answer that are not counted: each connection has buffers of that size anyway."""
LEASE = "t2.lease"
"""Key of a request's :class:`Lease` in its ASGI scope."""


async def finish(threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    """Run work in a thread and wait for its end, also when the request is given up: it would go on uncounted."""
    running = asyncio.get_running_loop().run_in_executor(threads, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


class Turns:
    """Lets at most ``count`` pieces of work run at once; owners that wait are served in rotation."""

    def __init__(self, count: int, what: str, wait: float) -> None:
        """Prepare.

        Args:
            what: names the work in errors, such as ``uploads``.
            wait: seconds to wait for a turn.
        """
        self.count, self._what, self._wait = count, what, wait
        self._free = count
        self._waiting: OrderedDict[Hashable, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def one(self, owner: Hashable) -> AsyncIterator[None]:
        """A turn of an owner.

        Raises:
            HttpError: none was free in time.
        """
        if self._free > 0:
            self._free -= 1
        else:
            await self._queue(owner)
        try:
            yield
        finally:
            self._pass_on()

    async def _queue(self, owner: Hashable) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        try:
            async with asyncio.timeout(self._wait):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._pass_on()  # it came in the moment in which the wait ended
            else:
                self._leave(owner, turn)
            if isinstance(error, TimeoutError):
                text = f"{self.count} {self._what} are running, the limit; try again in a second"
                raise HttpError(503, text) from None
            raise

    def _leave(self, owner: Hashable, turn: asyncio.Future[None]) -> None:
        queue = self._waiting.get(owner)
        if queue is not None and turn in queue:
            queue.remove(turn)
            if not queue:
                del self._waiting[owner]

    def _pass_on(self) -> None:
        while self._waiting:
            owner, queue = next(iter(self._waiting.items()))
            turn = queue.popleft()
            if queue:
                self._waiting.move_to_end(owner)
            else:
                del self._waiting[owner]
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


class Workers:
    """Threads for one kind of work, so that others do not wait for it."""

    def __init__(self, count: int, what: str, wait: float) -> None:
        """Prepare; arguments as of :class:`Turns`."""
        self._turns = Turns(count, what, wait)
        self._threads = ThreadPoolExecutor(count, what)

    async def run(self, owner: Hashable, work: Callable[[], T]) -> T:
        """Run work in a thread, in its owner's turn.

        Raises:
            HttpError: no thread was free in time.
        """
        async with self._turns.one(owner):
            return await finish(self._threads, work)

    def close(self) -> None:
        """Wait for what runs."""
        self._threads.shutdown()


class _Pool:
    """Bytes that one owner, or all together, may hold."""

    __slots__ = ("growing", "limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self.growing: dict[Lease, None] = {}
        """Leases whose body still arrives, the oldest first."""

    def fits(self, lease: Lease, size: int, reserve: int) -> bool:
        # The last bytes are for the oldest body alone, so it always gets through, and then the next oldest. Otherwise
        # several bodies that each hold a part of their bytes would wait for each other.
        oldest = next(iter(self.growing), None)
        if lease is oldest:
            return self.used + size <= self.limit
        held = oldest.held if oldest is not None else 0
        return self.used - min(held, reserve) + size <= self.limit - reserve


class Memory:
    """Bytes of bodies and answers that a worker holds for its clients."""

    def __init__(self, total: int, *, body: int, share: float, wait: float) -> None:
        """Prepare.

        Args:
            total: bytes altogether.
            body: bytes of the largest body.
            share: part of all that one address, or one token, may have.
            wait: seconds to wait for others to leave memory.
        """
        self._reserve = min(body, total)
        self._all = _Pool(total)
        self._share = max(int(total * share), self._reserve)
        self._wait = wait
        self._of: dict[Owner, tuple[_Pool, set[Lease]]] = {}
        self._waiting: list[tuple[Lease, int, asyncio.Future[None]]] = []

    @property
    def used(self) -> int:
        """Bytes that are held now."""
        return self._all.used

    def lease(self, *owners: Owner) -> Lease:
        """Return a lease for the bytes of one request; release it when the request ends."""
        return Lease(self, owners)

    def pools(self, lease: Lease) -> list[_Pool]:
        """The pools that a lease's bytes count in, made where they are new."""
        if not lease.pools:
            lease.pools = [self._all]
            for owner in lease.owners:
                pool, leases = self._of.setdefault(owner, (_Pool(self._share), set()))
                leases.add(lease)
                lease.pools.append(pool)
        return lease.pools

    def charge(self, lease: Lease, size: int) -> bool:
        """Count bytes for a lease, if they fit."""
        pools = self.pools(lease)
        if size > 0 and not all(pool.fits(lease, size, self._reserve) for pool in pools):
            # An answer that is larger than what others leave is sent while there is no other.
            alone = lease not in self._all.growing and all(pool.used == lease.held for pool in pools)
            if not alone:
                return False
        for pool in pools:
            pool.used += size
        lease.held += size
        return True

    async def wait_for(self, lease: Lease, size: int) -> None:
        """Count bytes for a lease as soon as they fit.

        Raises:
            HttpError: they did not in time.
        """
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (lease, size, granted)
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(self._wait):
                await granted
        except TimeoutError:
            raise self.refusal(lease, size) from None
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)

    def refusal(self, lease: Lease, size: int) -> HttpError:
        """The error of bytes that do not fit."""
        if self._all.fits(lease, size, self._reserve):
            return HttpError(
                429,
                "other requests of this address or access token hold its share of the server's memory; try again in a "
                "second",
            )
        return HttpError(503, "other requests hold the memory that the server has for them; try again in a second")

    def changed(self) -> None:
        """Let those that wait have what has become free."""
        for entry in [*self._waiting]:
            lease, size, granted = entry
            if granted.done() or self.charge(lease, size):
                self._waiting.remove(entry)
                if not granted.done():
                    granted.set_result(None)

    def forget(self, lease: Lease) -> None:
        """Let go of a lease that holds nothing any more."""
        for owner in lease.owners:
            found = self._of.get(owner)
            if found is not None:
                found[1].discard(lease)
                if not found[1]:
                    del self._of[owner]
        lease.pools = []


class Lease:
    """Bytes that one request holds: its body, then its answer."""

    def __init__(self, memory: Memory, owners: tuple[Owner, ...]) -> None:
        self.owners = owners
        self.pools: list[_Pool] = []
        """Where its bytes count; empty while it has had none."""
        self.held = 0
        self.promised = 0
        """Bytes of the answer that are counted already."""
        self._memory = memory

    @property
    def owner(self) -> Owner | None:
        """Owner whose turn the request's work takes: its token, else its address."""
        return self.owners[-1] if self.owners else None

    def own(self, owner: Owner) -> None:
        """Count later bytes for another owner too; the lease must be empty."""
        assert not self.pools
        self.owners = (*self.owners, owner)

    async def grow(self, size: int) -> None:
        """Count bytes of a body that arrives.

        Raises:
            HttpError: there was no room in time.
        """
        for pool in self._memory.pools(self):
            pool.growing.setdefault(self)
        await self._count(size)

    def grown(self) -> None:
        """Note that the whole body is there."""
        for pool in self.pools:
            pool.growing.pop(self, None)
        self._memory.changed()

    async def promise(self, size: int) -> None:
        """Count bytes of an answer before it is made.

        Raises:
            HttpError: there was no room in time.
        """
        await self._count(size)
        self.promised += size

    def keep(self, size: int) -> None:
        """Count an answer that is there, at its true size.

        Raises:
            HttpError: there is no room. It is not waited for, as what waits is held too.
        """
        more = size - self.promised
        if more > SMALL or more < 0:
            if not self._memory.charge(self, more):
                raise self._memory.refusal(self, more)
            self.promised = size
            if more < 0:
                self._memory.changed()

    def release(self) -> None:
        """Give everything back."""
        if not self.pools:
            return
        for pool in self.pools:
            pool.growing.pop(self, None)
            pool.used -= self.held
        self.held = self.promised = 0
        self._memory.forget(self)
        self._memory.changed()

    async def _count(self, size: int) -> None:
        if not self._memory.charge(self, size):
            await self._memory.wait_for(self, size)


class Workspace:
    """Bytes that the server's own work needs for a while, in the order of asking; more than all means alone."""

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def hold(self, size: int) -> AsyncIterator[None]:
        """Have bytes while the block runs; no client can prolong what is waited for."""
        size = min(size, self._total)
        if self._waiting or size > self._free:
            granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((size, granted))
            try:
                await granted
            except BaseException:
                if granted.done() and not granted.cancelled():
                    self._give_back(size)
                else:
                    self._waiting.remove((size, granted))
                    self._grant()
                raise
        else:
            self._free -= size
        try:
            yield
        finally:
            self._give_back(size)

    def _give_back(self, size: int) -> None:
        self._free += size
        self._grant()

    def _grant(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            size, granted = self._waiting.popleft()
            if not granted.done():
                self._free -= size
                granted.set_result(None)


def check_values(body: bytes, limit: int) -> None:
    """Check how many values a JSON body can hold, before anything is made of it.

    An object of Python takes fifty times the bytes of ``{},``. Marks within texts count too, which only makes the
    limit stricter.

    Raises:
        TooLargeError: more than the limit.
    """
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > limit:
        raise TooLargeError(f"the body holds more than {limit} values, the limit here")


class Addresses:
    """Which address a request comes from, as shares are counted."""

    def __init__(self, trusted: Sequence[str]) -> None:
        """Prepare; ``trusted`` are the addresses or networks of proxies."""
        self._trusted = [ip_network(each) for each in trusted]

    def is_proxy(self, address: str | None) -> bool:
        """Whether an address is one of a trusted proxy."""
        found = parse_address(address)
        return found is not None and any(found in network for network in self._trusted)

    def of(self, client: Any, forwarded: Sequence[str]) -> Address:
        """The address of a client, without what it can choose freely.

        Args:
            client: ``(host, port)`` of the connection; None where it has none, as on a Unix socket.
            forwarded: values of ``X-Forwarded-For``, which only a trusted proxy is believed.
        """
        peer = str(client[0]) if client else ""
        if self._trusted and self.is_proxy(peer):
            for each in reversed([part.strip() for value in forwarded for part in value.split(",")]):
                if parse_address(each) is None:
                    break
                peer = each
                if not self.is_proxy(each):
                    break
        return share_of(peer)


def parse_address(text: str | None) -> Any:
    """Parse an IP address; an IPv4-mapped IPv6 address gives the IPv4 address, other text None."""
    try:
        found = ip_address((text or "").strip("[]").partition("%")[0])
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found


def share_of(address: str) -> Address:
    """The name under which an address has its share: of IPv6 the /64 network, which one host has to itself."""
    found = parse_address(address)
    if isinstance(found, IPv6Address) and not found.is_loopback:
        return str(ip_network((found, 64), strict=False))
    return str(found) if found is not None else address
