"""A model loaded, adapted, asked, read and kept, as a notebook does."""

from __future__ import annotations

import concurrent.futures
import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import transformers

from t2.adapters.expert import load_expert
from t2.api import ChoiceExample, Example, Model, T2Error, load_model, mix, read_records
from t2.core.errors import ArgumentError, ExpertError, ExpertMismatchError, ModelError
from t2.core.manifest import unpack_hashes
from t2.harness.model import T2LM
from tests.harness import tiny

SEARCH: dict[str, Any] = {"population": 5, "generations": 2, "shots": 6, "adapt_seed": 3}
PAIRS = [("Q: 1+1\nA:", "2"), ("Q: 2+2\nA:", "4"), ("Q: 3+3\nA:", "6")]
CHOICES = [(f"Q: {i}\nA:", ["abc", "def", "gh"], i % 3) for i in range(6)]


@pytest.mark.parametrize("make", [tiny.choice_task, tiny.text_task, tiny.rolling_task])
def test_adapting_to_a_task_gives_what_lm_eval_gives(
    make: Any, model: Model, experts: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = model.adapt("cem", task=make(), experts=experts, **SEARCH)
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "other cache"))
    lm = T2LM.create_from_arg_obj(
        {"pretrained": str(tiny_folder), "adapt": "cem", "experts": experts, **SEARCH}, {"device": "cpu"}
    )
    tiny.evaluate(lm, [make()])
    (record,) = lm.records
    ours = adapted.record
    assert record.mixtures[0].alpha == adapted.alpha()
    same = ("key", "adaptation_docs", "history", "held_out", "objective", "no_signal", "note", "experts", "settings")
    assert [getattr(ours, name) for name in same] == [getattr(record, name) for name in same]


