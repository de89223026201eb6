"""Where held-out prompts come from, and that none of them is scored."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Expert, load_expert
from t2.core.digests import doc_hash
from t2.core.manifest import pack_hashes
from t2.harness import held_out
from t2.harness.held_out import PER_DOMAIN, held_out_prompts
from t2.harness.overlap import marks_of
from t2.harness.tasks import load_task
from tests.harness import tiny

LABELS = ("code", "math", "reasoning", "others")


def expert(tmp_path: Path, engine: TransformersEngine, domain: str, task: str | None) -> Expert:
    return load_expert(tiny.save_expert(tmp_path / f"{domain}.safetensors", engine, 1, domain=domain, task=task))


def test_the_prompts_that_come_with_t2_are_of_every_domain_and_distinct() -> None:
    for label in LABELS:
        texts = held_out._shipped(label)
        assert len(set(texts)) == len(texts) >= PER_DOMAIN
    assert held_out._shipped("cooking") == ()
    found = held_out_prompts([*LABELS, "cooking"], ())
    assert [domain for _, domain in found.prompts] == [label for label in LABELS for _ in range(PER_DOMAIN)]
    assert found.sources == dict.fromkeys(LABELS, "prompts that come with t2")


def test_an_experts_own_task_gives_prompts_in_its_own_form(
    tmp_path: Path, tiny_engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("T2_DATA_DIR", raising=False)
    held_out._pool_prompts.cache_clear()
    experts = [
        expert(tmp_path, tiny_engine, "reasoning", "t2_arc_easy"),
        expert(tmp_path, tiny_engine, "code", "t2_mbpp_programs"),
        expert(tmp_path, tiny_engine, "math", None),
    ]
    found = held_out_prompts(LABELS, experts)
    assert found.sources["reasoning"] == "validation docs of t2_arc_easy"
    assert {found.sources[label] for label in ("code", "math", "others")} == {"prompts that come with t2"}
    task = load_task("t2_arc_easy")
    own = [text for text, domain in found.prompts if domain == "reasoning"]
    assert set(own) <= {task.doc_to_text(doc) for doc in task.validation_docs()}
    assert not set(own) & {task.doc_to_text(doc) for doc in task.test_docs()}
    assert len(own) == PER_DOMAIN
    assert held_out_prompts(LABELS, experts) == found


def test_forbidden_documents_and_texts_are_left_out(tmp_path: Path, tiny_engine: TransformersEngine) -> None:
    experts = [expert(tmp_path, tiny_engine, "reasoning", "t2_arc_easy")]
    task = load_task("t2_arc_easy")
    first = held_out_prompts(("reasoning", "others"), experts)
    docs = {task.doc_to_text(doc): doc_hash(doc) for doc in task.validation_docs()}
    forbidden = {docs[first.prompts[0][0]], doc_hash(first.prompts[1][0]), doc_hash(first.prompts[-1][0])}
    second = held_out_prompts(("reasoning", "others"), experts, None, forbidden)
    assert not {text for text, _ in second.prompts} & {first.prompts[i][0] for i in (0, 1, -1)}
    assert len(second.prompts) == len(first.prompts)


def test_a_document_that_asks_what_a_scored_one_asks_is_left_out(
    tmp_path: Path, tiny_engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = tiny.questions(30, 100)
    task = tiny.choice_task("tiny_sums", data={"validation": pool, "test": tiny.questions(3)})
    monkeypatch.setattr(held_out, "load_task", lambda name: task)
    held_out._load.cache_clear()
    held_out._pool_prompts.cache_clear()
    experts = [expert(tmp_path, tiny_engine, "math", "tiny_sums")]
    # The same questions under other labels, worded otherwise, scored by another task.
    scored = [{**row, "gold": (row["gold"] + 1) % 4} for row in pool[:15]]
    other = tiny.choice_task("tiny_other", data={"test": scored}, doc_to_text="Solve {{q}}!")
    found = held_out_prompts(("math",), experts, None, marks_of(other, scored))
    assert {text for text, _ in found.prompts} == {task.doc_to_text(doc) for doc in pool[15:]}
    assert len(held_out_prompts(("math",), experts).prompts) == PER_DOMAIN
    held_out._load.cache_clear()
    held_out._pool_prompts.cache_clear()


def test_a_classifier_is_judged_on_documents_that_its_training_did_not_touch(
    tmp_path: Path, tiny_engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = [{"text": f"{label} {i}", "domain": label} for i in range(40) for label in ("sums", "others")]
    data = {"training": docs, "validation": [{"text": "scored", "domain": "sums"}]}
    task = tiny.choice_task(
        "tiny_kinds", data=data, doc_to_text="{{text}}", doc_to_target="domain", doc_to_choice=["sums", "others"]
    )
    monkeypatch.setattr(held_out, "load_task", lambda name: task)
    touched = [doc_hash(doc) for doc in docs if int(doc["text"].split()[1]) < 25]
    path = tmp_path / "names.safetensors"
    tiny.save_expert(
        path,
        tiny_engine,
        1,
        kind="classifier",
        task="tiny_kinds",
        training_docs=pack_hashes(touched),
        labels=("sums", "others"),
    )
    found = held_out_prompts(("sums", "others"), (), load_expert(path))
    assert {text for text, _ in found.prompts} == {
        f"{label} {i}" for i in range(25, 40) for label in ("sums", "others")
    }
    assert all(text.startswith(domain) for text, domain in found.prompts)
    assert set(found.sources.values()) == {"documents of tiny_kinds that it was not trained on"}
