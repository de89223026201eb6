"""The experts that t2 ships: of the demo model, on training documents only, and as good as their papers say."""

from __future__ import annotations

import json

import pytest
from lm_eval.models.huggingface import HFLM

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import check_expert, load_expert
from t2.core.curve import read_curve
from t2.core.digests import doc_hash
from t2.core.manifest import unpack_hashes
from t2.harness.base import base_id
from t2.harness.catalogue import find_expert
from t2.harness.defaults import default_classifier, default_experts
from t2.harness.domains import LABELS
from t2.harness.overlap import marks_of
from t2.harness.shipped import demo_dir
from t2.harness.tasks import load_task
from t2.training.config import TrainConfig
from t2.training.split import split_docs

TASKS = {"math": "t2_gsm8k_steps", "code": "t2_mbpp_programs", "reasoning": "t2_arc_easy"}
EXPERTS = sorted(TASKS)
ALL = [*EXPERTS, "classifier"]


def test_they_are_small_and_complete() -> None:
    files = [path for path in demo_dir().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_000_000
    assert {path.parent.name for path in files} == set(ALL)
    names = {"expert.safetensors", "curve.jsonl", "config.json", "scores.json"}
    assert {path.relative_to(demo_dir()).as_posix() for path in files} == {f"{e}/{n}" for e in ALL for n in names}


@pytest.mark.parametrize("name", ALL)
def test_manifest_configuration_curve_and_scores_agree(name: str) -> None:
    expert, folder = load_expert(find_expert(f"demo/{name}")), demo_dir() / name
    config, scores = (json.loads((folder / file).read_text()) for file in ("config.json", "scores.json"))
    if name == "classifier":
        assert (expert.manifest.kind, expert.domain, expert.manifest.task) == ("classifier", None, "t2_domains")
        assert expert.manifest.labels == LABELS
    else:
        assert (expert.name, expert.domain, expert.manifest.task) == (name, name, TASKS[name])
    assert expert.manifest.training == config
    points = {point.step: point for point in read_curve(folder / "curve.jsonl") if point.split == "validation"}
    assert (points[0].score, points[0].reward) == (scores["base_score"], scores["base_reward"])
    best = points[scores["best_step"]]
    assert (best.score, best.reward) == (scores["best_score"], scores["best_reward"])
    assert best.score > points[0].score
    assert best.reward > points[0].reward


@pytest.mark.parametrize("name", EXPERTS)
def test_no_scored_document_was_trained_on(name: str) -> None:
    seen = set(unpack_hashes(load_expert(find_expert(f"demo/{name}")).manifest.training_docs))
    assert len(seen) > 150
    for task in (TASKS[name], "t2_arc_challenge"):
        assert not seen & {doc_hash(doc) for doc in load_task(task).test_docs()}


def test_the_hashes_in_a_file_are_those_of_the_documents_that_its_configuration_gives() -> None:
    manifest = load_expert(find_expert("demo/reasoning")).manifest
    config = TrainConfig.model_validate(manifest.training)
    halves = split_docs(load_task(config.task), config.seed, config.train_docs, config.validation_docs)
    assert unpack_hashes(manifest.training_docs) == sorted(halves.marks)


CLASSIFIED = ("t2_gsm8k", "t2_math500", "t2_mbpp", "t2_humaneval", "t2_arc_easy", "t2_arc_challenge")


@pytest.mark.parametrize(
    ("name", "source"), [("math", "t2_gsm8k"), ("code", "t2_mbpp"), *(("classifier", task) for task in CLASSIFIED)]
)
def test_no_scored_document_of_their_source_was_trained_on(name: str, source: str) -> None:
    seen = set(unpack_hashes(load_expert(find_expert(f"demo/{name}")).manifest.training_docs))
    task = load_task(source)
    assert not seen & marks_of(task, task.test_docs())


def test_they_belong_to_the_demo_model_in_every_dtype_and_are_its_default(smollm2: HFLM) -> None:
    # They were trained in bfloat16, the fixture is float32.
    engine = TransformersEngine(smollm2.model, smollm2.tokenizer, base_id(None))
    chosen = default_experts(engine.base)
    assert {expert.domain for expert in chosen} == set(EXPERTS)
    classifier = default_classifier(engine.base)
    assert classifier is not None
    assert classifier.name == "classifier"
    for expert in (*chosen, classifier):
        check_expert(expert, engine.base, engine.ranks())
