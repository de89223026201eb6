"""Training from a configuration to files, on a tiny model."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from t2.adapters.expert import check_expert, load_expert
from t2.core.curve import read_curve
from t2.core.digests import doc_hash, sha256_file
from t2.core.errors import ArgumentError, TaskError, TrainingError
from t2.core.manifest import unpack_hashes
from t2.core.settings import experts_dir
from t2.harness.tasks import TaskDocs
from t2.training.api import TrainResult, train
from t2.training.config import TrainConfig, make_config
from t2.training.methods import build_engine
from t2.training.parameters import Parameters
from t2.training.rollouts import GenerationProblem
from t2.training.split import split_docs
from t2.training.trainer import learning_rate
from tests.harness import tiny
from tests.training import planted

GIVEN = ("overwrite", "checkpoint_every", "continue_", "folder", "trackers")
FAST = {"steps": 8, "batch": 8, "learning_rate": 2e-2, "clip": 1.0, "validate_every": 4}


def run(lm: HFLM, task: Any, name: str = "letters", **values: Any) -> TrainResult:
    given = {key: values.pop(key) for key in GIVEN if key in values}
    config = make_config(task=str(task.task_name), name=name, **{**FAST, **values})
    return train(config, lm=lm, task=task, progress=False, **given)


def test_an_expert_learns_and_says_what_it_is(tiny_lm: HFLM) -> None:
    task = planted.choices()
    result = run(tiny_lm, task)
    assert result.path == experts_dir() / "letters" / "expert.safetensors"
    assert result.best_score >= result.base_score + 0.3
    assert result.digest == sha256_file(result.path)
    expert = load_expert(result.path)
    engine = build_engine(tiny_lm, make_config(task="planted", name="x"))
    check_expert(expert, engine.base, engine.ranks())
    manifest = expert.manifest
    assert (manifest.name, manifest.task, manifest.domain) == ("letters", "planted", "letters")
    assert manifest.method == "expected-reward"
    assert TrainConfig.model_validate(manifest.training).learning_rate == 2e-2
    halves = split_docs(task, 0)
    assert unpack_hashes(manifest.training_docs) == sorted(halves.marks)
    assert halves.marks >= {*halves.train_hashes, *halves.validation_hashes}
    assert not set(unpack_hashes(manifest.training_docs)) & {doc_hash(doc) for doc in task.test_docs()}
    folder = result.path.parent
    assert sorted(file.name for file in folder.iterdir()) == [
        "base.json",
        "checkpoint.safetensors",
        "config.json",
        "curve.jsonl",
        "expert.safetensors",
        "scores.json",
    ]
    scores = json.loads((folder / "scores.json").read_text())
    assert (scores["base_score"], scores["best_score"]) == (result.base_score, result.best_score)
    assert json.loads((folder / "config.json").read_text()) == manifest.training


def test_the_curve_has_every_step_and_validation(tiny_lm: HFLM) -> None:
    curve = run(tiny_lm, planted.choices(), kl=0.1).curve
    steps = [point for point in curve if point.split == "train"]
    validations = [point for point in curve if point.split == "validation"]
    assert [point.step for point in steps] == list(range(8))
    assert [point.step for point in validations] == [0, 4, 8]
    assert all(point.kl is not None and point.gradient_norm and point.learning_rate for point in steps)
    assert [point.seconds for point in curve] == sorted(point.seconds for point in curve)
    assert validations[-1].reward > validations[0].reward
    assert validations[0].kl == 0


def test_the_expert_gives_the_measured_score_in_a_new_engine(tiny_lm: HFLM) -> None:
    task = planted.choices()
    result = run(tiny_lm, task)
    validation = split_docs(task, 0).validation
    docs = TaskDocs(task, tiny_lm)
    engine = build_engine(tiny_lm, make_config(task="planted", name="x"))
    requests = docs.instances(validation)
    for mixture, score in ((None, result.base_score), (load_expert(result.path).z, result.best_score)):
        answers = docs.answer(engine, requests, (mixture,))
        metrics = [docs.metrics(*one) for one in zip(validation, requests, answers, strict=True)]
        assert docs.aggregate(metrics) == pytest.approx(score)


@pytest.mark.parametrize("baseline", ["mean", "rloo"])
def test_generated_answers_improve(tiny_lm: HFLM, baseline: str) -> None:
    values: dict[str, Any] = {"samples": 8, "baseline": baseline, "steps": 6, "validate_every": 3, "select": "reward"}
    result = run(tiny_lm, planted.texts(), **values)
    assert result.best_score > result.base_score
    assert load_expert(result.path).manifest.method == "reinforce"


def test_sampled_choices_improve(tiny_lm: HFLM) -> None:
    result = run(tiny_lm, planted.choices(), objective="reinforce", samples=4)
    assert result.best_score > result.base_score
    assert load_expert(result.path).manifest.method == "reinforce"


def test_a_likelihood_task_of_one_answer_is_learned(tiny_lm: HFLM) -> None:
    task = planted.choices(
        output_type="loglikelihood",
        doc_to_target=" e",
        doc_to_choice=None,
        metric_list=[tiny.metric("acc")],
    )
    result = run(tiny_lm, task, steps=20, validate_every=10, learning_rate=3e-2)
    rewards = [point.reward for point in result.curve if point.split == "validation"]
    assert rewards[-1] > rewards[0] + 0.1


def test_the_same_seed_gives_the_same_expert_and_another_seed_another(tiny_lm: HFLM) -> None:
    digests = [run(tiny_lm, planted.choices(), overwrite=True, seed=seed).digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    answers = {"samples": 8, "steps": 10, "validate_every": 2, "overwrite": True}
    sampled = [run(tiny_lm, planted.texts(40), "texts", seed=seed, **answers).digest for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_the_base_model_is_as_it_was(tiny_lm: HFLM) -> None:
    before = {name: value.clone() for name, value in tiny_lm.model.state_dict().items()}
    run(tiny_lm, planted.choices(), steps=2, validate_every=1)
    assert all(torch.equal(value, before[name]) for name, value in tiny_lm.model.state_dict().items())


def test_only_the_asked_components_move(tiny_lm: HFLM) -> None:
    result = run(tiny_lm, planted.choices(), targets="mlp", layers="1", rank=5)
    z = load_expert(result.path).z
    assert z.keys() == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert all(bool((vector[5:] == 1).all()) and bool((vector[:5] != 1).any()) for vector in z.values())


def test_a_constant_reward_stops_with_advice(tiny_lm: HFLM) -> None:
    never = planted.texts(process_results=lambda doc, results: {"vowel": 0.0})
    with pytest.raises(TrainingError, match=r"earns the same reward \(-1\) for every answer.*easier task.*likelihood"):
        run(tiny_lm, never, samples=2)
    always = planted.texts(process_results=lambda doc, results: {"vowel": 1.0})
    with pytest.raises(TrainingError, match=r"same reward \(\+1\).*harder task"):
        run(tiny_lm, always)
    assert not list(experts_dir().glob("*/*"))


def test_rare_right_samples_are_a_signal_where_greedy_answers_are_all_wrong(tiny_lm: HFLM) -> None:
    rare = planted.texts(process_results=lambda doc, results: {"vowel": float(results[0][:1] in "qwxyz")})
    config: dict[str, Any] = {"steps": 1, "validate_every": 1, "samples": 16}
    with pytest.raises(TrainingError, match="beat the base model's score"):
        run(tiny_lm, rare, **config, learning_rate=1e-9)


def test_no_expert_is_written_when_nothing_beats_the_base(tiny_lm: HFLM) -> None:
    with pytest.raises(TrainingError, match=r"no validation measurement of letters beat.*curve\.jsonl"):
        run(tiny_lm, planted.choices(), learning_rate=1e-9, steps=2, validate_every=1)
    assert not (experts_dir() / "letters").exists()
    assert len(read_curve(experts_dir() / "letters.training" / "curve.jsonl")) == 5
    assert run(tiny_lm, planted.choices()).best_score > 0


def test_a_finished_expert_is_replaced_only_when_asked(tiny_lm: HFLM) -> None:
    first = run(tiny_lm, planted.choices())
    with pytest.raises(ArgumentError, match=r"expert letters exists.*--overwrite"):
        run(tiny_lm, planted.choices(), seed=1)
    assert sha256_file(first.path) == first.digest
    second = run(tiny_lm, planted.choices(), seed=1, overwrite=True)
    assert second.digest == sha256_file(first.path) != first.digest
    assert sorted(path.name for path in experts_dir().iterdir() if path.is_dir()) == ["letters"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metric": "accc"}, "did you mean 'acc'"),
        ({"filter": "strict"}, "filter"),
        ({"layers": "0-9"}, "no layer"),
        ({"layers": "zero"}, "0-15"),
        ({"objective": "best"}, "objective=best"),
        ({"name": "../x"}, "name=../x"),
        ({"kl": -1}, "kl=-1"),
        ({"steps": 0}, "steps=0"),
        ({"baseline": "rloo"}, "samples of 2 or more"),
        ({"temperature": 0, "samples": 2}, "greedy"),
        ({"reward_right": -1}, "nothing to learn"),
        ({"warmup": 8}, "leaves none"),
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
    ],
)
def test_bad_values_are_named(tiny_lm: HFLM, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        run(tiny_lm, planted.choices(), **{"name": "letters", **values})


def test_tasks_that_cannot_be_learned_are_named(tiny_lm: HFLM) -> None:
    with pytest.raises(ArgumentError, match="sums over choices"):
        run(tiny_lm, planted.texts(), objective="expected-reward")
    data = {"training": planted.rows(6), "test": planted.rows(4, start=50)}
    with pytest.raises(TaskError, match="likelihood of whole texts"):
        run(tiny_lm, tiny.rolling_task("rolling", data))


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = make_config(task="t", name="n", steps=10, warmup=2, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[6] == pytest.approx(0.5)
    assert 0 < rates[9] < 0.05


def test_parameters_lay_out_z() -> None:
    parameters = Parameters(make_config(task="t", name="n", rank=4), {"a": 3, "b": 5})
    assert parameters.count == 7
    theta = torch.arange(1.0, 8.0)
    z = parameters.z(theta)
    assert {name: vector.tolist() for name, vector in z.items()} == {"a": [2, 3, 4], "b": [5, 6, 7, 8, 1]}
    z["b"].requires_grad_().mul(torch.arange(5.0)).sum().backward()
    assert parameters.gradient(theta, z).tolist() == [0, 0, 0, 0, 1, 2, 3]


def test_another_process_may_not_train_the_same_name(tiny_lm: HFLM) -> None:
    experts_dir().mkdir(parents=True)
    with (experts_dir() / ".letters.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ArgumentError, match="being trained by another process"):
            run(tiny_lm, planted.choices())


@pytest.mark.parametrize("place", ["letters", "letters.training"])
def test_a_file_where_a_folder_belongs_is_told_before_training(tiny_lm: HFLM, place: str) -> None:
    experts_dir().mkdir(parents=True)
    (experts_dir() / place).write_text("mine")
    with pytest.raises(ArgumentError, match=f"{place} is a file where a training needs a folder"):
        run(tiny_lm, planted.choices())
    assert (experts_dir() / place).read_text() == "mine"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gen_kwargs": {"max_gen_toks": 4}}, "gen_kwargs is for generated answers"),
        ({"samples": 3}, "samples=3 has no effect with objective=expected-reward"),
    ],
)
def test_what_has_no_effect_on_choices_is_refused(tiny_lm: HFLM, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        run(tiny_lm, planted.choices(), **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gen_kwargs": {"max_gen_tokz": 4}}, "transformers refuses to generate with .*max_gen_tokz=4"),
        ({"normalise": "chars"}, "normalise is for choices"),
        ({"reward_partial": 0.3}, "reward_partial has no effect with reward=outcome"),
    ],
)
def test_what_does_not_fit_generated_answers_is_refused(tiny_lm: HFLM, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        run(tiny_lm, planted.texts(), **values)
    assert "\n" not in str(caught.value)


def test_a_folder_of_tasks_that_is_not_there_is_told(tiny_lm: HFLM, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"include_path=.*absent is not a folder"):
        train(make_config(task="planted", name="x"), lm=tiny_lm, include_path=tmp_path / "absent")


def test_a_classifier_names_its_labels(tiny_lm: HFLM) -> None:
    labels = planted.LETTERS[:4]
    rows = [{"q": row["q"], "choices": labels, "gold": 2} for row in planted.rows(48)]
    task = tiny.choice_task("kinds", {"training": rows, "test": planted.rows(8, start=1000)})
    manifest = load_expert(run(tiny_lm, task, kind="classifier").path).manifest
    assert (manifest.kind, manifest.labels) == ("classifier", tuple(labels))
    with pytest.raises(TaskError, match="one set of choices"):
        run(tiny_lm, planted.choices(), "mixed", kind="classifier")


@pytest.mark.parametrize("kind", ["choices", "texts"])
def test_right_answers_are_learned_token_by_token(tiny_lm: HFLM, kind: str) -> None:
    task = planted.choices() if kind == "choices" else planted.texts()
    result = run(tiny_lm, task, objective="next-token", select="reward")
    rewards = [point.reward for point in result.curve if point.split == "validation"]
    assert rewards[-1] > rewards[0] + 0.5
    assert load_expert(result.path).manifest.method == "next-token"
    unlabelled = planted.texts(doc_to_target="")
    with pytest.raises(TaskError, match="objective=next-token needs right answers"):
        run(tiny_lm, unlabelled, "none", objective="next-token")


def test_one_step_of_an_epoch_is_one_step_of_a_batch_of_all(tiny_lm: HFLM) -> None:
    values: dict[str, Any] = {"steps": 2, "validate_every": 1, "folder": experts_dir() / "epoch"}
    epoch = run(tiny_lm, planted.choices(), update="epoch", batch=3, **values)
    values["folder"] = experts_dir() / "batch"
    batch = run(tiny_lm, planted.choices(), update="batch", batch=1000, **values)
    assert [p.gradient_norm for p in epoch.curve] == [p.gradient_norm for p in batch.curve]
    z, same = load_expert(epoch.path).z, load_expert(batch.path).z
    assert all(torch.equal(z[name], same[name]) for name in z)


def test_a_sigmoid_expert_learns_and_its_file_holds_the_z_that_scores(tiny_lm: HFLM) -> None:
    task = planted.choices()
    result = run(tiny_lm, task, parametrisation="sigmoid", learning_rate=0.1)
    assert result.best_score > result.base_score
    docs = TaskDocs(task, tiny_lm)
    engine = build_engine(tiny_lm, make_config(task="planted", name="x"))
    validation = split_docs(task, 0).validation
    requests = docs.instances(validation)
    answers = docs.answer(engine, requests, (load_expert(result.path).z,))
    metrics = [docs.metrics(*one) for one in zip(validation, requests, answers, strict=True)]
    assert docs.aggregate(metrics) == pytest.approx(result.best_score)


def test_more_documents_than_a_file_can_name_are_told_before_training(
    tiny_lm: HFLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t2.core.expertfile.MAX_HEADER_BYTES", 2000)
    with pytest.raises(TrainingError, match=r"cannot name the 48 documents of planted .*--train-docs"):
        run(tiny_lm, planted.choices())
    assert not list(experts_dir().glob("*/curve.jsonl"))


def test_the_length_that_a_training_names_holds_over_the_models_own(
    tiny_lm: HFLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    answer = GenerationProblem._answer

    def noted(self: GenerationProblem, *args: Any) -> Any:
        rollouts = answer(self, *args)
        lengths.append(max(len(rollout.tokens) for rollout in rollouts))
        return rollouts

    monkeypatch.setattr(GenerationProblem, "_answer", noted)
    monkeypatch.setattr(tiny_lm.model.generation_config, "max_new_tokens", 3)
    for name, values, most in (("a", {"gen_kwargs": {"max_gen_toks": 6}}, 6), ("b", {}, 3)):
        lengths.clear()
        with contextlib.suppress(TrainingError):  # so short a training may improve nothing
            run(tiny_lm, planted.texts(), name, steps=1, batch=2, validate_every=1, samples=4, **values)
        assert max(lengths) == most
