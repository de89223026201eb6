from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.model import LM, CachingLM

from t2.adapters.engine.transformers import TransformersEngine
from t2.core.digests import doc_hash
from t2.core.errors import (
    ArgumentError,
    ExpertError,
    ExpertMismatchError,
    ModelError,
    NotFoundError,
    StorageError,
    T2Error,
    TaskError,
)
from t2.core.expertfile import read_expert, write_expert
from t2.core.manifest import pack_hashes
from t2.core.record import AdaptationRecord, Overlap
from t2.harness.adaptation import TaskAdaptation
from t2.harness.model import T2LM
from t2.harness.overlap import marks_of
from t2.harness.pool import find_pool
from t2.harness.summary import format_summary
from t2.harness.tasks import PromptForm
from tests.harness import tiny

SEARCH = {"adapt": "cem", "population": 5, "generations": 2, "shots": 6}
STRATEGIES: list[dict[str, Any]] = [
    {"adapt": "none"},
    {"adapt": "expert", "experts": "alpha"},
    {"adapt": "mix"},
    {"adapt": "best", "shots": 6},
    {"adapt": "prompt"},
    SEARCH,
    {**SEARCH, "adapt": "auto"},
]


def make(folder: Path, **args: Any) -> T2LM:
    return T2LM.create_from_arg_obj({"pretrained": str(folder), **args}, {"device": "cpu", "batch_size": 3})


def three(**config: Any) -> list[Any]:
    return [task(**config) for task in (tiny.choice_task, tiny.text_task, tiny.rolling_task)]


NAMES = ("tiny_choice", "tiny_text", "tiny_rolling")


def test_every_public_name_of_lm_is_overridden() -> None:
    public = [name for name in vars(LM) if not name.startswith("_")]
    assert [name for name in public if name not in vars(T2LM)] == []
    inherited = {name for name, _ in inspect.getmembers(LM) if not name.startswith("_")}
    assert inherited - set(vars(T2LM)) == set()


def test_its_properties_are_those_of_hf(tiny_folder: Path) -> None:
    lm = make(tiny_folder)
    assert lm.tokenizer_name == lm.inner.tokenizer_name
    assert lm.tokenizer_name
    assert lm.chat_template(True) == tiny.CHAT
    message = [{"role": "user", "content": "x"}]
    assert lm.apply_chat_template(message) == "<user>x</>\n<assistant>"
    assert lm.apply_chat_template(message, add_generation_prompt=False).startswith("<user>x")
    assert (lm.rank, lm.world_size, lm.batch_size, lm.max_length) == (0, 1, 3, 512)
    assert (lm.eot_token_id, lm.prefix_token_id, lm.device.type) == (2, 1, "cpu")
    assert lm.gather_object("x") == ["x"]


def test_none_equals_hf_sample_for_sample(tiny_folder: Path) -> None:
    hf = tiny.evaluate("hf", three(), model_args=f"pretrained={tiny_folder},device=cpu", batch_size=3)
    ours = tiny.evaluate(make(tiny_folder, adapt=None), three())
    for name in NAMES:
        assert tiny.answers(ours, name) == tiny.answers(hf, name)
    assert ours["results"] == hf["results"]


@pytest.mark.parametrize("settings", STRATEGIES[1:], ids=lambda s: s["adapt"])
def test_adapted_answers_are_those_of_hf_over_the_adapted_weights(
    settings: dict[str, Any], tiny_folder: Path, experts: str
) -> None:
    lm = make(tiny_folder, **settings)
    ours = tiny.evaluate(lm, three())
    base = tiny.evaluate(make(tiny_folder), three())
    assert any(tiny.answers(ours, name) != tiny.answers(base, name) for name in NAMES)
    assert lm._runtime is not None
    for record in lm.records:
        assert record.strategy == settings["adapt"]
        samples = ours["samples"][record.task]
        assert sum(used.requests for used in record.mixtures) == sum(len(s["arguments"]) for s in samples)
        if len(record.mixtures) == 1:
            z = _mixture(lm, record.mixtures[0].alpha)
            task = next(t for t in three() if t.task_name == record.task)
            with lm._runtime.engine.applied(z):
                again = tiny.evaluate(lm.inner, [task])
            assert tiny.answers(again, record.task) == tiny.answers(ours, record.task)


