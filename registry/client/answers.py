"""Checks that what a registry answers is about what it was asked for.

A registry, or a proxy before it, may answer with another expert, version or content. What a request determines of its
answer is compared here, so that a wrong answer is an error and not a result.
"""

from __future__ import annotations

from collections.abc import Mapping

from t2.core.errors import RegistryError
from t2.core.references import Reference
from t2.registry.schemas import Version


def check_answer(location: str, asked: str, answer: object, expected: Mapping[str, object]) -> None:
    """Check the fields of an answer that follow from the request.

    Args:
        location: of the registry, for the message.
        asked: the request, for the message.
        answer: an object with these fields.
        expected: their values, by name.

    Raises:
        RegistryError: a field has another value.
    """
    for field, value in expected.items():
        got = getattr(answer, field)
        if got != value:
            raise RegistryError(
                f"{location}: asked for {asked}, it answers with {field} {_shown(got)} instead of {_shown(value)}; its "
                "answer was not used: check the URL, and ask who runs this registry"
            )


def check_resolved(location: str, reference: Reference, version: Version) -> None:
    """Check that a version is one that a reference can mean: its name, number and digest.

    Raises:
        RegistryError: it is not.
    """
    expected: dict[str, object] = {}
    if reference.digest is not None:
        expected["digest"] = reference.digest
    if reference.expert is not None:
        expected["name"] = str(reference.expert)
    if reference.version is not None:
        expected["version"] = reference.version
    check_answer(location, str(reference), version, expected)


def _shown(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and len(text) <= 150 else f"{text[:150]!r}…"
