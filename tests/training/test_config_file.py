"""Configurations from YAML files, with the command line before them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from t2.cli.main import app
from t2.core.errors import ArgumentError, T2Error
from t2.training.config import TrainConfig, make_config
from t2.training.config_file import read_config_file, to_yaml

TEXT = """\
# an expert
task: t2_arc_easy
name: science
kl: [0, 0.1]
learning_rate: 5e-3
model_args: {dtype: bfloat16}
"""


def printed(*arguments: str) -> TrainConfig:
    result = CliRunner().invoke(app, ["train", "--print-config", *arguments], catch_exceptions=False)
    (Path("printed.yaml")).write_text(result.stdout)
    return make_config(**read_config_file(Path("printed.yaml")).values)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.yaml").write_text(TEXT)


def test_a_file_gives_what_the_same_options_give() -> None:
    options = ["--task", "t2_arc_easy", "--name", "science", "--kl", "0,0.1", "--learning-rate", "0.005"]
    config = printed("--config", "file.yaml")
    assert config == printed(*options, "--model-args", "dtype=bfloat16")
    assert (config.kls, config.learning_rate, config.model_args) == ((0.0, 0.1), 5e-3, {"dtype": "bfloat16"})


def test_the_command_line_goes_before_the_file_even_with_a_default() -> None:
    config = printed("--config", "file.yaml", "--name", "other", "--learning-rate", "0.002", "--kl", "0.0")
    assert (config.task, config.name, config.learning_rate, config.kl) == ("t2_arc_easy", "other", 2e-3, 0.0)


def test_a_printed_configuration_is_read_as_it_was() -> None:
    config = TrainConfig(task="t", name="n", kl=(0.0, 0.3), gen_kwargs={"max_gen_toks": 8, "until": ["\n"]})
    Path("again.yaml").write_text(to_yaml(config))
    assert make_config(**read_config_file(Path("again.yaml")).values) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "task: t\nname: n\nlerning_rate: 1\n",
            "bad.yaml, line 3: lerning_rate is not a training option; did you mean",
        ),
        ("task: t\nname: n\nkl: -1\n", "bad.yaml, line 3: kl=-1"),
        ("task: t\nname: n\nseed: 1\nseed: 2\n", "bad.yaml, line 4: seed stands on line 3 already"),
        ("task: t\nname: [\n", "bad.yaml, line 3 is not YAML"),
        ("- task\n", "bad.yaml is not a mapping"),
        ("task: t\nname: n\nseed: 2026-13-01\n", "bad.yaml, line 3: seed has a value that YAML cannot read"),
        ("task: t\nname: n\nmodel_args: " + "[" * 5000, "bad.yaml is nested too deeply"),
        ("task: t\nname: n\nmax_mult: 2\n", "max_mult has no effect with parametrisation=direct"),
        ("name: n\n", "training needs a task"),
        ("task: !!python/object/apply:os.getcwd []\nname: n\n", "bad.yaml, line 1 is not YAML"),
    ],
)
def test_a_mistake_is_one_line_with_file_and_key(text: str, message: str) -> None:
    Path("bad.yaml").write_text(text)
    with pytest.raises(T2Error) as caught:
        CliRunner().invoke(app, ["train", "--config", "bad.yaml", "--print-config"], catch_exceptions=False)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_in_an_option_does_not_blame_the_file() -> None:
    with pytest.raises(ArgumentError, match=r"^kl=-1: "):
        CliRunner().invoke(app, ["train", "--config", "file.yaml", "--kl", "-1"], catch_exceptions=False)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ArgumentError, match=r"cannot read the configuration absent\.yaml"):
        read_config_file(Path("absent.yaml"))
