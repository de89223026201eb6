"""A model that sees: experts of its text model act on its language half, and a small task with pictures is scored."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.hf_vlms import HFMultimodalLM
from PIL import Image

from t2.adapters.engine.transformers import TransformersEngine
from t2.core.digests import doc_hash
from t2.core.errors import ArgumentError, DependencyError, TaskError
from t2.harness.model import T2LM
from t2.harness.tasks import TaskDocs, load_task
from tests.harness import tiny, vision

SEARCH = {"adapt": "cem", "population": 3, "generations": 1, "shots": 6}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text model, and one that sees with its weights."""
    return vision.save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """lm-eval collects garbage after every batch, which takes long beside all that the tests have imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def text_engine(folders: tuple[Path, Path]) -> TransformersEngine:
    return tiny.engine_of(folders[0])


@pytest.fixture
def trained(text_engine: TransformersEngine, tmp_path: Path) -> str:
    """Experts of the text model in the user's folder."""
    for seed, (name, domain) in enumerate([("alpha", "math"), ("beta", "colours")]):
        tiny.save_expert(tmp_path / "experts" / f"{name}.safetensors", text_engine, seed, domain=domain)
    return "alpha+beta"


def vqa() -> ConfigurableTask:
    return load_task("tiny_vqa", include_path=Path(__file__).parent / "vqa")


def make(folders: tuple[Path, Path], **args: Any) -> T2LM:
    return T2LM.create_from_arg_obj(
        {"pretrained": str(folders[1]), "engine": "hf-multimodal", **args}, {"device": "cpu", "batch_size": 3}
    )


def answers(results: dict[str, Any]) -> list[Any]:
    return [(s["doc_id"], s["resps"], s["filtered_resps"], s["letter"]) for s in results["samples"]["tiny_vqa"]]


def test_only_the_language_half_is_adapted(
    folders: tuple[Path, Path], text_engine: TransformersEngine, trained: str
) -> None:
    lm = make(folders, adapt="expert", experts="alpha")
    assert lm.base.fingerprint == text_engine.base.fingerprint
    assert lm._runtime is not None
    engine = lm._runtime.engine
    assert isinstance(engine, TransformersEngine)
    assert engine.ranks() == text_engine.ranks()
    storage = {name: parameter.data_ptr() for name, parameter in engine.model.named_parameters()}
    with engine.applied(lm._runtime.experts[0].z):
        moved = {n for n, parameter in engine.model.named_parameters() if parameter.data_ptr() != storage[n]}
    assert moved == {f"model.language_model.{name.removeprefix('model.')}" for name in engine.ranks()}


def test_none_equals_lm_evals_own_model(folders: tuple[Path, Path]) -> None:
    hf = HFMultimodalLM(pretrained=str(folders[1]), device="cpu", batch_size=3)
    theirs = tiny.evaluate(hf, [vqa()])
    ours = tiny.evaluate(make(folders), [vqa()])
    assert answers(ours) == answers(theirs)
    assert ours["results"] == theirs["results"]
    assert len({str(resps) for _, resps, _, _ in answers(ours)}) > 1, "the model looks at its pictures"


@pytest.mark.parametrize(
    "settings",
    [{"adapt": "expert", "experts": "beta"}, {"adapt": "mix"}, {"adapt": "prompt"}, SEARCH],
    ids=lambda settings: settings["adapt"],
)
def test_adapted_answers_are_those_of_lm_evals_own_model_over_the_adapted_weights(
    settings: dict[str, Any], folders: tuple[Path, Path], trained: str
) -> None:
    lm = make(folders, **settings)
    ours = tiny.evaluate(lm, [vqa()])
    (record,) = lm.records
    assert lm._runtime is not None
    parts = {expert.name: expert.z for expert in lm._runtime.experts}
    names = next(iter(parts.values()))
    parts["(base)"] = {name: torch.ones_like(vector) for name, vector in names.items()}
    for used in record.mixtures:
        z = {n: sum(a * parts[e][n] for e, a in used.alpha.items()) for n in names} if used.alpha else None
        with lm._runtime.engine.applied(z):  # type: ignore[arg-type]
            again = answers(tiny.evaluate(lm.inner, [vqa()]))
        if len(record.mixtures) == 1:
            assert answers(ours) == again
    assert sum(used.requests for used in record.mixtures) == 8


