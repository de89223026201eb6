"""The registry that a run uses: opened, seeded with the demo experts where it is embedded, and read by reference.

Nothing here needs PyTorch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from t2.core.digests import sha256_file
from t2.core.errors import NotFoundError, RegistryError, StorageError, nearest
from t2.core.expertfile import ExpertFile, decode_expert
from t2.core.references import DEFAULT_NAMESPACE, Reference
from t2.core.settings import experts_dir, registry_url
from t2.harness.catalogue import known_experts, shipped_experts
from t2.harness.seeding import seed
from t2.registry.client.answers import check_answer, check_resolved
from t2.registry.client.base import RegistryClient
from t2.registry.client.cache import ExpertCache
from t2.registry.schemas import MAX_PAGE, ExpertQuery, Page, Version, VersionDetail

T = TypeVar("T")
_MOST_NAMES = 2000
"""Names of a registry among which the nearest to an unknown one is looked for."""

_DEFAULT = f"{DEFAULT_NAMESPACE}/"


@dataclass(frozen=True)
class Fetched:
    """An expert out of a registry.

    Attributes:
        data: its content, checked against the digest.
        file: the same, read.
        reference: the version it is, or the digest by which it was named.
        version: what the registry says of it; None where it was found without asking one.
    """

    data: bytes
    file: ExpertFile
    reference: str
    version: VersionDetail | None


def is_server(where: str | None = None) -> bool:
    """Whether the registry is a server's, and not a folder of this machine."""
    return "://" in (where or registry_url())


@contextlib.contextmanager
def registry(where: str | None = None, *, seeded: bool = True) -> Iterator[RegistryClient]:
    """Open the registry in use; an embedded one has the demo experts in it.

    Args:
        where: a URL or a folder; None is ``T2_REGISTRY_URL``, else the folder of this user.
        seeded: put the demo experts into an embedded one that lacks them.

    Raises:
        ArgumentError: the URL is none of a server.
        StorageError: the folder cannot be created or written.
        RegistryError: it was written by a newer t2, or cannot be opened.
    """
    # Database and migrations take half a second to import, which a run of files alone can do without.
    from t2.registry.open import open_registry

    with open_registry(where) as client:
        if seeded and not is_server(where):
            seed(client)
        yield client


def fetch(reference: Reference, where: str | None = None) -> Fetched:
    """The expert that a reference means.

    Content named by its digest is taken from the demo experts or the cache where it is there, without asking. Where a
    server cannot be reached a reference means what it last said, with a warning if that may have changed since.

    Raises:
        NotFoundError: the registry has none such; the message names the nearest.
        UnavailableError: it cannot be reached, and the cache does not know the reference.
        ExpertFileError: what it holds is no expert.
        RegistryError: its answer does not match the request, an earlier answer or the file.
    """
    if reference.digest is not None:
        for path in shipped_experts().values():
            if sha256_file(path) == reference.digest:
                data = path.read_bytes()
                return Fetched(data, decode_expert(data, str(path)), str(reference), None)
    with registry(where) as client, with_nearest(client, reference):
        found = ExpertCache().fetch(client, reference)
        location = client.location
    named = str(reference) if reference.digest is not None or found.version is None else found.version.reference
    if found.version is None:
        return Fetched(found.data, decode_expert(found.data, named, canonical=False), named, None)
    return Fetched(found.data, read_version(found.data, found.version, location), named, found.version)


def read_version(data: bytes, version: Version, location: str) -> ExpertFile:
    """Read the file of a version, and check the registry's description of it.

    Files with another layout, uploaded before layouts were checked, are accepted.

    Args:
        data: content of the file.
        version: the registry's description of it.
        location: URL or folder of the registry.

    Raises:
        ExpertFileError: the file is not an expert.
        RegistryError: the registry's description contradicts the file.
    """
    file = decode_expert(data, version.reference, canonical=False)
    manifest = file.manifest
    expected = {
        "digest": file.digest,
        "size": len(data),
        "kind": manifest.kind,
        "task": manifest.task,
        "domain": manifest.domain,
        "method": manifest.method,
        "base_fingerprint": manifest.base.fingerprint,
    }
    check_answer(location, f"{version.reference}, whose file says otherwise", version, expected)
    return file


def find(client: RegistryClient, reference: Reference) -> VersionDetail:
    """The version that a reference means.

    Raises:
        NotFoundError: there is none; the message names the nearest.
        RegistryError: its answer does not match the request or an earlier answer.
    """
    with with_nearest(client, reference):
        version = client.resolve(reference)
    check_resolved(client.location, reference, version)
    ExpertCache().confirm(client, version)
    return version


@contextlib.contextmanager
def with_nearest(client: RegistryClient, reference: Reference) -> Iterator[None]:
    """Let what is not there be told with where it was sought, and with the nearest name."""
    try:
        yield
    except NotFoundError as error:
        raise NotFoundError(f"{client.location}: {error}{_suggestion(client, reference)}") from error


def every(page: Callable[[str | None], Page[T]]) -> Iterator[T]:
    """All items of a list, page by page; ``page`` gets the cursor."""
    cursor: str | None = None
    while True:
        found = page(cursor)
        yield from found.items
        cursor = found.next
        if cursor is None:
            return


def expert_names(client: RegistryClient, namespace: str | None = None) -> list[str]:
    """Names of experts, at most 2000 of them."""
    query = ExpertQuery(namespace=namespace, sort="name")
    names: list[str] = []
    for expert in every(lambda cursor: client.list_experts(query, cursor=cursor, limit=MAX_PAGE)):
        names.append(expert.name)
        if len(names) == _MOST_NAMES:
            break
    return names


def unknown(name: str, where: str | None = None) -> NotFoundError:
    """The error for a name that is of nothing, here or in the registry in use; it tells the nearest."""
    known = list(known_experts())
    try:
        with registry(where) as client:
            names = expert_names(client)
            place = f"in the registry {client.location}"
    except (RegistryError, StorageError) as error:
        names, place = [], f"in the registry, which did not answer ({error})"
    # Those of the namespace that a bare name is in are known by their bare names.
    names += [one.removeprefix(_DEFAULT) for one in names if one.startswith(_DEFAULT)]
    return NotFoundError(
        f"experts: {name} is neither an expert in {experts_dir()}, nor a file or folder, nor {place}"
        f"{nearest(name, [*known, *names])}"
    )


def _suggestion(client: RegistryClient, reference: Reference) -> str:
    """The nearest name, where it is the name that is unknown."""
    if reference.expert is None:
        return ""
    with contextlib.suppress(RegistryError):
        names = expert_names(client)
        if str(reference.expert) not in names:
            return nearest(str(reference.expert), names)
    return ""
