"""The demo experts in the embedded registry.

Nothing here needs PyTorch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from t2.core.digests import sha256_file
from t2.core.errors import ConflictError
from t2.core.references import parse_name
from t2.harness.catalogue import shipped_experts
from t2.harness.publishing import push
from t2.harness.shipped import PREFIX
from t2.registry.client.base import RegistryClient
from t2.registry.schemas import VALIDATION_SCORE, ExpertQuery, VersionQuery

TAG = "demo"
"""What seeded experts are tagged with."""


def seed(client: RegistryClient, experts: Mapping[str, Path] | None = None) -> None:
    """See to it that the experts which come with t2 are in a registry, with their curves and scores.

    One that is there costs a look-up; one of a newer t2 becomes a new version; one that was deleted stays so. Several
    processes may do it at once.

    Args:
        client: the registry.
        experts: their files by name; None are those of this t2.

    Raises:
        StorageError: the registry cannot be written.
        UnavailableError: its database cannot.
    """
    experts = shipped_experts() if experts is None else experts
    shipped = {name: (path, sha256_file(path)) for name, path in experts.items()}
    query = ExpertQuery(namespace=PREFIX.rstrip("/"))
    latest = {expert.name: expert.latest for expert in client.list_experts(query, limit=200).items}
    for name, (path, digest) in shipped.items():
        version = latest.get(name)
        found = [version] if version is not None else []
        if version is not None and version.digest != digest:
            found = [one for one in client.search_versions(VersionQuery(digest=digest)).items if one.name == name]
        # The score is the last thing that a publication writes.
        if any(one.digest == digest and VALIDATION_SCORE in one.metrics for one in found):
            continue
        with contextlib.suppress(ConflictError):  # the user has deleted it
            push(client, parse_name(name), path, tags=[TAG], description="comes with t2")