def test_an_adaptation_is_found_again_also_when_lm_eval_made_it(
    model: Model, experts: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = T2LM.create_from_arg_obj(
        {"pretrained": str(tiny_folder), "adapt": "cem", "experts": experts, **SEARCH}, {"device": "cpu"}
    )
    tiny.evaluate(lm, [tiny.choice_task()])
    capsys.readouterr()
    adapted = model.adapt("cem", task=tiny.choice_task(), experts=experts, **SEARCH)
    assert "found again" in capsys.readouterr().err
    assert adapted.alpha() == lm.records[0].mixtures[0].alpha


def test_examples_with_choices_are_scored_by_accuracy(model: Model, experts: str) -> None:
    adapted = model.adapt(examples=CHOICES, experts=experts, population=6, generations=3)
    record = adapted.record
    assert (record.strategy, record.objective.metric) == ("cem", "acc")  # type: ignore[union-attr]
    assert record.held_out is not None
    assert record.held_out.docs == len(CHOICES) == len(record.adaptation_docs)

    def accuracy(answerer: Any) -> float:
        found = [answerer.loglikelihoods(prompt, choices) for prompt, choices, _ in CHOICES]
        picked = [row.index(max(row)) for row in found]
        return sum(pick == gold for pick, (_, _, gold) in zip(picked, CHOICES, strict=True)) / 6

    assert accuracy(model) == pytest.approx(record.held_out.before)
    assert accuracy(adapted) == pytest.approx(record.held_out.after)
    assert record.held_out.after >= record.held_out.before  # type: ignore[operator]


def test_examples_with_answers_are_compared_scored_or_judged_by_likelihood(model: Model, experts: str) -> None:
    few: dict[str, Any] = {"examples": PAIRS, "experts": experts, "population": 4, "generations": 2}
    exact = model.adapt(**few)
    assert exact.record.objective.metric == "exact_match"  # type: ignore[union-attr]
    asked: list[tuple[str, str]] = []

    def score(answer: str, right: str) -> float:
        asked.append((answer, right))
        return float(len(set(answer)))

    scored = model.adapt(**few, score=score)
    assert {right for _, right in asked} == {"2", "4", "6"}
    assert all("\n" not in answer for answer, _ in asked)
    held = scored.record.held_out
    found = [len(set(scored.generate(p, max_new_tokens=9, stop=["\n"]))) for p, _ in PAIRS]
    assert held is not None
    assert held.after == pytest.approx(sum(found) / 3)
    likely = model.adapt(**few, metric="loglikelihood")
    held = likely.record.held_out
    assert held is not None
    for answerer, value in ((model, held.before), (likely, held.after)):
        each = [answerer.loglikelihoods(p, [a])[0] / len(a.encode()) for p, a in PAIRS]
        assert sum(each) / 3 == pytest.approx(value, abs=1e-4)
    assert held.after > held.before  # type: ignore[operator]


def test_a_score_of_ones_own_is_never_found_again(model: Model, experts: str) -> None:
    calls = []

    def score(answer: str, right: str) -> float:
        calls.append(answer)
        return float(len(answer))

    for _ in range(2):
        calls.clear()
        model.adapt(examples=PAIRS, experts=experts, score=score, population=3, generations=1)
        assert calls


def test_one_prompt_chooses_for_all_and_several_each_for_itself(model: Model, experts: str) -> None:
    one = model.adapt(prompts="2+2=", experts=experts)
    assert sum(one.record.dispatch.values()) == 1
    assert isinstance(one.generate("anything", max_new_tokens=3), str)
    prompts = [f"text {c}" for c in "abcdefgh"]
    each = model.adapt("prompt", prompts=prompts, experts=experts, threshold=0)
    used = {tuple(each.alpha(prompt).items()) for prompt in prompts}
    assert len(used) > 1, "the random model sends all prompts to one expert, so the test shows nothing"
    together = each.generate(prompts, max_new_tokens=6)
    assert together == [each.generate(prompt, max_new_tokens=6) for prompt in prompts]
    with pytest.raises(ArgumentError, match="was not dispatched"):
        each.generate("another text")
    with pytest.raises(ArgumentError, match="say which prompt"):
        each.alpha()


def test_a_classifier_names_domains_and_answers_nothing(model: Model, experts: str, tmp_path: Path) -> None:
    path = tmp_path / "experts" / "judge.safetensors"
    labels = ("code", "math", "reasoning", "others")
    tiny.save_expert(path, model.engine, 9, kind="classifier", labels=labels, layers=[0])
    adapted = model.adapt("classifier", prompts=["one", "two"], experts=f"{experts}+judge", threshold=0)
    assert sum(adapted.record.dispatch.values()) == 2
    assert [expert.name for expert in adapted.experts] == ["alpha", "beta", "gamma"]
    assert adapted.record.experts[-1].name == "judge"
    assert len(adapted.generate(["one", "two"], max_new_tokens=3)) == 2
    with pytest.raises(ArgumentError, match="is a classifier"):
        model.adapt("mix", experts="alpha+judge")


def test_a_fixed_mixture_answers_as_the_weights_do(model: Model, experts: str) -> None:
    adapted = model.adapt(experts=experts, alpha=[0.5, 0.25, 0.5], space="delta")
    assert adapted.alpha() == {"alpha": 0.5, "beta": 0.25, "gamma": 0.5}
    texts = ["Q: x\nA:", "some longer text"]
    base, mixed = model.generate(texts, max_new_tokens=8), adapted.generate(texts, max_new_tokens=8)
    assert base != mixed
    assert model.generate(texts, max_new_tokens=8) == base
    single = model.adapt(experts="beta")
    assert (single.record.strategy, single.alpha()) == ("expert", {"beta": 1.0})


def test_sampling_is_seeded(model: Model) -> None:
    def sample(seed: int) -> str:
        return model.generate("abc", max_new_tokens=16, do_sample=True, temperature=1.5, seed=seed)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    state = torch.get_rng_state()
    sample(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_chat_template_and_stop_texts_are_used(model: Model) -> None:
    rendered = "<system>be brief</>\n<user>hello</>\n<assistant>"
    chat = model.generate("hello", chat=True, system="be brief", max_new_tokens=8)
    assert chat == model.generate(rendered, max_new_tokens=8)
    stop = chat[3]
    assert model.generate(rendered, max_new_tokens=8, stop=[stop]) == chat.split(stop)[0]
    bare = "<user>hello</>\n<assistant>"
    assert model.loglikelihoods("hello", ["ab"], chat=True) != model.loglikelihoods(bare, ["ab"])
    with pytest.raises(ArgumentError, match="chat=True"):
        model.generate("hello", system="be brief")


@pytest.mark.parametrize("own", [2, 20])
def test_the_length_that_the_caller_names_holds_over_the_models_own(
    own: int, model: Model, experts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = model.adapt(experts="alpha")
    prompts = ["abc", "17 + 4", "x"]
    expected = [asked.generate(prompts, max_new_tokens=8) for asked in (model, adapted)]
    assert max(map(len, expected[0])) == 8
    config = model.lm.model.generation_config
    monkeypatch.setattr(config, "max_new_tokens", own)
    assert [asked.generate(prompts, max_new_tokens=8) for asked in (model, adapted)] == expected
    seen: list[str] = []

    def score(answer: str, right: str) -> float:
        seen.append(answer)
        return float(len(seen) % 2)

    model.adapt(examples=PAIRS, score=score, stop=[], max_new_tokens=6, population=2, generations=1)
    assert max(map(len, seen)) == 6
    seen.clear()
    model.adapt(examples=PAIRS, score=score, stop=[], population=2, generations=1)
    assert max(map(len, seen)) == 9  # eight more than the longest right answer
    assert config.max_new_tokens == own


def test_likelihoods_that_cannot_be_computed_are_one_line(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        T2Error, match=r"loglikelihoods: the answer ' ddd.*has .* tokens, the model takes 1 to 512"
    ) as told:
        model.loglikelihoods("a", ["d" * 600])
    assert "\n" not in str(told.value)
    with pytest.raises(T2Error, match="the prompt ' ' has no tokens"):
        model.loglikelihoods(" ", ["d"])
    monkeypatch.setattr(model.lm, "enable_thinking", True)
    with pytest.raises(T2Error, match="loglikelihoods: lm-eval computes no likelihoods with enable_thinking=True"):
        model.loglikelihoods("a", ["b"])


def test_a_space_parts_prompt_and_choice_unless_there_is_one(model: Model) -> None:
    (given,) = model.loglikelihoods("abc", [" d"])
    assert model.loglikelihoods("abc", ["d"]) == [given]
    (other,) = model.loglikelihoods("abc ", ["d"])
    assert other == pytest.approx(given, abs=1e-4)


def test_experts_are_those_of_this_base(model: Model, experts: str, tmp_path: Path) -> None:
    other = tiny.engine_of(tiny.save_model(tmp_path / "other", seed=9))
    tiny.save_expert(tmp_path / "experts" / "stranger.safetensors", other, 1)
    (tmp_path / "experts" / "broken.safetensors").write_bytes(b"x")
    found = model.experts()
    assert list(found) == ["alpha", "beta", "gamma"]
    assert found["beta"].domain == "code"


def test_a_found_mixture_is_kept_as_an_expert(model: Model, experts: str) -> None:
    adapted = model.adapt(examples=PAIRS, experts=experts, metric="loglikelihood", population=6, generations=2)
    assert adapted.alpha(), "the base stayed, so the test shows nothing"
    saved = adapted.save("found", domain="letters")
    expert = load_expert(saved.path)
    assert (expert.digest, expert.manifest.kind, expert.domain) == (saved.digest, "mixture", "letters")
    digests = {e.digest: e.name for e in adapted.experts}
    parents = {digests[parent.digest]: parent.alpha for parent in expert.manifest.parents}
    assert parents == {name: a for name, a in adapted.alpha().items() if a}
    assert set(adapted.record.adaptation_docs) <= set(unpack_hashes(expert.manifest.training_docs))
    assert expert.manifest.training["record"] == adapted.record.digest()
    warned = model.adapt("expert", experts="found", examples=PAIRS).record.overlap
    assert [(one.expert, one.scored) for one in warned] == [("found", len(PAIRS))]
    again = model.adapt("expert", experts="found")
    texts = [prompt for prompt, _ in PAIRS]
    assert again.generate(texts, max_new_tokens=6) == adapted.generate(texts, max_new_tokens=6)
    with pytest.raises(ArgumentError, match="exists"):
        adapted.save("found")


def test_an_expert_per_layer_has_the_mean_alpha_in_its_parents(model: Model, experts: str) -> None:
    few: dict[str, Any] = {"metric": "loglikelihood", "population": 6, "generations": 2}
    adapted = model.adapt(examples=PAIRS, experts=experts, per="layer", **few)
    expert = load_expert(adapted.save("layers").path)
    alpha = adapted.alpha()
    assert expert.manifest.training["alpha"] == alpha
    wanted = {e.digest: (alpha[f"{e.name}@layer0"] + alpha[f"{e.name}@layer1"]) / 2 for e in adapted.experts}
    assert {p.digest: p.alpha for p in expert.manifest.parents} == pytest.approx(wanted)


def test_mixing_needs_no_model_and_agrees_with_one(model: Model, experts: str) -> None:
    saved = mix("both", ["alpha", "beta"], [0.7, 0.6], space="delta", rank=9, layers="1")
    expert = load_expert(saved.path)
    assert [parent.alpha for parent in expert.manifest.parents] == [0.7, 0.6]
    adapted = model.adapt("mix", experts="alpha+beta", alpha="0.7+0.6", space="delta", rank=9, layers="1")
    text = "the same text"
    assert model.adapt(experts="both").generate(text) == adapted.generate(text)
    with pytest.raises(ArgumentError, match="rescale=nuclear needs"):
        mix("scaled", ["alpha", "beta"], rescale="nuclear")
    assert mix("scaled", ["alpha", "beta"], rescale="nuclear", model=model).path.exists()


def test_experts_of_two_bases_do_not_mix(model: Model, experts: str, tmp_path: Path) -> None:
    other = tiny.engine_of(tiny.save_model(tmp_path / "other", seed=9))
    tiny.save_expert(tmp_path / "experts" / "stranger.safetensors", other, 1)
    with pytest.raises(ExpertMismatchError, match="other weights"):
        mix("both", "alpha+stranger")


def test_a_merge_loads_without_t2_and_extracts_to_the_mixture(model: Model, experts: str, tmp_path: Path) -> None:
    adapted = model.adapt("mix", experts="alpha+beta", alpha=[0.6, 0.4])
    folder = adapted.merge(tmp_path / "merged")
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("Q: 17\nA:", return_tensors="pt")
    tokens = plain.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == adapted.generate("Q: 17\nA:", max_new_tokens=10)
    origin = json.loads((folder / "t2_merge.json").read_text())
    assert origin["alpha"] == {"alpha": 0.6, "beta": 0.4}
    saved = model.extract(str(folder), "back", tuned_args={"device": "cpu"})
    assert "unexplained" in saved.note
    found, wanted = load_expert(saved.path), load_expert(mix("mixed", "alpha+beta", [0.6, 0.4]).path)
    assert found.manifest.base.fingerprint == model.base.fingerprint
    for name, vector in wanted.z.items():
        sigma = model.engine.bases([name])[name].sigma
        told = sigma > 1e-3 * sigma.max()
        torch.testing.assert_close(found.z[name][told], vector[told], rtol=0, atol=1e-3)


def test_an_imported_expert_is_like_any_other(model: Model, tmp_path: Path) -> None:
    names = [name for name in model.engine.targets if "mlp" in name]
    params = {f"learnable_params_module_list.{i}": torch.randn(32).bfloat16() for i in range(len(names))}
    torch.save(params, tmp_path / "policy_params.pt")
    saved = model.import_public(tmp_path / "policy_params.pt", "theirs", domain="math", task="gsm8k")
    manifest = load_expert(saved.path).manifest
    assert (manifest.method, manifest.kind, manifest.task) == ("reinforce (public code)", "expert", "gsm8k")
    assert len(manifest.training["source_sha256"]) == 64
    assert model.adapt(experts="theirs").generate("abc") != model.generate("abc")


def test_records_are_read_from_wherever_they_lie(model: Model, experts: str, tiny_folder: Path, tmp_path: Path) -> None:
    adapted = model.adapt(experts=experts)
    adapted.write_record(tmp_path / "record.json")
    assert read_records(tmp_path / "record.json") == [adapted.record]
    (cached,) = (tmp_path / "cache" / "adaptations").glob("*.json")
    assert read_records(cached) == [adapted.record]
    args = {"pretrained": str(tiny_folder), "adapt": "mix", "experts": experts}
    results = lm_eval.simple_evaluate(
        T2LM.create_from_arg_obj(args, {"device": "cpu"}),
        tasks=[tiny.choice_task()],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    (tmp_path / "results.json").write_text(json.dumps({"config": results["config"]}, default=str))
    (record,) = read_records(tmp_path / "results.json")
    assert record.task == "tiny_choice"
    for content in ("{}", "[1]", "nonsense", '{"config": {}}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(T2Error, match=r"bad\.json"):
            read_records(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "give examples=, prompts= or task="),
        ({"examples": PAIRS, "prompts": "x"}, "not both"),
        ({"examples": []}, "there are none"),
        ({"examples": [("x", "")]}, "empty answer"),
        ({"examples": [("x", "y"), ("x", ["a"], 0)]}, "another kind"),
        ({"examples": [("x", ["a", "b"], 2)]}, "label 2 for 2 choices"),
        ({"examples": ["x"]}, "number 0 is neither"),
        ({"examples": PAIRS, "metric": "exact_mach"}, "did you mean 'exact_match'"),
        ({"examples": PAIRS, "metric": "loglikelihood", "score": lambda a, b: 1.0}, "leave one of them out"),
        ({"examples": CHOICES, "score": lambda a, b: 1.0}, "scored by acc"),
        ({"examples": PAIRS, "shots": 4}, "exceeds the 3"),
        ({"examples": PAIRS, "genertions": 4}, "did you mean 'generations'"),
        ({"examples": PAIRS, "batch": 4}, "see load_model"),
        ({"examples": PAIRS, "system": "x"}, "chat=True"),
        ({"strategy": "cme", "examples": PAIRS}, "did you mean 'cem'"),
        ({"strategy": "cem", "prompts": "x"}, "needs labels"),
        ({"strategy": "none"}, "adapts nothing"),
        ({"prompts": []}, "there are none"),
        ({"prompts": ["a", " "]}, "number 1 is empty"),
        ({"prompts": [3]}, "is 3 and no text"),
        ({"experts": ""}, "a name is empty"),
        ({"examples": [("x", [1, 2], 0)]}, "1 among its choices"),
        ({"examples": PAIRS, "max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"examples": PAIRS, "generations": 1, "population": 2, "score": lambda a, b: None}, "not a number"),
        ({"prompts": "x", "score": lambda a, b: 1.0}, "is for examples="),
        ({"experts": "alpah"}, "did you mean 'alpha'"),
        ({"experts": []}, "the list is empty"),
        ({"experts": ["alpha", "alpha"]}, "twice|same file"),
        ({"experts": "alpha+beta", "alpha": [1.0]}, "1 coefficients for the 2 experts"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments: dict[str, Any], says: str, model: Model, experts: str) -> None:
    with pytest.raises(T2Error, match=says) as caught:
        model.adapt(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompts", "arguments", "says"),
    [
        ("a", {"temprature": 1.0}, "did you mean 'temperature'"),
        ("a", {"do_sample": True, "temperature": 0.0}, "transformers refuses do_sample=True, temperature=0.0"),
        ("a", {"max_length": 5}, "give max_new_tokens"),
        ("a", {"num_return_sequences": 2}, "other seeds"),
        ("", {}, "number 0 is empty"),
        (["a", 3], {}, "3 is no text"),
        ("a", {"stop": ["b", 3]}, "stop: 3 is no text"),
        ("a", {"stop": 3}, "stop: 3 is no text"),
        ("a", {"stop": ""}, "stop: an empty text would end every answer"),
    ],
)
def test_what_generate_cannot_do_is_one_line(prompts: Any, arguments: dict[str, Any], says: str, model: Model) -> None:
    with pytest.raises(T2Error, match=says) as caught:
        model.generate(prompts, **arguments)
    assert "\n" not in str(caught.value)
    with pytest.raises(T2Error, match="a list of one or more texts"):
        model.loglikelihoods("a", "yes")


def test_equal_examples_count_once(model: Model, experts: str) -> None:
    examples = [("2+2=", "4"), ("2+2=", "4"), ("3+5=", "8")]
    adapted = model.adapt(examples=examples, metric="loglikelihood", generations=1, population=2)
    assert len(adapted.record.adaptation_docs) == 2


def test_threads_take_turns(model: Model, experts: str) -> None:
    asked = [model, model.adapt(experts="alpha"), model.adapt(experts="beta")]
    alone = [one.generate("hello", max_new_tokens=12) for one in asked]
    assert len(set(alone)) == 3
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda one: one.generate("hello", max_new_tokens=12), asked * 4))
    assert found == alone * 4
    assert model.generate("hello", max_new_tokens=12) == alone[0]


def test_a_model_that_does_not_load_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="missing"):
        load_model(str(tmp_path / "missing"))
    with pytest.raises(ArgumentError, match="did you mean 'dtype'"):
        load_model(dtyp="float32")


def test_an_expert_that_changes_nothing_is_an_error(tiny_folder: Path, tmp_path: Path) -> None:
    coarse = load_model(str(tiny_folder), device="cpu", dtype="bfloat16")
    tiny.save_expert(tmp_path / "experts" / "faint.safetensors", coarse.engine, 0, scale=1e-6)
    with pytest.raises(ExpertError, match="unchanged"):
        coarse.adapt(experts="faint")


def test_classes_and_tuples_are_the_same(model: Model, experts: str) -> None:
    few: dict[str, Any] = {"experts": experts, "population": 3, "generations": 1}
    tuples = model.adapt(examples=CHOICES, **few)
    classes = model.adapt(examples=[ChoiceExample(p, tuple(c), i) for p, c, i in CHOICES], **few)
    assert classes.record.key == tuples.record.key
    pairs = model.adapt(examples=[Example(p, a) for p, a in PAIRS], **few)
    assert pairs.record.key == model.adapt(examples=PAIRS, **few).record.key
