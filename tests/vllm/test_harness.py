"""``--model t2`` with ``engine=vllm``: every strategy, likelihoods and generation, over one vLLM that is running."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.vllm_causallms import VLLM

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.engine.vllm import VllmEngine
from t2.core.errors import ArgumentError, DependencyError, ExpertError, ModelError
from t2.harness import base, held_out
from t2.harness import opened as opening
from t2.harness.args import check_hf_args, parse_args
from t2.harness.model import T2LM
from tests.harness import tiny
from tests.vllm.conftest import NAME

TASKS = {"choice": tiny.choice_task, "text": tiny.text_task, "rolling": tiny.rolling_task}
LABELS = ("code", "math", "reasoning", "others")
SEARCH: dict[str, Any] = {"shots": 3, "population": 3, "generations": 2, "experts": "alpha+beta"}
STRATEGIES: dict[str, dict[str, Any]] = {
    "expert": {"adapt": "expert", "experts": "beta"},
    "mix": {"adapt": "mix", "experts": "alpha+beta", "alpha": "0.7+0.3"},
    "prompt": {"adapt": "prompt", "threshold": 0.6},
    "prompt by generation": {"adapt": "prompt", "dispatch": "generate"},
    "classifier": {"adapt": "classifier"},
    "cem": {"adapt": "cem", **SEARCH},
    "auto": {"adapt": "auto", **SEARCH},
}


@pytest.fixture(autouse=True)
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: TransformersEngine) -> None:
    """Three random experts and a random classifier, and adaptations that no test shares."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("T2_EXPERTS_DIR", str(tmp_path / "experts"))
    monkeypatch.setenv("T2_DATA_HOME", str(tmp_path / "data"))
    for seed, (name, domain) in enumerate([("alpha", "math"), ("beta", "code"), ("gamma", "reasoning")]):
        tiny.save_expert(tmp_path / "experts" / f"{name}.safetensors", other, seed, domain=domain)
    tiny.save_expert(tmp_path / "experts" / "names.safetensors", other, 9, kind="classifier", labels=LABELS)


@pytest.fixture
def running(inner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM is not started again for each test, and a dispatch is calibrated on a few prompts of each domain."""

    def opened(pretrained: str, engine: str = "hf", **args: Any) -> Any:
        return inner if engine == "vllm" else base.open_base(pretrained, engine, **args)

    monkeypatch.setattr(opening, "open_base", opened)
    monkeypatch.setattr(held_out, "PER_DOMAIN", 3)


@pytest.fixture
def plain(inner: Any) -> VLLM:
    """The running model as lm-eval's own class, without what t2 adds to it."""
    lm = VLLM.__new__(VLLM)
    vars(lm).update(vars(inner))
    return lm


def vllm(folder: Path, **args: Any) -> T2LM:
    return T2LM(engine="vllm", pretrained=str(folder), dtype="float32", **args)


def transformers(folder: Path, **args: Any) -> T2LM:
    return T2LM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4, max_length=512, **args)


@pytest.mark.parametrize("kind", list(TASKS))
def test_none_is_lm_eval_s_own_vllm(running: None, folder: Path, plain: VLLM, kind: str) -> None:
    task = TASKS[kind]()
    ours = tiny.evaluate(vllm(folder), [task], limit=4)
    theirs = tiny.evaluate(plain, [TASKS[kind]()], limit=4)
    assert tiny.answers(ours, task.task_name) == tiny.answers(theirs, task.task_name)


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [*((strategy, kind) for strategy in STRATEGIES for kind in ("choice", "text")), ("mix", "rolling")],
)
def test_every_strategy_answers_as_over_transformers_and_the_base_comes_back(
    running: None, folder: Path, plain: VLLM, strategy: str, kind: str
) -> None:
    args = STRATEGIES[strategy]
    task = TASKS[kind]()
    before = tiny.answers(tiny.evaluate(plain, [TASKS[kind]()], limit=4), task.task_name)
    found = []
    for lm in (vllm(folder, **args), transformers(folder, **args)):
        answers = tiny.answers(tiny.evaluate(lm, [TASKS[kind]()], limit=4), task.task_name)
        found.append((answers, lm.records[0]))
    (ours, record), (theirs, by_transformers) = found
    assert (record.strategy, record.dtype, record.settings["engine"]) == (args["adapt"], "float32", "vllm")
    for name in ("mixtures", "dispatch", "held_out", "no_signal", "pool"):
        assert getattr(record, name) == getattr(by_transformers, name), name
    assert [g.best for g in record.history] == [g.best for g in by_transformers.history]
    if record.calibration is not None:
        assert by_transformers.calibration is not None
        assert record.calibration.confusion == by_transformers.calibration.confusion
    for one, two in zip(ours, theirs, strict=True):
        assert _near(_spelt(one[3]), _spelt(two[3]))
    if any(used.alpha for used in record.mixtures):
        assert ours != before
    assert tiny.answers(tiny.evaluate(plain, [TASKS[kind]()], limit=4), task.task_name) == before


