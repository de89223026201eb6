"""What was fetched from registry servers, kept under ``T2_CACHE_DIR/experts``: runs repeat without the network.

Contents lie under their digest and are checked against it each time they are read, so that a damaged one is fetched
anew. Beside them lies, for each server, what references meant when it last said so. Everything here can be deleted at
any time; nothing is ever deleted by itself. Any number of processes may use one cache.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pydantic
from pydantic import BaseModel, ConfigDict

from t2.core.digests import sha256
from t2.core.errors import NotFoundError, RegistryError, StorageError, UnavailableError
from t2.core.files import atomic_write
from t2.core.references import Reference
from t2.core.settings import cache_dir
from t2.registry.blobs.local import LocalBlobs
from t2.registry.client.base import RegistryClient
from t2.registry.schemas import VersionDetail

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resolved:
    """What a reference means.

    Attributes:
        version: as the registry tells it, or told it.
        remembered: when it was told; None where the registry answered now.
    """

    version: VersionDetail
    remembered: datetime | None = None


@dataclass(frozen=True)
class Fetched:
    """An expert's file.

    Attributes:
        data: its bytes, of the digest that the reference means.
        version: what the registry says of it; None where it was found by its digest and never asked for.
        remembered: when ``version`` was told; None where the registry answered now.
    """

    data: bytes
    version: VersionDetail | None
    remembered: datetime | None = None


class _Memory(BaseModel):
    model_config = ConfigDict(extra="ignore")

    server: str
    reference: str
    at: datetime
    version: VersionDetail


class ExpertCache:
    """A cache of experts' files, and of what references to them meant."""

    def __init__(self, folder: Path | None = None) -> None:
        """Nothing is created before there is something to keep.

        Args:
            folder: ``T2_CACHE_DIR/experts`` where None.
        """
        self.folder = folder if folder is not None else cache_dir() / "experts"
        self._contents = LocalBlobs(self.folder / "sha256")

    def fetch(self, client: RegistryClient, reference: Reference) -> Fetched:
        """The file that a reference means.

        One that is named by digest and lies in the cache is answered without a request.

        Raises:
            NotFoundError: the registry has none such.
            UnavailableError: it cannot be reached, and the cache does not have it.
        """
        if reference.digest is not None:
            data = self.content(reference.digest)
            if data is not None:
                memory = self._recall(client.location, reference)
                if memory is None or memory.version.digest != reference.digest:
                    return Fetched(data, None)
                return Fetched(data, memory.version, memory.at)
        resolved = self.resolve(client, reference)
        return Fetched(self.download(client, resolved.version.digest), resolved.version, resolved.remembered)

    def resolve(self, client: RegistryClient, reference: Reference) -> Resolved:
        """What a reference means: by the registry, or where it cannot be reached, as it last said.

        A version never changes; where an alias may have moved since, a warning says so.

        Raises:
            NotFoundError: the registry has none such.
            UnavailableError: it cannot be reached, and has never been asked for this.
        """
        if not _is_server(client):
            return Resolved(client.resolve(reference))
        try:
            version = client.resolve(reference)
        except NotFoundError:
            self._forget(client.location, reference)
            raise
        except UnavailableError as error:
            memory = self._recall(client.location, reference)
            if memory is None:
                raise
            if not reference.pinned:
                _log.warning(
                    "%s is taken as %s, as the registry said on %s; it may have moved since (%s)",
                    reference,
                    memory.version.reference,
                    f"{memory.at:%Y-%m-%d %H:%M} UTC",
                    error,
                )
            return Resolved(memory.version, memory.at)
        expert = reference.expert
        for each in {reference, Reference(expert, version=version.version) if expert else reference}:
            self._remember(client.location, each, version)
        return Resolved(version)

    def download(self, client: RegistryClient, digest: str) -> bytes:
        """The file with a digest, out of the cache or from the registry.

        Raises:
            NotFoundError: the registry has none such.
            UnavailableError: it cannot be reached, and the cache does not have it.
        """
        data = self.content(digest)
        if data is not None:
            return data
        data = client.download(digest)
        if _is_server(client) and sha256(data) == digest:
            try:
                self._contents.put(digest, data)
            except UnavailableError as error:
                _log.warning("the expert is not kept for the next time: %s", error)
        return data

    def content(self, digest: str) -> bytes | None:
        """The cached file with a digest; None where there is none. A damaged one is removed."""
        try:
            return self._contents.get(digest)
        except (NotFoundError, UnavailableError):
            return None
        except RegistryError:
            _log.warning("a cached expert is damaged and fetched anew: %s", digest)
            with contextlib.suppress(UnavailableError, RegistryError):
                self._contents.delete(digest)
            return None

    def _remember(self, server: str, reference: Reference, version: VersionDetail) -> None:
        memory = _Memory(server=server, reference=str(reference), at=datetime.now(UTC), version=version)
        try:
            atomic_write(self._path(server, reference), memory.model_dump_json(indent=1).encode())
        except StorageError as error:
            _log.warning("what %s means is not kept for the next time: %s", reference, error)

    def _recall(self, server: str, reference: Reference) -> _Memory | None:
        try:
            memory = _Memory.model_validate_json(self._path(server, reference).read_bytes(), extra="ignore")
        except (OSError, pydantic.ValidationError):
            return None
        return memory if (memory.server, memory.reference) == (server, str(reference)) else None

    def _forget(self, server: str, reference: Reference) -> None:
        with contextlib.suppress(OSError):
            self._path(server, reference).unlink(missing_ok=True)

    def _path(self, server: str, reference: Reference) -> Path:
        names = sha256(server.encode())[:16], sha256(str(reference).encode())[:32]
        return self.folder / "references" / names[0] / f"{names[1]}.json"


def fetch(client: RegistryClient, reference: Reference) -> Fetched:
    """The file that a reference means, by way of the user's cache; see :meth:`ExpertCache.fetch`."""
    return ExpertCache().fetch(client, reference)


def _is_server(client: RegistryClient) -> bool:
    """Whether it is worth caching: what lies in a folder of this machine is at hand."""
    return client.location.startswith(("http://", "https://"))
