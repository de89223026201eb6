"""Experts given to a registry: the file, then all that is known of it. Each step may be repeated.

Nothing here needs PyTorch.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from t2.core.curve import CurvePoint
from t2.core.errors import ConflictError, ExpertFileError, NotFoundError
from t2.core.references import ExpertName, Reference
from t2.harness.runs import BaseTargets, Run, read_run
from t2.registry.client.base import RegistryClient
from t2.registry.client.cache import ExpertCache
from t2.registry.schemas import Version

_PART = 5000
"""Points of a curve in one request."""

_log = logging.getLogger(__name__)


def check_push(client: RegistryClient, name: ExpertName, kind: str) -> None:
    """Check before long work that its expert may be published: a request that needs the right to write.

    The namespace is made where it is new.

    Raises:
        ConflictError: the expert of that name is of another kind, or deleted.
        UnauthorizedError: there is no valid token.
        ForbiddenError: the token may not write.
        UnavailableError: the registry cannot be reached.
    """
    with contextlib.suppress(ConflictError):  # it is there, and the token may write
        client.create_namespace(name.namespace)
    try:
        there = client.get_expert(name)
    except NotFoundError as error:
        if "deleted" in str(error):
            raise ConflictError(f"{client.location}: {error}; restore it, or push under another name") from error
        return
    if there.kind != kind:
        raise ConflictError(
            f"{client.location}: {name} is of kind {there.kind}, and this of kind {kind}; push it under another name"
        )


def push(
    client: RegistryClient,
    name: ExpertName,
    file: Path,
    *,
    metrics: Mapping[str, float] | None = None,
    tags: Iterable[str] = (),
    alias: str | None = None,
    description: str = "",
) -> Version:
    """Publish an expert's file with what lies beside it: curve, metrics and the ranks of its base model.

    Done again, or after it was interrupted, it does what is missing and nothing twice.

    Args:
        client: the registry.
        name: the expert's name there.
        file: the expert's file.
        metrics: further numbers about it, which go before those found.
        tags: of the expert.
        alias: points to the version in the end.
        description: a note on the version.

    Raises:
        ExpertFileError: the file cannot be read.
        RegistryError: the registry refuses it, or cannot be reached.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ExpertFileError(f"cannot read {file}: {error.strerror or error}") from error
    run = read_run(file)
    return publish(client, name, data, run, metrics=metrics or {}, tags=tags, alias=alias, description=description)


def publish(
    client: RegistryClient,
    name: ExpertName,
    data: bytes,
    run: Run,
    *,
    metrics: Mapping[str, float],
    tags: Iterable[str] = (),
    alias: str | None = None,
    description: str = "",
) -> Version:
    """As :func:`push`, of bytes; the metrics come last but for the alias, so that who has them has all."""
    if run.base is not None:
        _tell_base(client, run.base)
    version = client.publish(name, data, description=description)
    ExpertCache().confirm(client, version)
    _add_curve(client, name, version, run.curve)
    wanted = sorted(set(tags))
    if wanted:
        client.change_tags(name, add=wanted)
    values = {**run.metrics, **metrics}
    if any(version.metrics.get(metric) != value for metric, value in values.items()):
        client.set_metrics(name, version.version, values)
    if alias is not None:
        client.set_alias(name, alias, version.version)
    told = client.resolve(Reference(name, version=version.version))
    ExpertCache().confirm(client, told)
    return Version(**{k: v for k, v in told.model_dump().items() if k != "manifest"}).model_copy(
        update={"created": version.created}
    )


def _tell_base(client: RegistryClient, known: BaseTargets) -> None:
    base = known.base
    try:
        client.put_base_model(base.fingerprint, base.id, base.revision, known.targets)
    except ConflictError as error:
        _log.warning("registry: %s", error)


def _add_curve(client: RegistryClient, name: ExpertName, version: Version, points: Sequence[CurvePoint]) -> None:
    """Add the points that are not there; a training done again gives the same file in other seconds."""
    if points and not version.created:
        there = {(point.split, point.step) for point in client.curve(name, version.version).points}
        points = [point for point in points if (point.split, point.step) not in there]
    for start in range(0, len(points), _PART):
        client.add_points(name, version.version, points[start : start + _PART])
