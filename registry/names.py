"""Checks of names and numbers that both clients make before anything is looked up."""

from __future__ import annotations

import re

from t2.core.errors import InvalidRequestError, NotFoundError, TooLargeError
from t2.core.references import ALIAS_PATTERN, METRIC_PATTERN, NAME_PATTERN, TAG_PATTERN, ExpertName

MAX_NUMBER = 2**31 - 1
"""Of versions and identifiers: what the database's integers hold."""

MAX_VERSION = 999_999_999
"""Highest version number of an upload, which is the highest that a reference can name."""

MAX_TAGS = 50
"""Most tags of one expert."""
MAX_ALIASES = 100
"""Most aliases of one expert; every answer about one of its versions lists them."""
MAX_METRICS = 100
"""Most metrics of one version."""
MAX_POINTS_A_CALL = 10_000

MAX_NOTE_BYTES = 2000
"""Of a text that travels in the address of a request, in UTF-8: thrice as many there, which every proxy takes."""


def check_pattern(what: str, value: str, pattern: str) -> None:
    """Raises InvalidRequestError where a value does not match a pattern from its first to its last character."""
    if not re.fullmatch(pattern, value):
        raise InvalidRequestError(f"{what}: {value[:100]!r} does not match {pattern}")


def check_name(name: ExpertName) -> None:
    """Raises InvalidRequestError where an expert cannot have this name."""
    for what, part in (("namespace", name.namespace), ("name", name.name)):
        if not _fits(part):
            raise InvalidRequestError(f"{what}: {part[:100]!r} does not match {NAME_PATTERN}, or has two dots in a row")


def check_namespace(namespace: str) -> None:
    """Raises InvalidRequestError where a namespace cannot have this name."""
    if not _fits(namespace):
        raise InvalidRequestError(
            f"namespace: {namespace[:100]!r} does not match {NAME_PATTERN}, or has two dots in a row"
        )


def known_namespace(namespace: str) -> str:
    """The name; raises NotFoundError where no namespace can have it."""
    if not _fits(namespace):
        raise NotFoundError(f"there is no namespace {namespace[:100]!r}, nor can one have this name")
    return namespace


def known_name(name: ExpertName) -> None:
    """Raises NotFoundError where no expert can have this name."""
    if not _fits(name.namespace) or not _fits(name.name):
        raise NotFoundError(f"there is no expert {str(name)[:150]!r}, nor can one have this name")


def check_alias(alias: str) -> None:
    """Raises InvalidRequestError where an alias cannot be called so."""
    check_pattern("alias", alias, ALIAS_PATTERN)


def check_tag(tag: str) -> None:
    """Raises InvalidRequestError where an expert cannot be tagged so."""
    if not re.fullmatch(TAG_PATTERN, tag):
        raise InvalidRequestError(
            f"tag {tag[:100]!r}: write 1 to 100 ASCII letters, digits and . _ : = / + -, a letter or digit first"
        )


def check_metric(metric: str) -> None:
    """Raises InvalidRequestError where a metric cannot be called so."""
    if not re.fullmatch(METRIC_PATTERN, metric):
        raise InvalidRequestError(
            f"metric {metric[:100]!r}: write 1 to 100 ASCII letters, digits and _ . , @ / : -, "
            "a letter, a digit or _ first"
        )


def check_note(what: str, text: str) -> None:
    """Raises InvalidRequestError where a text is too long for the address of a request."""
    size = len(text.encode("utf-8", "replace"))
    if size > MAX_NOTE_BYTES:
        raise InvalidRequestError(f"{what}: {size} bytes in UTF-8, the limit is {MAX_NOTE_BYTES}; shorten it")


def check_key(key: str | None) -> None:
    """Raises InvalidRequestError where an upload's idempotency key is not plain."""
    if key is not None and not re.fullmatch(r"[\x21-\x7e]{1,100}", key):
        raise InvalidRequestError("idempotency key: give 1 to 100 printable ASCII characters without spaces")


def check_points(count: int, limit: int = MAX_POINTS_A_CALL) -> None:
    """Raises TooLargeError where so many points of a reward curve are not taken at once."""
    if count > limit:
        raise TooLargeError(f"{count} points in one request, the limit is {limit}; send parts")


def check_number(what: str, number: int) -> None:
    """Raises NotFoundError where a version or an identifier cannot have this number."""
    if not 1 <= number <= MAX_NUMBER:
        raise NotFoundError(f"there is no {what} with the number {number}")


def _fits(part: str) -> bool:
    return re.fullmatch(NAME_PATTERN, part) is not None and ".." not in part
