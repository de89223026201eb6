"""``t2 train --push``: from a task to a version in the registry, and what happens when either is not there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from t2.core.curve import read_curve
from t2.core.errors import ForbiddenError, RegistryError, UnauthorizedError
from t2.core.expertfile import read_expert
from t2.core.references import ExpertName, parse_reference
from t2.harness import publishing
from t2.registry.open import open_embedded
from tests.cli.here import Here
from tests.harness import tiny
from tests.registry.serving import process
from tests.training import planted

LETTERS = ExpertName("team", "letters")


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(capsys)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """``t2 train`` of a tiny model on a task that it learns in a few steps."""
    folder = tmp_path_factory.mktemp("planted")
    data = {"train": planted.rows(48), "test": planted.rows(8, start=1000)}
    for split, rows in data.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "planted_letters",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(folder / f"{split}.jsonl") for split in data},
            "cache_dir": str(folder / "cache"),
        },
        "training_split": "train",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{q}}\nA:",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}],
        "metadata": {"version": 1.0, "t2": {"domain": "letters"}},
    }
    (folder / "tasks").mkdir()
    (folder / "tasks" / "planted.yaml").write_text(yaml.safe_dump(task))
    model = tiny.save_model(folder / "tiny")
    return [
        *("train", "--task", "planted_letters", "--name", "letters", "--include-path", str(folder / "tasks")),
        *("--model-args", f"pretrained={model},device=cpu,dtype=float32", "--targets", "mlp"),
        *("--steps", "4", "--batch", "8", "--learning-rate", "2e-2", "--clip", "1.0", "--validate-every", "2"),
    ]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of experts and a registry."""
    monkeypatch.setenv("T2_REGISTRY_URL", str(tmp_path / "registry"))
    monkeypatch.setenv("T2_EXPERTS_DIR", str(tmp_path / "experts"))
    return tmp_path


def test_a_trained_expert_is_in_the_registry_with_its_curve_scores_and_base(
    command: list[str], home: Path, here: Here
) -> None:
    told = here.fields(*command, "--push", "team/letters", "--push-alias", "production")
    assert (told["published"], told["aliases"]) == ("team/letters@1", "production")
    folder = home / "experts" / "letters"
    with open_embedded(home / "registry") as client:
        version = client.resolve(parse_reference("team/letters@production"))
        assert version.digest == read_expert(folder / "expert.safetensors").digest == told["digest"]
        assert f"{version.metrics['validation.score']:.4f}" == told["best score"]
        assert f"{version.metrics['validation.base_score']:.4f}" == told["base score"]
        assert set(version.metrics) >= {"validation.reward", "validation.base_reward"}
        points = client.curve(LETTERS, 1).points
        assert len(points) == len(read_curve(folder / "curve.jsonl")) == 7
        # All of the base's matrices, of which this expert scales some.
        targets = client.get_base_model(version.base_fingerprint).targets
        assert targets is not None
        assert set(version.manifest["targets"]) < set(targets)
    before = (folder / "expert.safetensors").stat().st_mtime_ns
    again = here.fields(*command, "--push", "team/letters")
    assert again["published"] == "team/letters@1"
    assert (folder / "expert.safetensors").stat().st_mtime_ns == before
    assert here.json("expert", "show", "team/letters", "--versions")["versions"][0]["version"] == 1


def test_name_kind_and_options_are_checked_before_the_training(command: list[str], home: Path, here: Here) -> None:
    classifier = home / "labels.safetensors"
    engine = tiny.engine_of(tiny.save_model(home / "model"))
    tiny.save_expert(classifier, engine, 1, kind="classifier")
    here("expert", "push", classifier, "team/labels")
    here("expert", "push", tiny.save_expert(home / "old.safetensors", engine, 2), "team/old")
    here("expert", "delete", "team/old")
    for options, line in (
        (["--push", "Team/Letters"], "is not an expert's name"),
        (["--push", "team/labels"], "team/labels is of kind classifier, and this of kind expert"),
        (["--push", "team/old"], "is deleted; it can be restored"),
        (["--push", "team/letters", "--push-alias", "3"], "is not an alias"),
        (["--push-alias", "production"], "--push-alias is for --push"),
        (["--registry", str(home)], "--registry is for --push"),
        (["--push", "team/letters", "--registry", "http://127.0.0.1:9"], "127.0.0.1:9"),
    ):
        assert line in here.refused(*command, *options)
    assert not (home / "experts").exists()


@pytest.fixture
def closed(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str, str]]:
    """The URL of a server that wants tokens, one that may read, and one that may write."""
    with open_embedded(home / "served") as client:
        reader, writer = client.create_token("reader", ["read"]), client.create_token("writer", ["read", "write"])
    with process(T2_REGISTRY_URL=str(home / "served")) as (_, url):
        monkeypatch.setenv("T2_REGISTRY_URL", url)
        yield url, reader.secret, writer.secret


def test_the_token_is_checked_before_the_training(
    closed: tuple[str, str, str], command: list[str], home: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, reader, writer = closed
    with pytest.raises(UnauthorizedError, match="wants an access token; set T2_REGISTRY_TOKEN"):
        here(*command, "--push", "team/letters")
    monkeypatch.setenv("T2_REGISTRY_TOKEN", reader)
    with pytest.raises(ForbiddenError):
        here(*command, "--push", "team/letters")
    assert not (home / "experts").exists()
    monkeypatch.setenv("T2_REGISTRY_TOKEN", writer)
    assert here.fields(*command, "--push", "team/letters", "--registry", url)["published"] == "team/letters@1"
    assert here.fields("expert", "show", "team/letters")["published"].endswith("by api:writer")


def test_a_registry_that_goes_away_during_the_training_costs_nothing(
    command: list[str], home: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    with process(T2_REGISTRY_URL=str(home / "served")) as (server, url), monkeypatch.context() as patched:
        checked = publishing.check_push

        def then_gone(*arguments: object) -> None:
            checked(*arguments)  # type: ignore[arg-type]  # as they come
            server.kill()
            server.wait()

        patched.setattr("t2.cli.train.check_push", then_gone)
        with pytest.raises(RegistryError) as caught:
            here(*command, "--push", "team/letters", "--registry", url)
    folder = home / "experts" / "letters"
    line = str(caught.value)
    assert line.endswith(f"publish it later by: t2 expert push {folder} team/letters")
    assert "\n" not in line
    assert (folder / "curve.jsonl").exists()
    assert here.fields("expert", "push", folder, "team/letters")["published"] == "team/letters@1"
    assert here.fields("expert", "show", "team/letters")["curve"] == "7 points"