def _mixture(lm: T2LM, alpha: dict[str, float]) -> dict[str, Any] | None:
    assert lm._runtime is not None
    if not alpha:
        return None
    parts = {expert.name: expert.z for expert in lm._runtime.experts}
    names = next(iter(parts.values()))
    parts["(base)"] = {name: torch.ones_like(vector) for name, vector in names.items()}
    return {n: sum(a * parts[e][n].double() for e, a in alpha.items()).float() for n in names}  # type: ignore[union-attr]


def test_dispatch_answers_each_prompt_with_its_own_mixture(tiny_folder: Path, experts: str) -> None:
    lm = make(tiny_folder, adapt="prompt")
    results = tiny.evaluate(lm, [tiny.choice_task()])
    record = lm.records[0]
    assert len(record.mixtures) > 1
    assert sum(record.dispatch.values()) == 12
    assert {name for name, count in record.dispatch.items() if count} - {"others"} <= {"math", "code", "reasoning"}
    assert lm._runtime is not None
    possible = [tiny.answers(tiny.evaluate(make(tiny_folder), [tiny.choice_task()]), "tiny_choice")]
    for used in record.mixtures:
        if used.alpha:
            with lm._runtime.engine.applied(_mixture(lm, used.alpha)):
                possible.append(tiny.answers(tiny.evaluate(lm.inner, [tiny.choice_task()]), "tiny_choice"))
    for i, sample in enumerate(tiny.answers(results, "tiny_choice")):
        lls = [r[0] for r in sample[4]]
        assert any(lls == pytest.approx([r[0] for r in other[i][4]], abs=1e-3) for other in possible)


def test_a_prompt_longer_than_the_model_is_cut_for_its_dispatch(tiny_folder: Path, experts: str) -> None:
    lm = make(tiny_folder, adapt="prompt", max_length=200)
    assert lm._runtime is not None
    task = tiny.choice_task()
    task.build_all_requests()
    job = TaskAdaptation(task, find_pool(task), PromptForm(), lm._runtime)._job()
    context, label = job.encode_pair("x" * 900 + "yes", " math")
    assert len(context) + len(label) == 201
    assert lm.inner.tok_decode(context).endswith("yes")


@pytest.mark.parametrize("data", [None, {"test": tiny.questions(50)}], ids=["own pool", "carved pool"])
def test_the_scored_docs_are_the_same_under_every_strategy(
    data: Mapping[str, tiny.Rows] | None, tiny_folder: Path, experts: str
) -> None:
    scored = []
    for settings in STRATEGIES:
        results = tiny.evaluate(make(tiny_folder, **settings), [tiny.choice_task(data=data)])
        samples = results["samples"]["tiny_choice"]
        scored.append([(sample["doc_hash"], sample["prompt_hash"]) for sample in samples])
        assert results["n-samples"]["tiny_choice"]["effective"] == len(samples) == (30 if data else 12)
    assert all(other == scored[0] for other in scored[1:])


def test_adaptation_docs_are_never_scored(tiny_folder: Path, experts: str) -> None:
    from t2.core.digests import doc_hash

    lm = make(tiny_folder, **SEARCH)
    results = tiny.evaluate(lm, [tiny.choice_task(data={"test": tiny.questions(50)})])
    seen = {doc_hash(sample["doc"]) for sample in results["samples"]["tiny_choice"]}
    assert len(lm.records[0].adaptation_docs) == 6
    assert not seen & set(lm.records[0].adaptation_docs)
    assert lm.records[0].pool == "carved out of the scored docs"


def _records(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tasks: list[Any], **run: Any) -> list[Any]:
    """Records of a search that finds no earlier one."""
    monkeypatch.setenv("T2_CACHE_DIR", str(cache))
    args = run.pop("args", {})
    lm = make(folder, **{**SEARCH, **args})
    tiny.evaluate(lm, tasks, **run)
    return lm.records


