"""Every field of the configuration is an option, and documented with its default."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer.main

from t2.cli.main import app
from t2.training.config import TrainConfig
from tests.environments import REPOSITORY

ROWS = {
    match[1]: match[0]
    for match in re.finditer(r"^\| `(\w+)` \|.*$", (REPOSITORY / "docs" / "training.md").read_text(), re.MULTILINE)
}


def options() -> dict[str, Any]:
    program: Any = typer.main.get_command(app)
    return {option: parameter for parameter in program.commands["train"].params for option in parameter.opts}


@pytest.mark.parametrize("field", TrainConfig.model_fields)
def test_every_field_is_an_option_and_in_the_table_with_its_default(field: str) -> None:
    option = f"--{field.replace('_', '-')}"
    assert option in options()
    row = ROWS[field]
    assert f"`{option}`" in row
    default = TrainConfig.model_fields[field].default
    if isinstance(default, (int, float, str)) and not isinstance(default, bool):
        assert f"| {default} |" in row or f"| `{default}` |" in row
        assert str(options()[option].default) == str(default)


def test_the_table_has_no_field_that_does_not_exist() -> None:
    fields = {name for name, row in ROWS.items() if "| `--" in row}
    assert fields == set(TrainConfig.model_fields)


def test_equal_configurations_have_equal_digests() -> None:
    first, second = TrainConfig(task="t", name="n"), TrainConfig(task="t", name="n", kl=0.0)
    assert first.digest() == second.digest() != TrainConfig(task="t", name="n", kl=0.1).digest()
