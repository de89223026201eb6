"""The documentation names every option, argument and setting, and its links lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
from pydantic import BaseModel

from t2.cli.main import app
from t2.core.curve import CurvePoint
from t2.core.manifest import BaseModelRef, Manifest
from t2.core.record import AdaptationRecord
from t2.core.results import TaskRun
from t2.core.settings import SETTINGS
from t2.harness.args import FROM_PRETRAINED, MODEL_ARGS
from t2.registry.server.app import OPERATIONS
from t2.registry.server.operations import Operation
from t2.registry.server.problems import TITLES
from t2.registry.settings import PREFIX, ServerSettings
from tests.environments import REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])


@dataclass(frozen=True)
class Section:
    """A heading and the text under it, up to the next heading."""

    heading: str
    text: str


def without_code_blocks(text: str) -> str:
    return re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)


def sections() -> Iterator[Section]:
    for page in PAGES:
        parts = re.split(r"^#+ +(.*)$", page.read_text(), flags=re.MULTILINE)
        for heading, text in zip(parts[1::2], parts[2::2], strict=True):
            yield Section(heading, text)


def table_rows(*, of: str = "*.md") -> dict[str, str]:
    """Rows of all tables by the code in their first cell, several names of one row apart."""
    rows: dict[str, str] = {}
    for page in PAGES:
        if not page.match(of):
            continue
        for line in page.read_text().splitlines():
            if line.startswith("|"):
                for name in re.findall(r"`([^`]+)`", line.split("|")[1]):
                    rows.setdefault(name, line)
    return rows


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    subcommands = getattr(command, "commands", {})
    if not subcommands:
        yield path, command
    for name, subcommand in subcommands.items():
        yield from commands(subcommand, f"{path} {name}")


PROGRAM = typer.main.get_command(app)
COMMANDS = dict(commands(PROGRAM, "t2"))


@pytest.mark.parametrize("path", sorted(COMMANDS))
def test_every_command_has_a_section_that_names_its_options(path: str) -> None:
    texts = [section.text for section in sections() if f"`{path}`" in section.heading]
    assert texts, f"no section of the documentation has `{path}` in its heading"
    for parameter in COMMANDS[path].params:
        options = [option for option in parameter.opts if option.startswith("--") and option != "--help"]
        for option in options:
            assert any(re.search(rf"`[^`]*{re.escape(option)}\b", text) for text in texts), f"{path} {option}"


@pytest.mark.parametrize("option", sorted(option for parameter in PROGRAM.params for option in parameter.opts))
def test_the_programs_own_options_are_documented(option: str) -> None:
    assert any(f"`t2 {option}`" in section.text for section in sections())


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_setting_is_in_a_table_with_its_default(name: str) -> None:
    row = table_rows().get(name)
    assert row is not None, f"no table of the documentation has a row for {name}"
    assert SETTINGS[name].default in row


def test_no_setting_is_documented_that_does_not_exist() -> None:
    named = {name for page in PAGES for name in re.findall(r"\bT2_[A-Z][A-Z0-9_]*[A-Z]\b", page.read_text())}
    tests = {name for file in REPOSITORY.glob("tests/**/*.py") for name in re.findall(r"T2_TEST_\w+", file.read_text())}
    assert named <= SETTINGS.keys() | {PREFIX + name.upper() for name in ServerSettings.model_fields} | tests


@pytest.mark.parametrize("name", sorted(ServerSettings.model_fields))
def test_every_setting_of_the_server_is_in_a_table_with_its_default(name: str) -> None:
    field = ServerSettings.model_fields[name]
    row = table_rows(of="registry*.md").get(name)
    assert row is not None, f"no table of the documentation has a row for {name}"
    assert field.description is not None
    assert field.description in row
    if field.default_factory is None:
        default = field.default
        empty = default is None or default == ()
        shown = str(default).lower() if isinstance(default, bool) else str(default)
        assert ("none" if empty else f"`{shown}`") in row.split("|")[3], row


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.id)
def test_every_operation_of_the_api_is_in_a_table_with_its_scope(operation: Operation) -> None:
    if operation.listed:
        row = table_rows()[f"{operation.method} {operation.path}"]
        assert row.split("|")[2].strip() == operation.scope


@pytest.mark.parametrize("status", sorted(TITLES))
def test_every_error_of_the_api_is_in_a_table(status: int) -> None:
    code, _ = TITLES[status]
    assert f"| {status} | `{code}` |" in (REPOSITORY / "docs" / "registry-api.md").read_text()


def fields(model: type[BaseModel]) -> Iterator[str]:
    """The fields of a model and of the models inside it."""
    for name, field in model.model_fields.items():
        yield name
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from fields(inner)


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("Expert", Manifest),
        ("Reward curve", CurvePoint),
        ("Adaptation record", AdaptationRecord),
        ("Run", TaskRun),
    ],
)
def test_every_field_of_a_format_is_described_and_no_other(heading: str, model: type[BaseModel]) -> None:
    page = (REPOSITORY / "docs" / "formats.md").read_text()
    text = re.split(r"^## ", page.partition(f"\n## {heading}\n")[2], flags=re.MULTILINE)[0]
    known = set(fields(model))
    rows = [line.split("|")[1:] for line in text.splitlines() if line.startswith("| `")]
    missing = known - set(re.findall(r"`(\w+)`", "".join("".join(row) for row in rows)))
    if model is AdaptationRecord:
        # Its base is described with the manifest.
        missing -= set(BaseModelRef.model_fields)
    if model is TaskRun:
        # Its record has a section of its own.
        missing -= set(fields(AdaptationRecord))
    assert not missing
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row[0])} <= known


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ +(.*)$", without_code_blocks(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links() -> list[tuple[Path, str]]:
    pattern = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
    found = [
        (page, first or second)
        for page in PAGES
        for first, second in pattern.findall(without_code_blocks(page.read_text()))
    ]
    return [(page, target) for page, target in found if not re.match(r"[a-z]+:", target)]


@pytest.mark.parametrize(
    ("page", "target"), links(), ids=lambda value: value.name if isinstance(value, Path) else str(value)
)
def test_relative_links_resolve(page: Path, target: str) -> None:
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    assert file.exists(), f"{page.name} links to {target}"
    assert file.is_relative_to(REPOSITORY)
    if anchor and file.suffix == ".md":
        assert anchor in anchors(file), f"{page.name} links to {target}"


@pytest.mark.parametrize("name", sorted(MODEL_ARGS))
def test_every_model_arg_is_in_a_table_with_its_values_and_default(name: str) -> None:
    row, spec = table_rows()[name], MODEL_ARGS[name]
    assert all(f"`{value}`" in row for value in spec.values), row
    default = (
        str(spec.default).lower()
        if isinstance(spec.default, bool)
        else ""
        if spec.default is None
        else str(spec.default)
    )
    assert default in row.split("|")[3], row


@pytest.mark.parametrize("name", sorted(FROM_PRETRAINED))
def test_every_argument_passed_on_to_from_pretrained_is_in_a_table(name: str) -> None:
    assert name in table_rows()
