"""Experts out of a registry: the demo experts in it, references, and what takes part when nothing is named."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import load_expert
from t2.core.curve import CurvePoint, append_point, read_curve
from t2.core.errors import ArgumentError, ConflictError, NotFoundError, StorageError, T2Error, UnavailableError
from t2.core.record import AdaptationRecord
from t2.core.references import ExpertName, parse_name, parse_reference
from t2.harness.args import parse_args
from t2.harness.catalogue import shipped_experts
from t2.harness.defaults import default_classifier, default_experts
from t2.harness.experts import prepare_experts, read_experts
from t2.harness.model import T2LM
from t2.harness.publishing import push
from t2.harness.registry import registry
from t2.harness.seeding import seed
from t2.harness.shipped import demo_dir
from t2.harness.summary import format_summary
from t2.registry.client.base import RegistryClient
from t2.registry.open import open_embedded
from t2.registry.schemas import VALIDATION_SCORE, ExpertQuery
from tests.harness import tiny
from tests.registry.serving import process

DEMO = ["demo/classifier", "demo/code", "demo/math", "demo/reasoning"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The registry in use."""
    monkeypatch.setenv("T2_REGISTRY_URL", str(tmp_path / "registry"))
    return tmp_path / "registry"


@pytest.fixture
def client(folder: Path) -> Iterator[RegistryClient]:
    """The registry in use, without the demo experts as yet."""
    with open_embedded(folder) as opened:
        yield opened


class Shelf:
    """Puts random experts of the tiny model into a registry."""

    def __init__(self, client: RegistryClient, engine: TransformersEngine, folder: Path) -> None:
        self.client, self.engine, self.folder = client, engine, folder

    def file(self, seed: int, **manifest: Any) -> Path:
        return tiny.save_expert(self.folder / f"e{seed}.safetensors", self.engine, seed, **manifest)

    def put(
        self, name: str, seed: int, *, score: float | None = None, alias: str | None = None, **manifest: Any
    ) -> str:
        """Publish one, and return its digest."""
        metrics = {} if score is None else {VALIDATION_SCORE: score}
        file = self.file(seed, **{"domain": "math", **manifest})
        return push(self.client, parse_name(name), file, metrics=metrics, alias=alias).digest


@pytest.fixture
def shelf(client: RegistryClient, tiny_engine: TransformersEngine, tmp_path: Path) -> Shelf:
    return Shelf(client, tiny_engine, tmp_path / "files")


def test_the_embedded_registry_holds_the_demo_experts_with_curves_and_scores(folder: Path) -> None:
    with registry() as client:
        found = client.list_experts(ExpertQuery(namespace="demo", sort="name")).items
        assert [expert.name for expert in found] == DEMO
        assert {expert.tags for expert in found} == {("demo",)}
        math = client.resolve(parse_reference("demo/math"))
        assert math.digest == load_expert(demo_dir() / "math" / "expert.safetensors").digest
        assert math.metrics[VALIDATION_SCORE] == pytest.approx(0.8021, abs=1e-4)
        assert math.metrics["validation.base_score"] == 0.765625
        curve = client.curve(ExpertName("demo", "math"), 1)
        key = lambda point: (point.split, point.step)  # noqa: E731
        assert sorted(curve.points, key=key) == sorted(read_curve(demo_dir() / "math" / "curve.jsonl"), key=key)
        written = client.audit(limit=200).items
    with registry() as client:
        assert client.audit(limit=200).items == written


def test_a_demo_expert_of_a_newer_t2_becomes_a_new_version(client: RegistryClient, tmp_path: Path) -> None:
    seed(client)
    newer = tmp_path / "newer" / "expert.safetensors"
    newer.parent.mkdir()
    newer.write_bytes((demo_dir() / "code" / "expert.safetensors").read_bytes())
    seed(client, {"demo/math": newer})
    assert client.resolve(parse_reference("demo/math")).version == 2
    seed(client)  # the older one beside it does not put its own on top
    assert client.resolve(parse_reference("demo/math")).version == 2


