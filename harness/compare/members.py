"""The experts of a comparison: which there are, of which base model, and which of them a method uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from t2.adapters.expert import Expert
from t2.core.errors import ArgumentError, nearest
from t2.core.manifest import BaseModelRef

OWN, FOREIGN = "own", "foreign"
"""In ``experts=`` of a method: the experts of the base in use, and those of other bases."""


@dataclass(frozen=True)
class Member:
    """An expert.

    Attributes:
        name: what records call it.
        value: the value of ``experts=`` that means it alone.
        origin: the base model that it was trained on, where that is another one.
    """

    name: str
    value: str
    origin: str | None = None

    @property
    def label(self) -> str:
        """What a report calls it."""
        return self.name if self.origin is None else f"{self.name} of {self.origin}"


def members_of(experts: Mapping[str, Expert], base: BaseModelRef) -> list[Member]:
    """The experts of a comparison on a base model.

    Args:
        experts: by their values of ``experts=``.
        base: the model in use.
    """
    return [Member(expert.name, value, origin_of(expert, base)) for value, expert in experts.items()]


def origin_of(expert: Expert, base: BaseModelRef) -> str | None:
    """The name of the base model that an expert was trained on, where that is another one than this."""
    own = expert.manifest.base
    if own.fingerprint == base.fingerprint:
        return None
    return own.id if own.id != base.id else f"{own.id} ({own.fingerprint[:8]})"


def select(words: Sequence[str] | None, members: Sequence[Member], method: str) -> list[Member]:
    """Those that a method uses, in the order of the comparison.

    Args:
        words: names, ``own``, ``foreign``; None is all.
        members: the experts of the comparison.
        method: what names them, for messages.

    Raises:
        ArgumentError: a word means none of them.
    """
    if words is None:
        return list(members)
    check_names(words, [member.name for member in members], method)
    for word, there in ((OWN, False), (FOREIGN, True)):
        if word in words and not any((member.origin is not None) is there for member in members):
            told = "belongs to another base model" if word == OWN else "belongs to this base model; name others"
            raise ArgumentError(f"--methods: {method}: experts={word} means none, for every expert {told}")
    return [
        member for member in members if member.name in words or (OWN if member.origin is None else FOREIGN) in words
    ]


def check_names(words: Iterable[str], names: Sequence[str], method: str) -> None:
    """Refuse what names no expert of the comparison.

    Raises:
        ArgumentError: there is such a word.
    """
    for word in words:
        if word not in (OWN, FOREIGN, *names):
            known = nearest(word, [OWN, FOREIGN, *names])
            raise ArgumentError(f"--methods: {method}: experts={word} is no expert of this comparison{known}")
