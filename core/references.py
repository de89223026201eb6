"""Names of experts in a registry: what they may look like, and references to one of their versions.

    namespace/name                  the version that the alias ``production`` names, else the latest one
    namespace/name@3                version 3
    namespace/name@staging          the version that the alias ``staging`` names
    namespace/name@sha256:<digest>  the version with this digest, whatever moves later
    @sha256:<digest>                the same content, under whichever name

A name without a namespace is in the namespace ``default``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from t2.core.errors import ArgumentError

DEFAULT_NAMESPACE = "default"
PRODUCTION = "production"
"""The alias that a reference without a selector, and the choice of default experts, looks for first."""

NAME_PATTERN = r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$"
"""Namespaces and names: lower-case letters, digits, and ``.``, ``_``, ``-`` inside; at most 64 characters."""
ALIAS_PATTERN = r"^[a-z][a-z0-9._-]{0,62}$"
"""Aliases begin with a letter, so that none looks like a version, and have no colon, so that none is a digest."""
TAG_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:=/+-]{0,99}$"
METRIC_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.,@/:-]{0,99}$"
DIGEST_PATTERN = r"^[0-9a-f]{64}$"

_NAME = re.compile(NAME_PATTERN)
_ALIAS = re.compile(ALIAS_PATTERN)
_DIGEST = re.compile(DIGEST_PATTERN)
_VERSION = re.compile(r"^[1-9][0-9]{0,8}$")


@dataclass(frozen=True)
class ExpertName:
    """The full name of an expert; ``str()`` gives ``namespace/name``."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class Reference:
    """A parsed reference; at most one of ``version``, ``alias`` and ``digest`` is set.

    Attributes:
        expert: the expert's name; None for content by digest under any name.
    """

    expert: ExpertName | None
    version: int | None = None
    alias: str | None = None
    digest: str | None = None

    @property
    def pinned(self) -> bool:
        """Whether the reference means the same content for ever."""
        return self.version is not None or self.digest is not None

    def __str__(self) -> str:
        name = str(self.expert) if self.expert is not None else ""
        if self.version is not None:
            return f"{name}@{self.version}"
        if self.alias is not None:
            return f"{name}@{self.alias}"
        return f"{name}@sha256:{self.digest}" if self.digest is not None else name


def is_digest(text: str) -> bool:
    """Whether a text is a hex SHA-256 in lower case."""
    return _DIGEST.fullmatch(text) is not None


def parse_name(text: str) -> ExpertName:
    """Read ``namespace/name`` or ``name``.

    Raises:
        ArgumentError: it is neither.
    """
    parts = text.split("/")
    if len(parts) == 1:
        parts = [DEFAULT_NAMESPACE, *parts]
    if len(parts) != 2 or not all(_NAME.fullmatch(part) and ".." not in part for part in parts):
        raise ArgumentError(
            f"{text[:150]!r} is not an expert's name: write namespace/name, each of at most 64 lower-case letters, "
            "digits, dots, hyphens and underscores, such as team/math"
        )
    return ExpertName(*parts)


def parse_alias(text: str) -> str:
    """Check an alias.

    Raises:
        ArgumentError: it is none.
    """
    if not _ALIAS.fullmatch(text):
        raise ArgumentError(
            f"{text[:100]!r} is not an alias: write a lower-case letter, then at most 62 lower-case letters, digits, "
            "dots, hyphens and underscores, such as production"
        )
    return text


def is_name(text: str) -> bool:
    """Whether a text could name an expert in a registry."""
    try:
        parse_name(text)
    except ArgumentError:
        return False
    return True


def parse_reference(text: str) -> Reference:
    """Read a reference, as the module describes them.

    Raises:
        ArgumentError: it is none.
    """
    name, at, selector = text.partition("@")
    if not at:
        return Reference(parse_name(name))
    expert = parse_name(name) if name else None
    if selector.startswith("sha256:"):
        digest = selector.removeprefix("sha256:")
        if not _DIGEST.fullmatch(digest):
            raise ArgumentError(f"{text[:150]!r}: a digest is written sha256: and 64 hex digits, in lower case")
        return Reference(expert, digest=digest)
    if expert is not None and _VERSION.fullmatch(selector):
        return Reference(expert, version=int(selector))
    if expert is not None and _ALIAS.fullmatch(selector):
        return Reference(expert, alias=selector)
    raise ArgumentError(
        f"{text[:150]!r} is not a reference to an expert: write namespace/name, then @ and a version number, an "
        "alias in lower case, or sha256: and the digest"
    )
