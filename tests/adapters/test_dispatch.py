"""Dispatch by domain: what is asked, what a confidence is worth, and what happens where it is too low."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from t2.adapters.engine.base import GenerateRequest, ScoreRequest
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Expert, mix
from t2.adapters.strategies import STRATEGIES, DomainPrompts, Job, Options
from t2.adapters.strategies.calibration import fit_temperature, fit_threshold, tenths
from t2.adapters.strategies.dispatch import Route, route
from t2.adapters.strategies.question import HEAD, TAIL, clip, parse, question
from t2.core.errors import ArgumentError
from t2.core.manifest import Manifest
from tests.adapters.conftest import expert_of, make_tokenizer, random_z

PROMPTS = [f"{word} {i}" for i in range(6) for word in ("the", "stop", "zz ab", "7+8")]
HELD_OUT = DomainPrompts(
    tuple(
        (f"{word} {i} ?", domain)
        for i in range(4)
        for word, domain in (("the", "math"), ("7*", "code"), ("ab", "others"))
    ),
    {"math": "made up", "code": "made up", "others": "made up"},
)


def encode(text: str) -> list[int]:
    tokens: list[int] = make_tokenizer().encode(text, add_special_tokens=False)
    return tokens


def job(
    engine: TransformersEngine, experts: Sequence[Expert], *, held_out: DomainPrompts | None = HELD_OUT, **options: Any
) -> Job:
    fields = {name: options.pop(name) for name in ("classifier", "prompts") if name in options}
    return Job(
        "tiny",
        fields.get("prompts", PROMPTS),
        experts,
        engine,
        Options(**options),
        lambda context, continuation: (encode(context), encode(continuation)),
        lambda text: text,
        progress=False,
        classifier=fields.get("classifier"),
        held_out=None if held_out is None else lambda labels, by: held_out,
        template=lambda text: f"<{text}>",
        decode=lambda tokens: str(make_tokenizer().decode(list(tokens))),
    )


@pytest.fixture(scope="module")
def experts(llama: TransformersEngine) -> list[Expert]:
    return [expert_of(llama, f"e{i}", random_z(llama, i), domain) for i, domain in enumerate(("math", "code"))]


def classifier_of(
    engine: TransformersEngine, labels: Sequence[str] = ("math", "code", "others"), chat: bool = False
) -> Expert:
    expert = expert_of(engine, "names", random_z(engine, 9))
    manifest = expert.manifest.model_copy(
        update={"kind": "classifier", "labels": tuple(labels), "training": {"apply_chat_template": chat}}
    )
    return Expert(Manifest.model_validate(manifest.model_dump()), expert.z, "c" * 64)


def posteriors(found: Route, work: Job, prior: bool = True) -> dict[str, list[float]]:
    """The posterior of each prompt by the rule of the documentation, one likelihood at a time."""
    labels, temperature = found.calibration.labels, found.calibration.temperature
    assert temperature is not None

    def score(text: str, label: str) -> float:
        request = ScoreRequest(tuple(encode(question(text, labels))), tuple(encode(f" {label}")))
        return work.engine.score([request])[0].loglikelihood

    base = [score("", label) if prior else 0.0 for label in labels]
    table = {
        t: [score(t, label) - b for label, b in zip(labels, base, strict=True)] for t in dict.fromkeys(work.prompts)
    }
    return {t: torch.softmax(torch.tensor(row) / temperature, 0).tolist() for t, row in table.items()}


def test_decisions_below_the_threshold_get_the_mixture_of_their_posterior(
    llama: TransformersEngine, experts: list[Expert]
) -> None:
    free = job(llama, experts, held_out=None, threshold=0.0)
    expected = posteriors(route(free, PROMPTS), free)
    level = sorted(map(max, expected.values()))[len(PROMPTS) // 2]
    work = job(llama, experts, held_out=None, threshold=level - 1e-4)
    found = route(work, work.prompts)
    assert 0 < found.calibration.below < len(PROMPTS), "all or none are below, which shows little"
    for text, row, name, low in zip(PROMPTS, found.rows, found.named, found.below, strict=True):
        choice, posterior = found.choices[row], dict(zip(found.calibration.labels, expected[text], strict=True))
        assert name == max(posterior, key=posterior.__getitem__)
        assert low == (posterior[name] < level - 1e-4)
        if low:
            share = dict(zip(posterior, tenths(list(posterior.values())), strict=True))
            alpha = {"e0": share["math"] / 10, "e1": share["code"] / 10}
            assert {n: choice.alpha.get(n, 0.0) for n in alpha} == pytest.approx(alpha)
            assert choice.alpha.get("(base)", 0.0) == pytest.approx(share["others"] / 10)
            if choice.z is not None:
                z = mix([e.z for e in experts], list(alpha.values()), "delta")
                assert all(torch.allclose(choice.z[n], z[n], atol=1e-6) for n in z)
        else:
            assert choice.alpha == {"math": {"e0": 1.0, "e1": 0.0}, "code": {"e0": 0.0, "e1": 1.0}, "others": {}}[name]


def test_a_threshold_of_nought_never_falls_back_and_of_one_nearly_always(
    llama: TransformersEngine, experts: list[Expert]
) -> None:
    never = route(job(llama, experts, threshold=0.0), PROMPTS)
    always = route(job(llama, experts, threshold=1.0, fallback="base"), PROMPTS)
    assert never.calibration.below == 0
    assert not any(never.below)
    assert always.calibration.below == len(PROMPTS)
    assert {always.choices[row].z for row in always.rows} == {None}
    assert always.named == never.named


def test_the_threshold_and_the_confusion_come_from_the_held_out_prompts(
    llama: TransformersEngine, experts: list[Expert]
) -> None:
    work = job(llama, experts)
    plan = STRATEGIES["prompt"]().plan(work)
    found = plan.calibration
    assert found is not None
    named = route(replace(work, options=Options(threshold=0.0)), [text for text, _ in HELD_OUT.prompts]).named
    hits = [name == domain for name, (_, domain) in zip(named, HELD_OUT.prompts, strict=True)]
    assert (found.docs, found.accuracy) == (12, sum(hits) / 12)
    for domain, row in found.confusion.items():
        own = [name for name, (_, d) in zip(named, HELD_OUT.prompts, strict=True) if d == domain]
        assert row == {label: own.count(label) for label in found.labels}
    held = posteriors(route(work, PROMPTS), replace(work, prompts=[text for text, _ in HELD_OUT.prompts]))
    assert found.threshold == pytest.approx(
        fit_threshold([max(held[text]) for text, _ in HELD_OUT.prompts], hits), abs=1e-4
    )
    assert found.sources == HELD_OUT.sources
    assert plan.dispatch == {label: sum(n == label for n in route(work, PROMPTS).named) for label in found.labels}


def test_without_held_out_prompts_every_decision_stands(llama: TransformersEngine, experts: list[Expert]) -> None:
    found = route(job(llama, experts, held_out=None), PROMPTS).calibration
    assert (found.threshold, found.temperature, found.docs, found.accuracy, found.below) == (0.0, 1.0, 0, None, 0)


def test_jobs_that_share_a_memory_ask_the_held_out_prompts_once(
    llama: TransformersEngine, experts: list[Expert]
) -> None:
    asked: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(llama, name)

        def score(self, requests: Sequence[ScoreRequest], **kwargs: Any) -> Any:
            asked.append(len(requests))
            return llama.score(requests, **kwargs)

    counting: Any = Counting()
    work = replace(job(llama, experts), engine=counting)
    first = route(work, PROMPTS)
    again = route(work, [*PROMPTS, "one more"])
    assert asked == [3 * (1 + len(HELD_OUT.prompts)), 3 * len(PROMPTS), 3]
    assert again.named[:-1] == first.named
    assert again.calibration.docs_digest == first.calibration.docs_digest


def test_a_memory_does_not_mix_up_two_forms_of_a_question(llama: TransformersEngine, experts: list[Expert]) -> None:
    work = job(llama, experts)
    other = replace(work, render=lambda text: f"zz {text} abc")
    fresh = route(replace(other, memory={}), PROMPTS)
    route(work, PROMPTS)
    again = route(other, PROMPTS)
    assert (again.named, again.rows, again.calibration) == (fresh.named, fresh.rows, fresh.calibration)


@pytest.mark.parametrize("chat", [False, True], ids=["as trained plainly", "as trained with the chat template"])
def test_a_classifier_is_asked_in_its_own_form_and_without_a_prior(
    chat: bool, llama: TransformersEngine, experts: list[Expert]
) -> None:
    classifier = classifier_of(llama, chat=chat)
    work = job(llama, experts, classifier=classifier, threshold=0.0)
    plan = STRATEGIES["classifier"]().plan(work)
    labels = classifier.manifest.labels
    for text, row in zip(PROMPTS, plan.rows, strict=True):
        context = question(text, labels)
        requests = [
            ScoreRequest(tuple(encode(f"<{context}>" if chat else context)), tuple(encode(f" {label}")))
            for label in labels
        ]
        scores = [found.loglikelihood for found in llama.score(requests, [classifier.z])]
        named = labels[scores.index(max(scores))]
        assert plan.choices[row].alpha.get({"math": "e0", "code": "e1"}.get(named, ""), 0.0) == float(named != "others")
        assert (plan.choices[row].z is None) == (named == "others")
    base = STRATEGIES["prompt"]().plan(replace(work, classifier=classifier))
    assert base.rows != plan.rows, "the classifier names what the base names, which shows little"


def test_a_label_without_an_expert_goes_to_the_base(llama: TransformersEngine, experts: list[Expert]) -> None:
    seen = set()
    for labels in (("math", "code", "others"), ("code", "math", "art"), ("x", "math", "code")):
        work = job(llama, experts, classifier=classifier_of(llama, labels), held_out=None)
        found = route(work, PROMPTS)
        seen |= set(found.named)
        for row, name in zip(found.rows, found.named, strict=True):
            assert (found.choices[row].z is None) == (name not in ("math", "code"))
    assert seen & {"math", "code"}, "no domain of an expert is ever named, which shows little"
    assert seen - {"math", "code"}, "only domains of experts are named, which shows little"


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (
            ["code", "others"],
            {},
            "expert e0 is for math, which is no label of the classifier names (code, others); leave",
        ),
        (
            ["code", "math"],
            {"dispatch": "generate"},
            "dispatch=generate needs the label 'others' for answers that name no",
        ),
        (None, {}, "adapt=classifier needs an expert of kind classifier; train one on t2_domains"),
    ],
)
def test_a_classifier_that_does_not_fit_is_told(
    labels: list[str] | None, options: dict[str, Any], message: str, llama: TransformersEngine, experts: list[Expert]
) -> None:
    classifier = classifier_of(llama, labels) if labels is not None else None
    with pytest.raises(ArgumentError) as caught:
        STRATEGIES["classifier"]().plan(job(llama, experts, classifier=classifier, **options))
    assert str(caught.value).startswith(message)


def test_generated_answers_are_parsed_and_count_as_others_where_they_name_nothing(
    llama: TransformersEngine, experts: list[Expert]
) -> None:
    work = job(llama, experts, dispatch="generate")
    found = route(work, PROMPTS[:4])
    labels = found.calibration.labels
    for text, name in zip(PROMPTS[:4], found.named, strict=True):
        request = GenerateRequest(tuple(encode(question(text, labels))), 16, ("\n",), {"do_sample": False})
        answer = str(make_tokenizer().decode(list(llama.generate([request])[0].tokens)))
        assert name == (parse(answer, labels) or "others")
    assert found.calibration.threshold is None
    assert found.calibration.unparsed == sum(name == "others" for name in found.named)
    assert sum(sum(row.values()) for row in found.calibration.confusion.values()) == 12


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        (" math.", "math"),
        ("It is Code, I think, or math", "code"),
        ("code? No: \\boxed{ math }", "math"),
        ("mathematics", None),
        ("decode it", None),
        ("", None),
        ("OTHERS", "others"),
    ],
)
def test_an_answer_names_a_label_as_a_word(answer: str, label: str | None) -> None:
    assert parse(answer, ["code", "math", "others"]) == label


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(2000))
    assert clip(text) == f"{text[:HEAD]} … {text[-TAIL:]}"
    assert clip(f"  {text[: HEAD + TAIL]}\n") == text[: HEAD + TAIL]
    asked = question("how", ["cooking", "others"])
    assert "- cooking: a problem of the field cooking\n- others: anything else\n" in asked
    assert asked.index("Text: how") > asked.index("- others")


def test_the_temperature_is_that_of_the_likeliest_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 4, generator=generator) * 2
    right = torch.multinomial(torch.softmax(logits, 1), 1, generator=generator).flatten().tolist()
    assert fit_temperature(logits * 3, right) == pytest.approx(3, rel=0.05)
    assert fit_temperature(logits / 5, right) == pytest.approx(0.2, rel=0.05)
    # All right on few prompts is no reason for certainty.
    sure = torch.eye(4).repeat(2, 1) * 5
    found = torch.softmax(sure / fit_temperature(sure, [0, 1, 2, 3] * 2), 1).max()
    assert float(found) == pytest.approx((8 + 1) / (8 + 4), abs=1e-3)


@pytest.mark.parametrize(
    ("decisions", "threshold"),
    [
        ([(0.9, True), (0.8, True), (0.4, True)], 0.0),
        ([(0.9, True), (0.8, True), (0.4, False), (0.3, False)], 0.6),
        ([(0.9, False), (0.4, False)], 1.0),
        ([(0.9, True), (0.8, False), (0.7, True)], 0.0),
        ([(0.9, True), (0.6, False), (0.6, True), (0.6, False)], 0.75),
        ([], 0.0),
    ],
)
def test_chows_rule_keeps_what_is_more_often_right_than_wrong(
    decisions: list[tuple[float, bool]], threshold: float
) -> None:
    found = fit_threshold([confidence for confidence, _ in decisions], [hit for _, hit in decisions])
    assert found == pytest.approx(threshold)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=30))
def test_no_other_threshold_keeps_more_right_than_wrong_decisions(decisions: list[tuple[float, bool]]) -> None:
    def gain(threshold: float) -> int:
        return sum(1 if hit else -1 for confidence, hit in decisions if confidence >= threshold)

    found = fit_threshold([confidence for confidence, _ in decisions], [hit for _, hit in decisions])
    kept = gain(found) if found < 1 else max(gain(found), 0)
    assert all(kept >= gain(confidence) for confidence, _ in decisions)


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=6))
def test_tenths_sum_to_ten_and_lie_next_to_the_posterior(weights: list[float]) -> None:
    posterior = [weight / math.fsum(weights) for weight in weights]
    found = tenths(posterior)
    assert sum(found) == 10
    assert all(abs(tenth - 10 * p) < 1 + 1e-6 for tenth, p in zip(found, posterior, strict=True))
