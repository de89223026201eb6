"""``--model t2`` with ``engine=vllm``: every strategy, likelihoods and generation, over one vLLM that is running."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from t2.adapters.engine.transformers import TransformersEngine
from t2.core.errors import ArgumentError, DependencyError, ModelError
from t2.harness import base, model
from t2.harness.args import check_hf_args, parse_args
from t2.harness.model import T2LM
from tests.harness import tiny

TASKS = {"choice": tiny.choice_task, "text": tiny.text_task, "rolling": tiny.rolling_task}


@pytest.fixture(autouse=True)
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: TransformersEngine) -> None:
    """Three random experts of the last three layers, and adaptations that no test shares."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
    monkeypatch.setenv("T2_EXPERTS_DIR", str(tmp_path / "experts"))
    monkeypatch.setenv("T2_DATA_HOME", str(tmp_path / "data"))
    for seed, (name, domain) in enumerate([("alpha", "math"), ("beta", "code"), ("gamma", "reasoning")]):
        path = tmp_path / "experts" / f"{name}.safetensors"
        tiny.save_expert(path, other, seed, domain=domain, scale=0.4, layers=range(27, 30))


@pytest.fixture
def running(inner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is not started again for each test."""

    def opened(pretrained: str, engine: str = "hf", **args: Any) -> Any:
        return inner if engine == "vllm" else base.open_base(pretrained, engine, **args)

    monkeypatch.setattr(model, "open_base", opened)


def make(folder: Path, **args: Any) -> T2LM:
    return T2LM(engine="vllm", pretrained=str(folder), dtype="float32", **args)


@pytest.mark.parametrize("kind", list(TASKS))
def test_none_is_lm_eval_s_own_vllm(running: None, folder: Path, inner: Any, kind: str) -> None:
    task = TASKS[kind]()
    ours = tiny.evaluate(make(folder), [task], limit=3)
    theirs = tiny.evaluate(inner, [TASKS[kind]()], limit=3)
    assert tiny.answers(ours, task.task_name) == tiny.answers(theirs, task.task_name)


@pytest.mark.parametrize("kind", list(TASKS))
def test_a_mixture_answers_as_in_transformers_and_the_base_comes_back(
    running: None, folder: Path, inner: Any, kind: str
) -> None:
    args: dict[str, Any] = {"adapt": "mix", "experts": "alpha+beta", "alpha": "0.7+0.3"}
    tasks = [TASKS[kind]() for _ in range(4)]
    before = tiny.answers(tiny.evaluate(inner, [tasks[0]], limit=3), tasks[0].task_name)
    ours = tiny.answers(tiny.evaluate(make(folder, **args), [tasks[1]], limit=3), tasks[1].task_name)
    after = tiny.answers(tiny.evaluate(inner, [tasks[2]], limit=3), tasks[2].task_name)
    assert before == after
    assert ours != before
    hf = T2LM(**args, device="cpu", batch_size=4, **_loaded(folder))
    theirs = tiny.answers(tiny.evaluate(hf, [tasks[3]], limit=3), tasks[3].task_name)
    for one, two in zip(ours, theirs, strict=True):
        assert _near(one[3], two[3])


@pytest.mark.parametrize(
    "args",
    [
        {"adapt": "expert", "experts": "beta"},
        {"adapt": "prompt", "threshold": 0, "experts": "alpha+beta+gamma"},
        {"adapt": "prompt", "dispatch": "generate", "experts": "alpha+beta+gamma"},
        {"adapt": "cem", "shots": 3, "population": 3, "generations": 2, "experts": "alpha+beta"},
        {"adapt": "auto", "shots": 3, "population": 2, "generations": 1, "experts": "alpha+beta"},
    ],
    ids=lambda args: "-".join(map(str, args.values())),
)
def test_every_strategy_runs_and_says_what_it_did(running: None, folder: Path, args: dict[str, Any]) -> None:
    for kind in ("choice", "text"):
        lm = make(folder, **args)
        task = TASKS[kind]()
        results = tiny.evaluate(lm, [task], limit=3)
        assert len(results["samples"][task.task_name]) == 3
        assert [(record.strategy, record.dtype) for record in lm.records] == [(args["adapt"], "float32")]
        assert lm.records[0].settings["engine"] == "vllm"


def test_a_search_finds_the_same_mixture_as_over_transformers(running: None, folder: Path) -> None:
    args: dict[str, Any] = {"adapt": "cem", "shots": 4, "population": 4, "generations": 2, "experts": "alpha+beta"}
    found = []
    for lm in (make(folder, **args), T2LM(**args, device="cpu", batch_size=4, **_loaded(folder))):
        tiny.evaluate(lm, [tiny.text_task()], limit=2)
        record = lm.records[0]
        found.append((record.mixtures[0].alpha, record.held_out, [g.best for g in record.history]))
    assert found[0] == found[1]


def test_what_it_cannot_take_is_told_before_it_starts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"needs pretrained=.*GGUF"):
        base.open_base(None, "vllm")
    with pytest.raises(ArgumentError, match="quantization=awq does not go with engine=vllm"):
        base.open_base(str(folder), "vllm", quantization="awq")
    with pytest.raises(ArgumentError, match="data_parallel_size does not go with engine=vllm"):
        base.open_base(str(folder), "vllm", data_parallel_size=2)
    with pytest.raises(ArgumentError, match="gguf_file is for engine=hf, not for engine=vllm"):
        parse_args({"engine": "vllm", "gguf_file": "x"})
    with pytest.raises(ArgumentError, match="max_model_length does not exist; did you mean 'max_model_len'"):
        parse_args({"engine": "vllm", "max_model_length": 5})
    with pytest.raises(ArgumentError, match="engine is for lm_eval --model t2"):
        check_hf_args({"engine": "vllm"}, "model_args")
    assert parse_args({"engine": "vllm", "gpu_memory_utilization": 0.5}).hf == {"gpu_memory_utilization": 0.5}
    with pytest.raises(ModelError, match="there is no such folder"):
        base.open_base(str(tmp_path / "absent"), "vllm")


def test_a_vllm_of_another_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "t2.harness.vllm_lm", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", None)
    with pytest.raises(DependencyError, match=r'cannot use the vLLM that is installed.*pip install "t2-eval\[vllm\]"'):
        base.vllm_module()


def _loaded(folder: Path) -> dict[str, Any]:
    return {"pretrained": str(folder), "dtype": "float32"}


def _near(ours: Any, theirs: Any) -> bool:
    """Equal texts and greedy flags, and likelihoods within 1e-3."""
    flat = [value for answers in (ours, theirs) for answer in answers for value in _flat(answer)]
    half = len(flat) // 2
    return all(
        one == pytest.approx(two, abs=1e-3) if isinstance(one, float) else one == two
        for one, two in zip(flat[:half], flat[half:], strict=True)
    )


def _flat(value: Any) -> list[Any]:
    return [part for item in value for part in _flat(item)] if isinstance(value, (list, tuple)) else [value]
