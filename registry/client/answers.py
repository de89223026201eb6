"""Checks that a registry's answer belongs to the request.

A registry or a proxy may answer with another expert, version or content. The fields of the answer that the request
determines are compared here, so that a wrong answer is an error and not a result.
"""

from __future__ import annotations

from collections.abc import Mapping

from t2.core.errors import RegistryError
from t2.core.references import Reference
from t2.registry.schemas import Version


def check_answer(location: str, request: str, answer: object, expected: Mapping[str, object]) -> None:
    """Check the fields of an answer that follow from the request.

    Args:
        location: URL or folder of the registry, for the message.
        request: description of the request, for the message.
        answer: an object with these fields.
        expected: the right values, by field name.

    Raises:
        RegistryError: a field has another value.
    """
    for field, value in expected.items():
        got = getattr(answer, field)
        if got != value:
            raise RegistryError(
                f"{location}: asked for {request}, it answers with {field} {_format(got)} instead of {_format(value)}; "
                "its answer was not used: check the URL, and ask who runs this registry"
            )


def check_resolved(location: str, reference: Reference, version: Version) -> None:
    """Check that a version matches a reference: its name, number and digest.

    Raises:
        RegistryError: it does not match.
    """
    expected: dict[str, object] = {}
    if reference.digest is not None:
        expected["digest"] = reference.digest
    if reference.expert is not None:
        expected["name"] = str(reference.expert)
    if reference.version is not None:
        expected["version"] = reference.version
    check_answer(location, str(reference), version, expected)


def _format(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and len(text) <= 150 else f"{text[:150]!r}…"
