"""The pins of constraints.txt cover everything that an install brings."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.environments import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins() -> dict[str, Version]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    split = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in split}


def requirements(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    return [Requirement(line) for line in lines if not line.startswith("t2-eval")]


def closure(requirement: Requirement, seen: set[tuple[str, frozenset[str]]]) -> Iterator[str]:
    name = canonicalize_name(requirement.name)
    key = (name, frozenset(requirement.extras))
    if key in seen:
        return
    seen.add(key)
    yield name
    for line in importlib.metadata.requires(name) or []:
        needed = Requirement(line)
        extras = requirement.extras or {""}
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
            yield from closure(needed, seen)


@pytest.mark.parametrize("requirement", requirements("eval", "demo", "dev"), ids=str)
def test_the_pins_lie_in_the_ranges(requirement: Requirement) -> None:
    if requirement.name != "pip":
        assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_every_dependency_of_a_dependency_is_pinned() -> None:
    seen: set[tuple[str, frozenset[str]]] = set()
    needed = {name for requirement in requirements("eval", "dev") for name in closure(requirement, seen)}
    assert needed - pins().keys() - {"pip"} == set()


def test_the_makefile_offers_what_its_help_says() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    offered = set(re.findall(r'@echo "make ([\w-]+)', makefile))
    assert {"demo", "test", "lint", "venv"} <= offered
    assert offered <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
