"""What was fetched from registry servers, kept under ``T2_CACHE_DIR/experts``: runs repeat without the network.

Contents are stored by digest and checked against it each time they are read, so that a damaged one is fetched again.
For each server the cache also holds the last known meaning of each reference, and the digest that each version had at
first use: a version never changes, so another digest later is an error. Everything here can be deleted at any time. The
cache itself deletes only the oldest of more than :data:`MOST_REFERENCES` references of a server. Any number of
processes may use one cache.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pydantic
from pydantic import BaseModel, ConfigDict

from t2.core.digests import sha256
from t2.core.errors import NotFoundError, RegistryError, StorageError, UnavailableError
from t2.core.files import atomic_write
from t2.core.references import Reference, is_name, parse_name
from t2.core.settings import cache_dir
from t2.registry.blobs.local import LocalBlobs
from t2.registry.client.answers import check_resolved
from t2.registry.client.base import RegistryClient
from t2.registry.schemas import Digest, Version, VersionDetail

_log = logging.getLogger(__name__)
MOST_REFERENCES = 10_000
"""Most references, and most digests of versions, that are stored for one server."""


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


class _Pin(BaseModel):
    model_config = ConfigDict(extra="ignore")

    server: str
    reference: str
    digest: Digest


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
            RegistryError: it answered with a version that does not match, or the version's digest has changed.
        """
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
            self.confirm(client, memory.version)
            return Resolved(memory.version, memory.at)
        check_resolved(client.location, reference, version)
        self.confirm(client, version)
        if _is_server(client):
            expert = reference.expert
            for each in {reference, Reference(expert, version=version.version) if expert else reference}:
                self._remember(client.location, each, version)
        return Resolved(version)

    def confirm(self, client: RegistryClient, version: Version) -> None:
        """Check that a version still has the digest of its first use; store the digest of a new one.

        Raises:
            RegistryError: it had another digest, although versions never change.
        """
        if not _is_server(client):
            return
        server = client.location
        if not is_name(version.name):
            raise RegistryError(f"{server}: {version.name[:150]!r} is not an expert's name; its answer was not used")
        reference = Reference(parse_name(version.name), version=version.version)
        path = self._path(server, reference, "versions")
        known = self._read_pin(path, server, reference, version.digest)
        if known not in (None, version.digest):
            raise RegistryError(
                f"{server}: {reference} is sha256:{version.digest} now and was sha256:{known} before, and a version "
                f"never changes: ask who runs this registry, use {reference.expert}@sha256:{known}, or delete {path} "
                "if the registry was replaced by a new one"
            )
        if known is None or not path.exists():
            pin = _Pin(server=server, reference=str(reference), digest=version.digest)
            self._store(path, pin, f"the digest of {reference}")

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
        if sha256(data) != digest:
            raise RegistryError(f"{client.location}: asked for sha256:{digest}, it answers with other bytes; try again")
        if _is_server(client):
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
        self._store(self._path(server, reference), memory, f"what {reference} means")

    def _store(self, path: Path, value: BaseModel, what: str) -> None:
        """Write a file; delete the oldest files of its folder if there are too many."""
        new = not path.exists()
        try:
            atomic_write(path, value.model_dump_json(indent=1).encode())
        except StorageError as error:
            _log.warning("%s is not kept for the next time: %s", what, error)
            return
        if new:
            with contextlib.suppress(OSError):
                _delete_oldest(path.parent)

    def _read_pin(self, path: Path, server: str, reference: Reference, digest: str) -> str | None:
        """Return the digest that a version had at first use; None if it is new."""
        try:
            pin = _Pin.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            memory = self._recall(server, reference)
            return memory.version.digest if memory is not None else None
        except (OSError, pydantic.ValidationError):
            pin = None
        if pin is not None and (pin.server, pin.reference) == (server, str(reference)):
            return pin.digest
        _log.warning(
            "%s: the stored digest of %s is damaged and replaced by sha256:%s",
            path,
            reference,
            digest,
        )
        return None

    def _recall(self, server: str, reference: Reference) -> _Memory | None:
        try:
            memory = _Memory.model_validate_json(self._path(server, reference).read_bytes(), extra="ignore")
        except (OSError, pydantic.ValidationError):
            return None
        if (memory.server, memory.reference) != (server, str(reference)):
            return None
        try:
            check_resolved(server, reference, memory.version)
        except RegistryError:
            return None
        return memory

    def _forget(self, server: str, reference: Reference) -> None:
        with contextlib.suppress(OSError):
            self._path(server, reference).unlink(missing_ok=True)

    def _path(self, server: str, reference: Reference, kind: str = "references") -> Path:
        names = sha256(server.encode())[:16], sha256(str(reference).encode())[:32]
        return self.folder / kind / names[0] / f"{names[1]}.json"


def fetch(client: RegistryClient, reference: Reference) -> Fetched:
    """The file that a reference means, by way of the user's cache; see :meth:`ExpertCache.fetch`."""
    return ExpertCache().fetch(client, reference)


def _delete_oldest(folder: Path) -> None:
    """Delete the oldest tenth of a folder's files if there are too many."""
    files = [entry for entry in os.scandir(folder) if entry.name.endswith(".json")]
    if len(files) > MOST_REFERENCES:
        files.sort(key=lambda entry: entry.stat().st_mtime)
        for entry in files[: max(1, MOST_REFERENCES // 10)]:
            os.unlink(entry)


def _is_server(client: RegistryClient) -> bool:
    """Whether it is worth caching: what lies in a folder of this machine is at hand."""
    return client.location.startswith(("http://", "https://"))
