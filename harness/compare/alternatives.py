"""Alternatives among a method's arguments: ``per=expert|layer,shots=3|10`` stands for four rows, and what is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

from lm_eval.utils import simple_parse_args_string

from t2.core.errors import ArgumentError
from t2.harness.evaluating import written

TOLD_APART = ("shots", "light", "metric", "filter", "experts")
"""Arguments that decide which documents and which metric are held out: scores across their values say nothing."""


@dataclass(frozen=True)
class Variant:
    """One configuration.

    Attributes:
        text: its arguments as they were given, ``key=value,…``.
        args: what they are.
        among: all those that it may be chosen from, with alternatives; None where it is alone.
    """

    text: str
    args: dict[str, Any]
    among: str | None


def variants(option: str, text: str) -> list[Variant]:
    """Read ``key=value,key=value|value,…``, the first alternatives first.

    Args:
        option: where it was given, for messages.
        text: as given; values are read as lm-eval reads those of model_args.

    Raises:
        ArgumentError: a part has no name or no value, or a name stands there twice.
    """
    given: dict[str, list[str]] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = (each.strip() for each in part.partition("="))
        alternatives = [each.strip() for each in value.split("|")]
        if not (name and equals and all(alternatives)):
            raise ArgumentError(f"{option} {text}: {part!r} is not of the form key=value")
        if name in given:
            raise ArgumentError(f"{option} {text}: {name} stands there twice; join its values by |")
        given[name] = alternatives
    chosen = any(len(values) > 1 for name, values in given.items() if name not in TOLD_APART)
    found = []
    for values in product(*given.values()):
        own = dict(zip(given, values, strict=True))
        among = {name: own[name] if name in TOLD_APART else "|".join(given[name]) for name in given}
        args = simple_parse_args_string(written(own))
        found.append(Variant(written(own), args, written(among) if chosen else None))
    return found