def test_the_same_seed_gives_the_same_record(
    tiny_folder: Path, experts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _records(tiny_folder, tmp_path / "1", monkeypatch, three())
    again = _records(tiny_folder, tmp_path / "2", monkeypatch, three())
    other = _records(tiny_folder, tmp_path / "3", monkeypatch, three(), args={"adapt_seed": 1})
    assert [record.digest() for record in first] == [record.digest() for record in again]
    assert [record.mixtures for record in first] == [record.mixtures for record in again]
    assert [record.digest() for record in first] != [record.digest() for record in other]
    assert first[0].adaptation_docs != other[0].adaptation_docs


@pytest.mark.parametrize("pooled", [True, False])
def test_poisoned_test_labels_change_nothing_that_is_searched(
    pooled: bool, tiny_folder: Path, experts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tiny.questions(60)
    clean = {"test": rows, "fewshot": rows} if not pooled else {**tiny.splits(), "fewshot": tiny.splits()["test"]}
    first = _records(tiny_folder, tmp_path / "1", monkeypatch, [tiny.choice_task(data=clean, num_fewshot=2)])
    kept = set(first[0].adaptation_docs)

    from t2.core.digests import doc_hash
    from t2.harness.pool import find_pool

    pool = {doc_hash(doc) for doc in find_pool(tiny.choice_task(data=clean)).docs}
    assert kept <= pool

    def poison(split: tiny.Rows) -> list[dict[str, Any]]:
        return [row if doc_hash(row) in pool else {**row, "gold": (row["gold"] + 1) % 4} for row in split]

    poisoned = {split: poison(docs) for split, docs in clean.items()}
    second = _records(tiny_folder, tmp_path / "2", monkeypatch, [tiny.choice_task(data=poisoned, num_fewshot=2)])
    assert second[0].mixtures[0].alpha == first[0].mixtures[0].alpha
    assert second[0].history == first[0].history
    assert second[0].adaptation_docs == first[0].adaptation_docs


def test_flags_of_the_run_reach_the_adaptation_prompts(
    tiny_folder: Path, experts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[list[Any]] = []

    class Seen(TransformersEngine):
        def generate(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            prompts[-1].extend((self.tokenizer.decode(r.context), r.max_new_tokens) for r in requests)
            return super().generate(requests, *args, **kwargs)

    monkeypatch.setattr("t2.harness.base.TransformersEngine", Seen)
    data = tiny.splits(fewshot=tiny.questions(9, 700))
    flags: list[dict[str, Any]] = [
        {},
        {"num_fewshot": 2},
        {"apply_chat_template": True},
        {"apply_chat_template": True, "system_instruction": "Be brief."},
        {"system_instruction": "Be brief."},
        {"gen_kwargs": "max_gen_toks=4"},
        {"limit": 2},
    ]
    for i, flag in enumerate(flags):
        prompts.append([])
        _records(tiny_folder, tmp_path / str(i), monkeypatch, [tiny.text_task(data=data)], **flag)
    plain, shots, chat, instructed, system, short, limited = ([text for text, _ in p] for p in prompts)
    assert all(text.count("Q: ") == 1 and "<user>" not in text for text in plain)
    assert all(text.count("Q: ") == 3 for text in shots)
    assert all(text.startswith("<user>Q: ") and text.endswith("<assistant>") for text in chat)
    assert all(text.startswith("<system>Be brief.</>") for text in instructed)
    assert all(text.startswith("Be brief.") for text in system)
    assert {count for _, count in prompts[5]} == {4}
    assert {count for _, count in prompts[0]} == {10}
    assert short[: len(limited)] == plain[: len(limited)] or limited == plain


def test_the_limit_bears_on_the_scored_docs_alone(tiny_folder: Path, experts: str) -> None:
    lm = make(tiny_folder, **SEARCH)
    whole = tiny.evaluate(lm, [tiny.choice_task()])
    record = lm.records[0]
    other = make(tiny_folder, **SEARCH)
    part = tiny.evaluate(other, [tiny.choice_task()], limit=4)
    assert len(part["samples"]["tiny_choice"]) == 4
    assert other.records[0].key == record.key
    assert other.records[0].mixtures[0].alpha == record.mixtures[0].alpha
    assert [s["doc_hash"] for s in part["samples"]["tiny_choice"]] == [
        s["doc_hash"] for s in whole["samples"]["tiny_choice"][:4]
    ]


def test_an_adaptation_is_found_again_and_not_repeated(
    tiny_folder: Path, experts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for settings in STRATEGIES[1:]:
        first = make(tiny_folder, **settings)
        results = tiny.evaluate(first, three())
        capsys.readouterr()
        again = make(tiny_folder, **settings)
        repeated = tiny.evaluate(again, three())
        said = capsys.readouterr().err
        assert said.count("adaptation found again, not repeated") == 3
        assert "searching" not in said
        assert [r.digest() for r in again.records] == [r.digest() for r in first.records]
        assert all(record.timing.pass1 == 0 for record in again.records)
        for name in NAMES:
            assert tiny.answers(repeated, name) == tiny.answers(results, name)


def test_a_search_within_seconds_is_found_again_on_any_machine(tiny_folder: Path, experts: str) -> None:
    settings = {**SEARCH, "generations": 10**6, "search": "random", "budget": "1s"}
    first, again = make(tiny_folder, **settings), make(tiny_folder, **settings)
    tiny.evaluate(first, [tiny.choice_task()])
    tiny.evaluate(again, [tiny.choice_task()])
    assert again.records[0].digest() == first.records[0].digest()
    assert first.records[0].settings["budget"] == "1s"
    report = first.records[0].search
    assert report is not None
    assert report.stopped == "the budget of 1 s is spent"
    assert report.evaluations >= 1


def test_preselected_experts_alone_are_in_the_plan_and_it_is_found_again(
    tiny_folder: Path, tiny_engine: TransformersEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(12):
        tiny.save_expert(tmp_path / "experts" / f"e{seed:02}.safetensors", tiny_engine, seed, domain=f"d{seed}")
    for per in ("expert", "layer"):
        settings = {**SEARCH, "preselect": 3, "per": per}
        first, again = make(tiny_folder, **settings), make(tiny_folder, **settings)
        results = tiny.evaluate(first, [tiny.choice_task()])
        said = capsys.readouterr().err
        assert "searching mixtures of the best 3 of 12 experts on 6 adaptation docs by cem; about " in said
        repeated = tiny.evaluate(again, [tiny.choice_task()])
        assert "adaptation found again" in capsys.readouterr().err
        assert tiny.answers(repeated, "tiny_choice") == tiny.answers(results, "tiny_choice")
        record = first.records[0]
        assert record.digest() == again.records[0].digest()
        assert len(record.experts) == 12
        assert record.preselected is not None
        assert record.preselected.of == 12
        named = {one.name for one in record.preselected.experts}
        assert len(named) == 3
        assert {name.split("@")[0] for name in record.mixtures[0].alpha} in (named, set())


def test_auto_says_what_it_chose_and_why(tiny_folder: Path, experts: str, capsys: pytest.CaptureFixture[str]) -> None:
    lm = make(tiny_folder, **{**SEARCH, "adapt": "auto"})
    tiny.evaluate(lm, three())
    said = capsys.readouterr().err
    assert said.count("judging the base, single experts, the uniform mixture, dispatch and the search cem of 3 ") == 3
    for record in lm.records:
        (chosen,) = [one for one in record.considered if one.chosen]
        assert record.note.startswith(("NO SIGNAL", f"auto chose {chosen.strategy}, "))
        assert all(one.reason and (one.score is None) == (one.docs == 0) for one in record.considered)
        assert {"none", "mix", "expert", "prompt", "cem"} <= {one.strategy for one in record.considered}
        assert record.held_out is not None
        assert record.search is not None


@pytest.mark.parametrize(
    ("args", "run"),
    [
        ({"adapt_seed": 1}, {}),
        ({"metric": "acc_norm"}, {}),
        ({"shots": 7}, {}),
        ({"search": "cma"}, {}),
        ({"search": "random"}, {}),
        ({"budget": 8}, {}),
        ({"budget": "600s"}, {}),
        ({"preselect": 2}, {}),
        ({"adapt": "auto"}, {}),
        ({"control": "shuffle"}, {}),
        ({"experts": "alpha+beta"}, {}),
        ({"dtype": "bfloat16"}, {}),
        ({}, {"num_fewshot": 1}),
        ({}, {"system_instruction": "Think."}),
        ({}, {"apply_chat_template": True}),
    ],
)
def test_the_key_tells_adaptations_apart(
    args: dict[str, Any], run: dict[str, Any], tiny_folder: Path, experts: str
) -> None:
    data = tiny.splits(fewshot=tiny.questions(9, 700))
    keys = []
    for settings, flags in (({}, {}), (args, run)):
        lm = make(tiny_folder, **{**SEARCH, **settings})
        tiny.evaluate(lm, [tiny.choice_task(data=data)], **flags)
        keys.append(lm.records[0].key)
    assert keys[0] != keys[1]


def test_a_damaged_record_is_passed_over(tiny_folder: Path, experts: str, tmp_path: Path) -> None:
    lm = make(tiny_folder, **SEARCH)
    tiny.evaluate(lm, [tiny.choice_task()])
    path = tmp_path / "cache" / "adaptations" / f"{lm.records[0].key}.json"
    whole = json.loads(path.read_text())
    path.write_text(path.read_text()[:200])
    again = make(tiny_folder, **SEARCH)
    tiny.evaluate(again, [tiny.choice_task()])
    assert again.records[0].digest() == lm.records[0].digest()
    assert json.loads(path.read_text())["plan"] == whole["plan"]


def test_records_are_in_the_results_and_in_the_named_file(tiny_folder: Path, experts: str, tmp_path: Path) -> None:
    lm = make(tiny_folder, **SEARCH, record=str(tmp_path / "deep" / "r.json"))
    results = tiny.evaluate(lm, three())
    written = json.loads((tmp_path / "deep" / "r.json").read_text())
    assert json.loads(json.dumps(results["config"]["t2"]["records"])) == written
    records = [AdaptationRecord.model_validate(value) for value in written]
    assert [record.task for record in records] == list(NAMES)
    assert [expert.name for expert in records[0].experts] == ["alpha", "beta", "gamma"]
    choice, rolling = records[0].held_out, records[2].held_out
    assert choice is not None
    assert rolling is not None
    assert choice.docs == len(records[0].adaptation_docs) == 6
    assert choice.before is not None
    assert choice.after is not None
    assert choice.after >= choice.before
    assert rolling.before is not None
    assert rolling.after is not None
    assert rolling.after <= rolling.before
    assert results["config"]["t2"]["base"]["fingerprint"] == lm.base.fingerprint
    assert len(results["config"]["t2"]["digest"]) == 64
    assert results["config"]["model_num_parameters"] > 0


def test_the_identity_tells_models_apart(tiny_folder: Path, experts: str) -> None:
    identities = [make(tiny_folder, **settings).identity()["digest"] for settings in STRATEGIES]
    identities.append(make(tiny_folder, adapt="expert", experts="alpha", control="shuffle").identity()["digest"])
    identities.append(make(tiny_folder, adapt="expert", experts="beta").identity()["digest"])
    assert len(set(identities)) == len(identities)
    assert make(tiny_folder, **SEARCH).identity()["digest"] == identities[STRATEGIES.index(SEARCH)]


def test_the_cache_of_answers_serves_the_same_model_only(tiny_folder: Path, experts: str, tmp_path: Path) -> None:
    cache = str(tmp_path / "answers")
    first = make(tiny_folder, **SEARCH)
    results = tiny.evaluate(first, three(), use_cache=cache)
    scored = sum(len(task.instances) for task in _built())
    caching = CachingLM(make(tiny_folder, **SEARCH), f"{cache}_rank0.db")
    assert len(caching.dbdict) == scored + 1
    again = make(tiny_folder, **SEARCH)
    cached = tiny.evaluate(again, three(), use_cache=cache)
    for name in NAMES:
        assert tiny.answers(cached, name) == tiny.answers(results, name)
    assert [r.digest() for r in again.records] == [r.digest() for r in first.records]
    assert all(record.timing.pass2 == 0 for record in again.records)
    for other in ({"adapt": "none"}, {**SEARCH, "control": "shuffle"}, {"adapt": "expert", "experts": "alpha"}):
        with pytest.raises(ArgumentError, match="--use_cache: the file holds answers of another base model"):
            tiny.evaluate(make(tiny_folder, **other), three(), use_cache=cache)


def test_cached_answers_of_a_search_that_is_not_on_record_are_refused(
    tiny_folder: Path, experts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "answers")
    tiny.evaluate(make(tiny_folder, **SEARCH), [tiny.choice_task()], use_cache=cache, limit=5)
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "elsewhere"))
    for limit in (5, 9):
        with pytest.raises(ArgumentError, match="holds answers of task tiny_choice under an adaptation whose record"):
            tiny.evaluate(make(tiny_folder, **SEARCH), [tiny.choice_task()], use_cache=cache, limit=limit)
    fixed = {"adapt": "mix", "experts": "alpha+beta"}
    other = str(tmp_path / "others")
    first = make(tiny_folder, **fixed)
    tiny.evaluate(first, [tiny.choice_task()], use_cache=other)
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "further"))
    again = make(tiny_folder, **fixed)
    tiny.evaluate(again, [tiny.choice_task()], use_cache=other)
    assert [record.digest() for record in again.records] == [record.digest() for record in first.records]


def test_two_mixtures_for_one_request_do_not_share_a_cache(tiny_folder: Path, experts: str, tmp_path: Path) -> None:
    other = tiny.splits(validation=tiny.questions(40, 3000))
    tasks = [tiny.choice_task("first"), tiny.choice_task("second", other)]
    lm = make(tiny_folder, **SEARCH)
    tiny.evaluate(lm, tasks)
    assert lm.records[0].mixtures[0].alpha != lm.records[1].mixtures[0].alpha
    with pytest.raises(
        ArgumentError, match="--use_cache: tasks first and second ask the same under different mixtures"
    ):
        tiny.evaluate(make(tiny_folder, **SEARCH), tasks, use_cache=str(tmp_path / "answers"))


def test_scores_survive_a_record_that_cannot_be_written(
    tiny_folder: Path, experts: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "deep" / "r.json"
    lm = make(tiny_folder, adapt="mix", record=str(place))
    place.parent.rmdir()
    place.parent.write_text("in the way")
    results = tiny.evaluate(lm, [tiny.choice_task()])
    assert len(results["config"]["t2"]["records"]) == 1
    assert f"cannot write {place}" in caplog.text


def _built() -> list[Any]:
    tasks = three()
    for task in tasks:
        task.build_all_requests()
    return tasks


def test_a_cache_that_hf_wrote_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "answers")
    args = f"pretrained={tiny_folder},device=cpu"
    tiny.evaluate("hf", [tiny.choice_task()], model_args=args, use_cache=cache)
    with pytest.raises(ArgumentError, match="holds answers that t2 did not write"):
        tiny.evaluate(make(tiny_folder), [tiny.choice_task()], use_cache=cache)


def test_a_half_filled_cache_gives_the_same_record(tiny_folder: Path, experts: str, tmp_path: Path) -> None:
    cache = str(tmp_path / "answers")
    tiny.evaluate(make(tiny_folder, adapt="prompt"), [tiny.choice_task()], limit=5, use_cache=cache)
    half = make(tiny_folder, adapt="prompt")
    results = tiny.evaluate(half, [tiny.choice_task()], use_cache=cache)
    whole = make(tiny_folder, adapt="prompt")
    reference = tiny.evaluate(whole, [tiny.choice_task()])
    assert half.records[0].digest() == whole.records[0].digest()
    for a, b in zip(tiny.answers(results, "tiny_choice"), tiny.answers(reference, "tiny_choice"), strict=True):
        assert [r[0] for r in a[4]] == pytest.approx([r[0] for r in b[4]], abs=1e-3)


def test_an_expert_that_changes_nothing_is_an_error(
    tiny_folder: Path, tiny_engine: TransformersEngine, experts: str, tmp_path: Path
) -> None:
    tiny.save_expert(tmp_path / "experts" / "idle.safetensors", tiny_engine, 0, domain="idle", scale=1e-7)
    for settings in ({"adapt": "expert", "experts": "idle"}, {**SEARCH, "experts": "alpha+idle"}):
        with pytest.raises(ExpertError, match=r"idle.* leaves the logits of a probe text unchanged"):
            tiny.evaluate(make(tiny_folder, dtype="bfloat16", **settings), [tiny.choice_task()])


def test_adaptation_docs_that_trained_an_expert_are_told(
    tiny_folder: Path, tiny_engine: TransformersEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    docs = pack_hashes(doc_hash(doc) for doc in tiny.choice_task().validation_docs())
    tiny.save_expert(tmp_path / "experts" / "one.safetensors", tiny_engine, 0, training_docs=docs)
    lm = make(tiny_folder, adapt="cem", shots=4, population=2, generations=1)
    tiny.evaluate(lm, [tiny.choice_task()])
    assert lm.records[0].pool == "validation docs, 4 of those drawn trained an expert"
    assert "expert one was trained on 0 of the 12 scored docs and 4 of the 4 adaptation docs" in caplog.text
    assert lm.records[0].overlap == (Overlap(expert="one", scored=0, adaptation=4),)


@pytest.mark.parametrize("limit", [None, 5])
def test_scored_docs_that_trained_an_expert_mark_the_result(
    tiny_folder: Path, tiny_engine: TransformersEngine, tmp_path: Path, limit: int | None
) -> None:
    relabelled = [{**row, "gold": (row["gold"] + 1) % 4} for row in tiny.questions(12)[3:]]
    seen = pack_hashes(marks_of(tiny.choice_task(), relabelled))
    tiny.save_expert(tmp_path / "experts" / "one.safetensors", tiny_engine, 0, training_docs=seen)
    tiny.save_expert(tmp_path / "experts" / "two.safetensors", tiny_engine, 1, training_docs=pack_hashes(["0" * 12]))
    for _ in range(2):  # found, and found again
        lm = make(tiny_folder, adapt="mix", experts="one+two")
        tiny.evaluate(lm, [tiny.choice_task()], limit=limit)
        expected = Overlap(expert="one", scored=2 if limit else 9, adaptation=0)
        assert lm.records[0].overlap == (expected,)
        shown = format_summary(lm.records, {})
        assert "mix, OVERLAP" in shown
        assert f"expert one was trained on {expected.scored} scored docs" in shown
    with pytest.raises(TaskError, match=r"expert one was trained on .* overlap=refuse does not allow"):
        tiny.evaluate(make(tiny_folder, adapt="mix", experts="one+two", overlap="refuse"), [tiny.choice_task()])
    lm = make(tiny_folder, adapt="expert", experts="two", overlap="refuse")
    tiny.evaluate(lm, [tiny.choice_task()], limit=limit)
    assert lm.records[0].overlap == ()


def test_an_expert_of_ones_is_the_base(tiny_folder: Path, tiny_engine: TransformersEngine, tmp_path: Path) -> None:
    tiny.save_expert(tmp_path / "experts" / "one.safetensors", tiny_engine, 0, scale=0.0)
    ours = tiny.evaluate(make(tiny_folder, adapt="expert", experts="one"), three())
    base = tiny.evaluate(make(tiny_folder), three())
    for name in NAMES:
        assert tiny.answers(ours, name) == tiny.answers(base, name)


def test_no_signal_keeps_the_base(tiny_folder: Path, experts: str) -> None:
    never = tiny.text_task(process_results=lambda doc, results: {"vowel": 0.0})
    lm = make(tiny_folder, **SEARCH)
    ours = tiny.evaluate(lm, [never])
    base = tiny.evaluate(make(tiny_folder), [tiny.text_task()])
    assert lm.records[0].no_signal
    assert "NO SIGNAL" in lm.records[0].note
    assert lm.records[0].mixtures[0].alpha == {}
    assert [s["resps"] for s in ours["samples"]["tiny_text"]] == [s["resps"] for s in base["samples"]["tiny_text"]]


def test_every_tasks_pool_is_checked_before_the_first_search(
    tiny_folder: Path, experts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    unlabelled = [{**row, "gold": -1} for row in tiny.questions(30, 100)]
    tasks = [tiny.choice_task(), tiny.choice_task("tiny_other", data=tiny.splits(validation=unlabelled))]
    with pytest.raises(TaskError, match=r"tiny_other: none of the 30 docs .* has a label"):
        tiny.evaluate(make(tiny_folder, **SEARCH), tasks)
    assert "searching" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "error", "line"),
    [
        ({"adapt": "cem", "experts": "alhpa"}, NotFoundError, "did you mean 'alpha'?"),
        ({"adapt": "cem", "experts": "alpha", "layers": "9"}, ArgumentError, "the model has no layer 9"),
        ({"pretrained": "does/not/exist"}, ModelError, "cannot load pretrained=does/not/exist"),
        ({"dtype": "bf16"}, ModelError, "has no attribute 'bf16'"),
        ({"record": __file__ + "/r.json"}, StorageError, "r.json"),
        ({"adapt": "none", "gguf_file": "x.gguf", "pretrained": None}, ArgumentError, "needs pretrained="),
    ],
)
def test_bad_input_is_told_in_one_line(
    args: dict[str, Any], error: type[T2Error], line: str, tiny_folder: Path, experts: str
) -> None:
    with pytest.raises(error) as caught:
        make(tiny_folder, **args)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_experts_of_another_model_are_refused(tiny_folder: Path, experts: str, tmp_path: Path) -> None:
    other = tiny.save_model(tmp_path / "other", seed=1)
    with pytest.raises(ExpertMismatchError, match="transfer=strict applies it all the same"):
        make(other, adapt="expert", experts="alpha")
    results = tiny.evaluate(make(other, adapt="expert", experts="alpha", transfer="strict"), [tiny.choice_task()])
    assert len(results["samples"]["tiny_choice"]) == 12


def test_a_metric_that_the_task_lacks_is_told(tiny_folder: Path, experts: str) -> None:
    with pytest.raises(ArgumentError, match="metric=f1 is not a metric of task tiny_choice"):
        tiny.evaluate(make(tiny_folder, **SEARCH, metric="f1"), [tiny.choice_task()])


def test_too_many_shots_are_told(tiny_folder: Path, experts: str) -> None:
    with pytest.raises(TaskError, match="shots=99 exceeds the 30 labelled docs"):
        tiny.evaluate(make(tiny_folder, **{**SEARCH, "shots": 99}), [tiny.choice_task()])


def test_requests_of_unknown_tasks_are_refused(tiny_folder: Path, experts: str) -> None:
    task = _built()[0]
    with pytest.raises(ArgumentError, match="was not told which tasks these requests belong to"):
        make(tiny_folder, adapt="mix").loglikelihood(task.instances)
    assert len(make(tiny_folder).loglikelihood(task.instances)) == 48


def test_sampled_answers_work_and_repeat(tiny_folder: Path, experts: str) -> None:
    def run() -> Any:
        tasks = [tiny.text_task(repeats=2)]
        gen = "do_sample=true,temperature=1.0"
        return tiny.evaluate(make(tiny_folder, **SEARCH), tasks, gen_kwargs=gen)["samples"]["tiny_text"]

    first, again = run(), run()
    assert [s["resps"] for s in first] == [s["resps"] for s in again]
    assert any(len(set(s["resps"][0])) == 2 for s in first)


@pytest.mark.parametrize("per", ["layer", "matrix"])
@pytest.mark.parametrize("space", ["paper", "delta"])
def test_a_coefficient_per_layer_or_matrix_is_found_again(
    per: str, space: str, tiny_folder: Path, experts: str
) -> None:
    args = {**SEARCH, "per": per, "space": space, "normalise": "sum", "rescale": "nuclear", "rank": 16}
    first, again = make(tiny_folder, **args), make(tiny_folder, **args)
    results = tiny.evaluate(first, [tiny.choice_task()])
    assert tiny.answers(tiny.evaluate(again, [tiny.choice_task()]), "tiny_choice") == tiny.answers(
        results, "tiny_choice"
    )
    assert len(first.records[0].mixtures[0].alpha) in (0, 3 * (2 if per == "layer" else 14))


def test_samples_choose_the_scored_docs(tiny_folder: Path, experts: str) -> None:
    lm = make(tiny_folder, **SEARCH)
    task = tiny.choice_task(data={"test": tiny.questions(50)})
    results = tiny.evaluate(lm, [task], samples={"tiny_choice": [3, 8, 44]})
    assert [sample["doc"]["q"].split()[0] for sample in results["samples"]["tiny_choice"]] == ["3", "8", "44"]


def test_requests_cached_by_another_model_do_not_bring_back_what_was_set_aside(
    tiny_folder: Path, experts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "requests"))
    rows = {"test": tiny.questions(50)}
    args = f"pretrained={tiny_folder},device=cpu"
    tiny.evaluate("hf", [tiny.choice_task(data=rows)], model_args=args, cache_requests=True)
    results = tiny.evaluate(make(tiny_folder), [tiny.choice_task(data=rows)], cache_requests=True)
    assert len(results["samples"]["tiny_choice"]) == 30


def test_a_mixture_file_serves_as_an_expert(tiny_folder: Path, experts: str, tmp_path: Path) -> None:
    source = read_expert(tmp_path / "experts" / "alpha.safetensors")
    halved = {name: (1 + (vector - 1) / 2).astype(np.float32) for name, vector in source.vectors.items()}
    manifest = source.manifest.model_copy(update={"kind": "mixture", "name": "half"})
    write_expert(tmp_path / "half.safetensors", manifest, halved)
    lm = make(tiny_folder, adapt="expert", experts=str(tmp_path / "half.safetensors"))
    results = tiny.evaluate(lm, [tiny.choice_task()])
    assert lm.records[0].mixtures[0].alpha == {"half": 1.0}
    assert len(results["samples"]["tiny_choice"]) == 12
