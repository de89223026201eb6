"""The configurations of the paper's tables are read as ``t2 train --config`` reads them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from t2.training.config import TrainConfig, make_config
from t2.training.config_file import read_config_file
from tests.environments import REPOSITORY

FILES = sorted((REPOSITORY / "examples" / "paper").rglob("*.yaml"))


def read(path: Path) -> TrainConfig:
    file = read_config_file(path)
    return make_config(file.where({}), **file.values)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_configuration_parses_and_is_named_after_its_place(path: Path) -> None:
    config = read(path)
    assert config.name == f"{path.parent.name}-{path.stem}"
    assert path.stem.startswith(config.method)
    assert ("next-token" in path.stem) <= (config.objective == "next-token")
    assert (config.batch, config.clip) == (256, 1e-3)


def test_every_row_of_the_tables_is_there() -> None:
    rows = Counter((path.parent.name, read(path).method) for path in FILES)
    assert rows == {
        ("table1", "svf"): 3,
        ("table1", "lora"): 3,
        ("table4", "svf"): 4,
        ("table4", "lora"): 2,
        ("table7", "ia3"): 3,
        ("table7", "dora"): 3,
        ("table8", "ia3"): 2,
    }