def test_a_seeding_that_was_cut_is_completed_and_a_deleted_expert_stays_so(client: RegistryClient) -> None:
    client.publish(ExpertName("demo", "math"), (demo_dir() / "math" / "expert.safetensors").read_bytes())
    seed(client)
    math = client.resolve(parse_reference("demo/math"))
    assert (math.version, VALIDATION_SCORE in math.metrics) == (1, True)
    client.delete(ExpertName("demo", "math"))
    seed(client)
    assert [expert.name for expert in client.list_experts(ExpertQuery(sort="name")).items] == [
        name for name in DEMO if name != "demo/math"
    ]


def test_processes_that_start_at_once_seed_one_registry(folder: Path) -> None:
    code = "from t2.harness.registry import registry\nwith registry() as client: print(client.location)"
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for each in started:
        output, errors = each.communicate(timeout=600)
        assert (each.returncode, output, errors) == (0, f"{folder}\n", "")
    with open_embedded(folder) as client:
        found = client.list_experts(ExpertQuery(sort="name")).items
        assert [(expert.name, expert.versions) for expert in found] == [(name, 1) for name in DEMO]


def test_the_demo_model_gets_its_experts_in_the_order_of_their_names(folder: Path) -> None:
    base = load_expert(demo_dir() / "math" / "expert.safetensors").manifest.base
    found = default_experts(base)
    assert [(expert.name, expert.reference) for expert in found] == [
        ("code", "demo/code@1"),
        ("math", "demo/math@1"),
        ("reasoning", "demo/reasoning@1"),
    ]
    classifier = default_classifier(base)
    assert classifier is not None
    assert (classifier.reference, classifier.manifest.kind) == ("demo/classifier@1", "classifier")


def chosen(engine: TransformersEngine) -> list[tuple[str | None, str | None]]:
    return [(expert.reference, expert.reason) for expert in default_experts(engine.base)]


def test_in_a_domain_goes_first_the_alias_then_the_score_then_the_name(shelf: Shelf) -> None:
    shelf.put("team/first", 1)
    assert chosen(shelf.engine) == [("team/first@1", "the only one for math, no validation score")]
    shelf.put("a/unscored", 2)
    assert chosen(shelf.engine) == [("a/unscored@1", "first by name of 2 for math, no validation score")]
    shelf.put("team/first", 3, score=-5)
    assert chosen(shelf.engine) == [("team/first@2", "best score of 3 for math, validation score -5")]
    shelf.put("team/better", 4, score=0.75)
    shelf.put("team/abetter", 5, score=0.75)
    assert chosen(shelf.engine)[0][0] == "team/abetter@1"
    shelf.put("team/poor", 6, score=0.1, alias="production")
    shelf.put("team/poor", 7, score=0.9)
    assert chosen(shelf.engine) == [("team/poor@1", "alias production of 7 for math, validation score 0.1")]
    shelf.put("team/other", 8, score=0.2, alias="production")
    assert chosen(shelf.engine)[0][0] == "team/other@1"
    shelf.client.delete(ExpertName("team", "other"))
    assert chosen(shelf.engine)[0][0] == "team/poor@1"


def test_only_experts_of_this_base_and_kind_are_chosen_each_domain_by_one(shelf: Shelf) -> None:
    foreign = shelf.engine.base.model_copy(update={"fingerprint": "f" * 64})
    shelf.put("team/foreign", 1, score=1, base=foreign)
    shelf.put("team/labels", 2, score=1, kind="classifier", domain=None)
    shelf.put("team/better-labels", 3, score=2, kind="classifier", domain=None)
    shelf.put("team/mixture", 4, score=1, kind="mixture")
    shelf.put("team/math", 5)
    shelf.put("team/code", 6, domain="code")
    shelf.put("team/nowhere", 7, domain=None)
    assert [expert.reference for expert in default_experts(shelf.engine.base)] == [
        "team/math@1",
        "team/code@1",
        "team/nowhere@1",
    ]
    classifier = default_classifier(shelf.engine.base)
    assert classifier is not None
    assert classifier.reference == "team/better-labels@1"