def test_a_search_sees_the_pictures_and_breaks_ties_by_them(folders: tuple[Path, Path], trained: str) -> None:
    lm = make(folders, **SEARCH)
    tiny.evaluate(lm, [vqa()])
    (record,) = lm.records
    assert record.held_out is not None
    assert record.held_out.docs == len(record.adaptation_docs) == 6
    pool = {doc_hash(doc) for doc in vqa().validation_docs()}
    assert set(record.adaptation_docs) <= pool
    assert sum(generation.evaluations for generation in record.history) > 2
    again = make(folders, **SEARCH, adapt_seed=0)
    tiny.evaluate(again, [vqa()])
    assert again.records[0].key == record.key
    assert again.records[0].mixtures == record.mixtures


def test_likelihoods_of_answers_are_those_of_the_whole_sequence(folders: tuple[Path, Path], trained: str) -> None:
    lm = make(folders, adapt="expert", experts="alpha")
    assert lm._runtime is not None
    docs, engine = TaskDocs(vqa(), lm.inner), lm._runtime.engine
    assert isinstance(engine, TransformersEngine)
    rows = list(vqa().test_docs())[:2]
    requests = [instances[0] for instances in docs.instances(rows)]
    z = lm._runtime.experts[0].z
    found = docs.likelihoods(engine, [(request, "red") for request in requests] * 2, [None, z], [0, 0, 1, 1])
    greedy = docs.answer(engine, [[request] for request in requests], [z])
    best = docs.likelihoods(engine, [(r, str(a[0])) for r, a in zip(requests, greedy, strict=True)], [z], [0, 0])
    assert found[0] != found[2]
    assert [tokens for _, tokens in found] == [3] * 4
    processor: Any = lm.inner.processor
    for entry, request in enumerate(requests):
        inputs = processor(text=request.args[0] + "red", images=request.args[2]["visual"], return_tensors="pt")
        with torch.no_grad():
            logits = engine.model(**inputs).logits[0, -4:-1].log_softmax(-1)
        expected = logits.gather(1, inputs["input_ids"][0, -3:].unsqueeze(1)).sum()
        assert found[entry][0] == pytest.approx(float(expected), abs=1e-3)
        per_token = best[entry][0] / max(1, best[entry][1])
        assert per_token > found[2 + entry][0] / 3


def test_documents_with_pictures_are_told_apart_by_their_pixels() -> None:
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    assert doc_hash({"q": 1, "image": red}) == doc_hash({"q": 1, "image": red.copy()})
    assert doc_hash({"q": 1, "image": red}) != doc_hash({"q": 1, "image": blue})


def test_text_tasks_still_run(folders: tuple[Path, Path], trained: str) -> None:
    lm = make(folders, **SEARCH)
    results = tiny.evaluate(lm, [tiny.choice_task()], limit=3)
    assert len(results["samples"]["tiny_choice"]) == 3
    assert lm.records[0].held_out is not None


def test_what_cannot_be_done_is_told(folders: tuple[Path, Path], trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = T2LM.create_from_arg_obj({"pretrained": str(folders[0])}, {"device": "cpu"})
    with pytest.raises(TaskError, match="task tiny_vqa needs images or audio; for images give engine=hf-multimodal"):
        TaskDocs(vqa(), text.inner)
    task = vqa()
    task.OUTPUT_TYPE = "multiple_choice"
    with pytest.raises(TaskError, match="task tiny_vqa asks for likelihoods of answers to images"):
        TaskDocs(task, make(folders).inner)
    choices = tiny.choice_task(doc_to_image=["q"])
    with pytest.raises(TaskError, match="lm-eval's hf-multimodal model cannot answer loglikelihood requests"):
        tiny.evaluate(make(folders), [choices])
    with pytest.raises(ArgumentError, match="engine=hf-multimodal needs pretrained="):
        T2LM.create_from_arg_obj({"engine": "hf-multimodal"})
    with pytest.raises(ArgumentError, match="max_images is for engine=hf-multimodal, not for engine=hf; leave it out"):
        T2LM.create_from_arg_obj({"pretrained": str(folders[0]), "max_images": 1})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r'needs Pillow: pip install "t2-eval\[multimodal\]"'):
        make(folders)