def test_prompts_of_a_mixture_are_answered_together_and_the_weights_go_from_one_to_the_next(
    running: None, folder: Path, inner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, generate = [], inner.model.generate

    def counted(prompts: list[Any], *args: Any, **kwargs: Any) -> Any:
        calls.append(len(prompts))
        return generate(prompts, *args, **kwargs)

    monkeypatch.setattr(inner.model, "generate", counted)
    lm = vllm(folder, adapt="prompt", threshold=1)
    assert lm._runtime is not None
    engine = lm._runtime.engine
    assert isinstance(engine, VllmEngine)
    tiny.evaluate(lm, [tiny.choice_task()], limit=12)
    used = [mixture for mixture in lm.records[0].mixtures if mixture.alpha]
    experts = 3
    # To see that they act: the three experts after the base, and each mixture before it answers.
    probes = [1] * (1 + experts), [1] * (1 + len(used))
    assert sum(mixture.requests for mixture in used) == 48
    # The first call asks for the domains of held-out prompts, with an empty one as their prior; the next for those of
    # the prompts. Labels of several characters are read one by one.
    asked = [13 * len(LABELS), 12 * len(LABELS)]
    assert sorted(calls) == sorted([*probes[0], *probes[1], *asked, *(mixture.requests for mixture in used)])
    assert engine.switches == (experts + 1) + (len(used) + 1)


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


def test_what_vllm_cannot_start_with_is_told_in_one_line(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"vLLM does not start with pretrained=.*max_model_len") as caught:
        base.open_base(str(folder), "vllm", dtype="float32", max_model_len=100_000)
    assert "\n" not in str(caught.value)


def test_experts_of_another_base_are_refused(running: None, folder: Path, tmp_path: Path) -> None:
    foreign = tiny.engine_of(tiny.save_model(tmp_path / "foreign", seed=1, layers=4, hidden=128))
    tiny.save_expert(tmp_path / "experts" / "foreign.safetensors", foreign, 0)
    with pytest.raises(ExpertError, match="foreign") as caught:
        vllm(folder, adapt="expert", experts="foreign")
    assert NAME in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_vllm_of_another_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "t2.harness.vllm_lm", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", None)
    with pytest.raises(DependencyError, match=r'cannot use the vLLM that is installed.*pip install "t2-eval\[vllm\]"'):
        base.vllm_module()


def _spelt(answers: Any) -> Any:
    """Without special tokens, which lm-eval's ``vllm`` spells and its ``hf`` leaves out."""
    if isinstance(answers, (list, tuple)):
        return [_spelt(answer) for answer in answers]
    return re.sub(r"<pad>|<s>|</s>|<unk>", "", answers) if isinstance(answers, str) else answers


def _near(ours: Any, theirs: Any) -> bool:
    """Equal texts and greedy flags, and likelihoods within 1e-3."""
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(_near, ours, theirs))
    return bool(ours == pytest.approx(theirs, abs=1e-3) if isinstance(ours, float) else ours == theirs)