def trained(folder: Path, engine: TransformersEngine, seed: int, scores: list[float]) -> Path:
    """An expert in a folder of its own, with a curve."""
    file = tiny.save_expert(folder / "expert.safetensors", engine, seed, domain="math")
    for step, score in enumerate(scores):
        append_point(
            folder / "curve.jsonl", CurvePoint(step=step, split="validation", reward=score, score=score, seconds=step)
        )
    return file


def test_what_was_never_pushed_stands_beside_the_registry_with_the_score_of_its_curve(
    shelf: Shelf, tmp_path: Path
) -> None:
    own = trained(tmp_path / "experts" / "science", shelf.engine, 20, [0.25, 0.5, 0.375])
    shelf.put("team/math", 1, score=0.4)
    (found,) = default_experts(shelf.engine.base)
    assert (found.digest, found.reference) == (load_expert(own).digest, None)
    assert found.reason == "best score of 2 for math, validation score 0.5"
    shelf.put("team/math", 2, score=0.6)
    assert chosen(shelf.engine)[0][0] == "team/math@2"
    push(shelf.client, parse_name("team/science"), own, alias="production")
    assert chosen(shelf.engine)[0][0] == "team/science@1"
    assert shelf.client.resolve(parse_reference("team/science")).metrics[VALIDATION_SCORE] == 0.5


def test_every_form_of_a_reference_finds_its_version(shelf: Shelf) -> None:
    old, new = shelf.put("team/math", 1), shelf.put("team/math", 2)
    shelf.put("alone", 3)
    shelf.client.set_alias(ExpertName("team", "math"), "staging", 1)
    wanted = {
        "team/math": (new, "team/math@2"),
        "team/math@1": (old, "team/math@1"),
        "team/math@staging": (old, "team/math@1"),
        f"team/math@sha256:{old}": (old, f"team/math@sha256:{old}"),
        f"@sha256:{new}": (new, f"@sha256:{new}"),
    }
    for name, (digest, reference) in wanted.items():
        (found,) = read_experts([name])
        assert (found.digest, found.reference) == (digest, reference)
    shelf.client.set_alias(ExpertName("team", "math"), "production", 1)
    assert read_experts(["team/math"])[0].digest == old
    assert read_experts(["alone"])[0].reference == "default/alone@1"
    with pytest.raises(ArgumentError, match="same file as another"):
        read_experts(["team/math", "team/math@staging"])


@pytest.mark.parametrize(
    ("name", "error", "line"),
    [
        ("team/mth", NotFoundError, "nor in the registry .*; did you mean 'team/math'?"),
        ("alon", NotFoundError, "did you mean 'alone'?"),
        ("team/mth@3", NotFoundError, "there is no expert team/mth; did you mean 'team/math'?"),
        ("team/math@stagin", NotFoundError, "has no alias stagin; did you mean 'staging'?"),
        ("team/math@9", NotFoundError, "there is no version 9 of team/math"),
        (f"@sha256:{'0' * 64}", NotFoundError, "there is no version @sha256:000"),
        ("team/math@", ArgumentError, "is not a reference to an expert"),
        ("Team/Math", NotFoundError, "Team/Math is neither an expert in"),
    ],
)
def test_a_reference_to_nothing_is_told_with_the_nearest(
    name: str, error: type[T2Error], line: str, shelf: Shelf
) -> None:
    shelf.put("team/math", 1, alias="staging")
    shelf.put("alone", 2)
    with pytest.raises(error, match=line.replace("?", r"\?").replace("'", "'")) as caught:
        read_experts([name])
    assert "\n" not in str(caught.value)


def test_a_path_goes_before_a_name_of_the_registry_and_a_folder_without_experts_does_not(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = shelf.put("team/math", 1)
    monkeypatch.chdir(tmp_path)
    Path("team/math").mkdir(parents=True)
    assert read_experts(["team/math"])[0].digest == digest
    tiny.save_expert(Path("team/math/expert.safetensors"), shelf.engine, 9)
    assert read_experts(["team/math"])[0].reference is None
    assert read_experts(["team/math@1"])[0].digest == digest


def test_registry_names_another_one(shelf: Shelf, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with open_embedded(other) as client:
        theirs = Shelf(client, shelf.engine, tmp_path / "theirs").put("team/math", 5)
    shelf.put("team/math", 1)
    settings = parse_args({"adapt": "cem", "registry": str(other)})
    assert settings.registry == str(other)
    assert "registry" not in settings.bearing()
    assert read_experts(["team/math"], "cem", settings.registry)[0].digest == theirs
    (found,) = prepare_experts(settings, None, shelf.engine.base, shelf.engine.ranks())
    assert found.digest == theirs


@pytest.fixture
def unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder where nothing can be made; nothing is configured."""
    blocked = tmp_path / "data"
    blocked.write_text("a file where the folder would be")
    monkeypatch.delenv("T2_REGISTRY_URL")
    monkeypatch.setenv("XDG_DATA_HOME", str(blocked))
    return blocked


def test_a_data_folder_that_cannot_be_written_stops_only_what_needs_the_registry(
    unwritable: Path, experts: str, tiny_engine: TransformersEngine, caplog: pytest.LogCaptureFixture
) -> None:
    assert [expert.name for expert in read_experts(["alpha", "demo/math"])] == ["alpha", "math"]
    assert read_experts([f"@sha256:{load_expert(shipped_experts()['demo/code']).digest}"])[0].name == "code"
    with caplog.at_level(logging.WARNING):
        assert [expert.name for expert in default_experts(tiny_engine.base)] == ["alpha", "beta", "gamma"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(unwritable) in line
    assert "going on with the experts in" in line
    base = load_expert(demo_dir() / "math" / "expert.safetensors").manifest.base
    assert [expert.name for expert in default_experts(base)] == ["code", "math", "reasoning"]
    with pytest.raises(StorageError, match="cannot create the folder"):
        read_experts(["team/math@1"])
    with pytest.raises(NotFoundError, match="which did not answer"):
        read_experts(["alhpa"])


def test_a_registry_that_was_named_and_cannot_be_opened_ends_the_run(
    unwritable: Path, experts: str, tiny_engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match="cannot create the folder"):
        default_experts(tiny_engine.base, str(unwritable / "registry"))
    monkeypatch.setenv("T2_REGISTRY_URL", str(unwritable / "registry"))
    with pytest.raises(StorageError, match="cannot create the folder"):
        default_experts(tiny_engine.base)


def run(folder: Path, **args: Any) -> dict[str, Any]:
    lm = T2LM(pretrained=str(folder), device="cpu", dtype="float32", **args)
    results = tiny.evaluate(lm, [tiny.choice_task()], limit=4)
    return {"samples": tiny.answers(results, "tiny_choice"), **results["config"]["t2"]}


def test_a_run_pinned_by_digest_stays_as_it_is_when_experts_are_added(shelf: Shelf, tiny_folder: Path) -> None:
    digest = shelf.put("team/math", 1, score=0.5)
    pinned = f"team/math@sha256:{digest}"
    before = run(tiny_folder, adapt="expert", experts=pinned)
    by_default = run(tiny_folder, adapt="mix")
    shelf.put("team/math", 2, score=0.9, alias="production")
    after = run(tiny_folder, adapt="expert", experts=pinned)
    assert after["samples"] == before["samples"]
    assert after["digest"] == before["digest"]
    (ref,) = after["records"][0]["experts"]
    assert (ref["reference"], ref["digest"], ref["reason"]) == (pinned, digest, None)
    assert run(tiny_folder, adapt="mix")["samples"] != by_default["samples"]


def test_with_the_server_down_a_pinned_run_repeats_and_a_default_one_stops(
    tmp_path: Path,
    tiny_engine: TransformersEngine,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with process(T2_REGISTRY_URL=str(tmp_path / "served")) as (_, url):
        monkeypatch.setenv("T2_REGISTRY_URL", url)
        with registry() as client:
            shelf = Shelf(client, tiny_engine, tmp_path / "files")
            digest = shelf.put("team/math", 1, score=0.5, alias="production")
            shelf.put("team/math", 2, score=0.9)
            (found,) = default_experts(tiny_engine.base)
            assert (found.digest, found.reference) == (digest, "team/math@1")
        pinned = run(tiny_folder, adapt="expert", experts=f"@sha256:{digest}")
        assert read_experts(["team/math@2"])[0].reference == "team/math@2"
        assert read_experts(["team/math"])[0].reference == "team/math@1"
        # A server without experts for a base leaves it to those that come with t2.
        base = load_expert(demo_dir() / "math" / "expert.safetensors").manifest.base
        assert [expert.name for expert in default_experts(base)] == ["code", "math", "reasoning"]
    again = run(tiny_folder, adapt="expert", experts=f"@sha256:{digest}")
    assert (again["samples"], again["digest"]) == (pinned["samples"], pinned["digest"])
    assert read_experts(["team/math@2"])[0].reference == "team/math@2"
    with caplog.at_level(logging.WARNING):
        assert read_experts(["team/math"])[0].digest == digest
    assert "it may have moved since" in caplog.text
    with pytest.raises(UnavailableError):
        default_experts(tiny_engine.base)


def test_the_record_says_what_was_chosen_and_why_but_its_digest_does_not(shelf: Shelf, tiny_folder: Path) -> None:
    digest = shelf.put("team/math", 1, score=0.5)
    by_default = run(tiny_folder, adapt="mix")
    (ref,) = by_default["records"][0]["experts"]
    assert (ref["reference"], ref["digest"]) == ("team/math@1", digest)
    assert ref["reason"] == "the only one for math, validation score 0.5"
    record = AdaptationRecord.model_validate(by_default["records"][0])
    assert f"{ref['name']}: team/math@1 (sha256 {digest[:12]})" in format_summary([record, record], {}).splitlines()
    named = run(tiny_folder, adapt="mix", experts="team/math")
    (again,) = named["records"][0]["experts"]
    assert (again["reference"], again["reason"]) == ("team/math@1", None)
    assert named["digest"] == by_default["digest"]
    assert named["records"][0]["key"] == by_default["records"][0]["key"]


def test_a_push_done_again_adds_nothing_and_a_cut_one_is_completed(shelf: Shelf, tmp_path: Path) -> None:
    file = trained(tmp_path / "runs" / "science", shelf.engine, 3, [0.25, 0.5])
    name = ExpertName("team", "science")
    shelf.client.publish(name, file.read_bytes())
    first = push(shelf.client, name, file, tags=["paper"], metrics={"acc": 0.75}, alias="production")
    assert (first.version, first.created, first.aliases) == (1, False, ("production",))
    assert first.metrics == {VALIDATION_SCORE: 0.5, "acc": 0.75}
    (file.parent / "curve.jsonl").unlink()
    trained(file.parent, shelf.engine, 3, [0.25, 0.5])
    assert push(shelf.client, name, file) == first.model_copy(update={"metrics": first.metrics})
    assert shelf.client.curve(name, 1).total == 2
    with pytest.raises(ConflictError, match="of kind expert"):
        push(shelf.client, name, shelf.file(4, kind="classifier"))
