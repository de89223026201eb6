"""Strategies on a tiny model: which mixture answers which prompt, what a search asks for, and what misuse is told."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from t2.adapters.engine.base import ScoreRequest
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Expert, Z, keep_leading, mix, rescale_nuclear
from t2.adapters.strategies import STRATEGIES, Job, Options, Plan, Score
from t2.adapters.strategies.question import question
from t2.core.errors import ArgumentError
from tests.adapters.conftest import expert_of, make_tokenizer, random_z

UP, Q1 = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"


def encode(text: str) -> list[int]:
    tokens: list[int] = make_tokenizer().encode(text, add_special_tokens=False)
    return tokens


def encode_pair(context: str, continuation: str) -> tuple[list[int], list[int]]:
    return encode(context), encode(continuation)


def corners(engine: TransformersEngine) -> list[Expert]:
    """Two experts that each move a matrix of their own, so that z tells α: z = 1 + α in the delta space."""
    two = {name: torch.full((engine.ranks()[name],), 2.0) for name in (UP, Q1)}
    return [
        expert_of(engine, "a", {UP: two[UP], Q1: torch.ones_like(two[Q1])}, "math"),
        expert_of(engine, "b", {UP: torch.ones_like(two[UP]), Q1: two[Q1]}, "code"),
    ]


def job(engine: TransformersEngine, experts: Sequence[Expert], scorer: Any = None, **fields: Any) -> Job:
    prompts = fields.pop("prompts", ["one", "two", "three"])
    render = fields.pop("render", lambda text: text)
    return Job("tiny", prompts, experts, engine, Options(**fields), encode_pair, render, scorer, progress=False)


class Landscape:
    """A scorer over α, read off z in the delta space; the base is α = 0."""

    docs = 7
    prompts = ("",) * 7
    bounds: tuple[float, float] | None = None

    def __init__(
        self,
        value: Callable[[float, float], float],
        tie: Callable[[float, float], float] = lambda a, b: -1.0,
        higher_is_better: bool = True,
    ) -> None:
        self.value, self.tie, self.higher_is_better = value, tie, higher_is_better
        self.seen: list[tuple[float, float]] = []
        self.tied: list[tuple[float, float]] = []

    @staticmethod
    def alpha(z: Z | None) -> tuple[float, float]:
        return (0.0, 0.0) if z is None else (round(float(z[UP][0]) - 1, 4), round(float(z[Q1][0]) - 1, 4))

    def evaluate(self, mixtures: Sequence[Z | None]) -> list[Score]:
        alphas = [self.alpha(z) for z in mixtures]
        self.seen += alphas
        return [Score(self.value(*alpha)) for alpha in alphas]

    def tie_break(self, mixtures: Sequence[Z | None]) -> list[float]:
        alphas = [self.alpha(z) for z in mixtures]
        assert set(alphas) <= set(self.seen)
        self.tied += alphas
        return [self.tie(*alpha) for alpha in alphas]


def search(engine: TransformersEngine, scorer: Landscape, **options: Any) -> Plan:
    settings: dict[str, Any] = {"population": 12, "generations": 30, "space": "delta", **options}
    return STRATEGIES["cem"]().plan(job(engine, corners(engine), scorer, **settings))


def distance(a: float, b: float) -> float:
    return math.hypot(a - 0.9, b - 0.3)


def test_a_search_finds_the_best_mixture(llama: TransformersEngine) -> None:
    scorer = Landscape(lambda a, b: -distance(a, b))
    plan = search(llama, scorer, generations=60)
    (choice,) = plan.choices
    assert plan.rows == (0, 0, 0)
    assert choice.alpha == pytest.approx({"a": 0.9, "b": 0.3}, abs=0.03)
    assert Landscape.alpha(choice.z) == pytest.approx(tuple(choice.alpha.values()))
    assert plan.held_out is not None
    assert plan.held_out.docs == 7
    assert plan.held_out.before == pytest.approx(-distance(0, 0))
    assert plan.held_out.after == max(-distance(*alpha) for alpha in scorer.seen)
    assert not plan.no_signal
    assert plan.note.startswith(f"best of {len(scorer.seen)} mixtures in {len(plan.history)} generations; ")


def test_no_candidate_is_evaluated_twice(llama: TransformersEngine) -> None:
    # Rounded, so that candidates repeat; the base and the starts are among them.
    scorer = Landscape(lambda a, b: -round(distance(a, b), 2))
    plan = search(llama, scorer, population=30, generations=40)
    assert len(scorer.seen) == len(set(scorer.seen))
    assert len(scorer.tied) == len(set(scorer.tied))
    assert len(scorer.seen) == 1 + sum(generation.evaluations for generation in plan.history)
    assert any(generation.evaluations < 30 for generation in plan.history)


def test_base_experts_and_their_mean_are_always_candidates(llama: TransformersEngine) -> None:
    scorer = Landscape(lambda a, b: -distance(a, b))
    search(llama, scorer, generations=1, population=4)
    assert scorer.seen[:4] == [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]
    assert len(scorer.seen) == 5


def test_the_history_tells_the_course(llama: TransformersEngine) -> None:
    scorer = Landscape(lambda a, b: -distance(a, b))
    plan = search(llama, scorer, generations=6)
    assert len(plan.history) == 6
    best = [generation.best for generation in plan.history]
    assert best == sorted(best)  # type: ignore[type-var]
    assert plan.held_out is not None
    assert best[-1] == plan.held_out.after
    first = [-distance(*alpha) for alpha in scorer.seen[1:13]]
    assert plan.history[0].mean == pytest.approx(sum(first) / 12)


def test_likelihood_decides_among_equal_scores(llama: TransformersEngine) -> None:
    """The score only tells the base from mixtures, so the tie-break alone leads to the best of them."""
    plan = search(llama, Landscape(lambda a, b: float((a, b) != (0, 0)), lambda a, b: -distance(a, b)), generations=60)
    assert plan.choices[0].alpha == pytest.approx({"a": 0.9, "b": 0.3}, abs=0.03)
    assert plan.held_out is not None
    assert (plan.held_out.before, plan.held_out.after) == (0, 1)


def test_a_mixture_that_ties_with_the_base_needs_the_better_likelihood(llama: TransformersEngine) -> None:
    def value(a: float, b: float) -> float:
        return float(a < 0.5)

    better = search(llama, Landscape(value, lambda a, b: -5 if (a, b) == (0, 0) else -1))
    worse = search(llama, Landscape(value, lambda a, b: -1 if (a, b) == (0, 0) else -5))
    assert better.choices[0].z is not None
    assert worse.choices[0].z is None
    assert worse.note.startswith("no mixture beats the base")
    # All else equal, the base.
    assert search(llama, Landscape(value)).choices[0].z is None


def test_without_signal_the_base_stays(llama: TransformersEngine) -> None:
    scorer = Landscape(lambda a, b: 0.0)
    plan = search(llama, scorer)
    assert plan.no_signal
    assert plan.choices[0].z is None
    assert plan.choices[0].alpha == {}
    assert plan.note == (
        "NO SIGNAL: every mixture scores 0 on the adaptation docs, so the base stays "
        "(13 mixtures in 1 generations; all of them tied, likelihoods too)"
    )
    assert plan.held_out is not None
    assert (plan.held_out.before, plan.held_out.after) == (0, 0)


def test_equal_scores_are_no_signal_whatever_the_likelihoods_say(llama: TransformersEngine) -> None:
    plan = search(llama, Landscape(lambda a, b: 0.25, lambda a, b: a), generations=3)
    assert plan.no_signal
    assert plan.choices[0].z is None
    assert len(plan.history) == 3


def test_the_base_stays_where_nothing_is_better(llama: TransformersEngine) -> None:
    plan = search(llama, Landscape(lambda a, b: -math.hypot(a, b)))
    assert plan.choices[0].z is None
    assert not plan.no_signal
    assert plan.note.startswith("no mixture beats the base (")
    assert plan.held_out is not None
    assert plan.held_out.before == plan.held_out.after == 0


def test_records_of_a_lower_is_better_metric_have_its_own_sign(llama: TransformersEngine) -> None:
    """Scores are signed for the search, so a perplexity of 3 arrives as −3."""
    plan = search(llama, Landscape(lambda a, b: -1 - distance(a, b), higher_is_better=False))
    assert plan.held_out is not None
    assert plan.held_out.before == pytest.approx(1 + distance(0, 0))
    assert 1 <= plan.held_out.after < plan.held_out.before  # type: ignore[operator]
    best = [generation.best for generation in plan.history]
    assert best == sorted(best, reverse=True)  # type: ignore[type-var]
    assert all(generation.mean >= generation.best for generation in plan.history)  # type: ignore[operator]


def test_a_metric_that_is_no_number_loses(llama: TransformersEngine) -> None:
    scorer = Landscape(lambda a, b: math.nan if a > 0.6 else -distance(a, b))
    plan = search(llama, scorer)
    assert plan.choices[0].alpha["a"] <= 0.6
    assert all(generation.mean is not None and math.isfinite(generation.mean) for generation in plan.history)
    nothing = search(llama, Landscape(lambda a, b: math.nan))
    assert nothing.no_signal
    assert nothing.history[0].best is None


def test_coefficients_that_cannot_be_normalised_lose_without_ending_the_search(llama: TransformersEngine) -> None:
    one = {UP: torch.full((llama.ranks()[UP],), 2.0), Q1: torch.ones(llama.ranks()[Q1])}
    cancels = expert_of(llama, "c", {UP: -one[UP], Q1: one[Q1]}, "code")
    experts = [expert_of(llama, "a", {**one, Q1: torch.full_like(one[Q1], 2.0)}, "math"), cancels]
    scorer = Landscape(lambda a, b: -distance(a, b))
    settings = {"population": 4, "generations": 3, "rescale": "nuclear"}
    # Their mean takes one matrix to zero.
    plan = STRATEGIES["cem"]().plan(job(llama, experts, scorer, **settings))
    assert len(plan.history) == 3
    assert all(generation.mean is not None for generation in plan.history)
    with pytest.raises(ArgumentError, match="norm zero"):
        STRATEGIES["mix"]().plan(job(llama, experts, rescale="nuclear"))


def test_the_seed_and_the_task_decide_a_search(llama: TransformersEngine) -> None:
    def plan(seed: int) -> Plan:
        return search(llama, Landscape(lambda a, b: -distance(a, b)), seed=seed, generations=4)

    assert plan(1).choices[0].alpha == plan(1).choices[0].alpha
    assert plan(1).history == plan(1).history
    assert plan(1).history != plan(2).history


@pytest.mark.parametrize(
    ("per", "labels"),
    [
        ("layer", ["a@layer0", "b@layer0", "a@layer1", "b@layer1"]),
        ("matrix", [f"{name}@{matrix.removesuffix('.weight')}" for matrix in (UP, Q1) for name in "ab"]),
    ],
)
def test_every_group_may_have_coefficients_of_its_own(per: Any, labels: list[str], llama: TransformersEngine) -> None:
    scorer = Landscape(lambda a, b: -math.hypot(a - 0.9, b + 0.5))
    plan = search(llama, scorer, per=per, generations=60, population=24)
    (choice,) = plan.choices
    assert list(choice.alpha) == labels
    assert Landscape.alpha(choice.z) == pytest.approx((0.9, -0.5), abs=0.05)
    assert scorer.seen[:4] == [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]


@pytest.mark.parametrize("name", ["none", "expert", "mix"])
def test_a_fixed_choice_answers_every_prompt(name: str, llama: TransformersEngine) -> None:
    experts = corners(llama)[:1]
    plan = STRATEGIES[name]().plan(job(llama, experts))
    assert len(plan.choices) == 1
    assert plan.rows == (0, 0, 0)
    assert plan.held_out is None
    z = plan.choices[0].z
    if name == "none":
        assert z is None
        assert plan.choices[0].alpha == {}
    else:
        assert z is not None
        assert plan.choices[0].alpha == {"a": 1.0}
        assert all(torch.equal(z[matrix], experts[0].z[matrix]) for matrix in experts[0].z)


def test_a_mixture_is_the_given_one_or_uniform(llama: TransformersEngine) -> None:
    experts = [expert_of(llama, name, random_z(llama, seed)) for seed, name in enumerate("abc")]
    parts = [expert.z for expert in experts]
    given = STRATEGIES["mix"]().plan(job(llama, experts, alpha=(0.5, 0.0, -1.0)))
    uniform = STRATEGIES["mix"]().plan(job(llama, experts))
    assert given.choices[0].alpha == {"a": 0.5, "b": 0.0, "c": -1.0}
    assert uniform.choices[0].alpha == pytest.approx(dict.fromkeys("abc", 1 / 3))
    assert (given.note, uniform.note) == ("the given mixture", "the uniform mixture")
    for plan, alpha in ((given, [0.5, 0, -1]), (uniform, [1 / 3] * 3)):
        z = plan.choices[0].z
        assert z is not None
        assert all(torch.equal(vector, z[name]) for name, vector in mix(parts, alpha).items())


def test_options_are_applied_in_their_order(llama: TransformersEngine) -> None:
    experts = [expert_of(llama, name, random_z(llama, seed)) for seed, name in enumerate("ab")]
    options: dict[str, Any] = {
        "alpha": (1.0, 2.0),
        "space": "delta",
        "normalise": "sum",
        "rank": 5,
        "rescale": "nuclear",
    }
    z = STRATEGIES["mix"]().plan(job(llama, experts, **options)).choices[0].z
    mixed = keep_leading(mix([expert.z for expert in experts], [1, 2], "delta", "sum"), 5)
    expected = rescale_nuclear(mixed, llama.bases(mixed))
    assert z is not None
    assert all(torch.equal(z[name], expected[name]) for name in expected)


def labelled(engine: TransformersEngine, prompt: str, labels: Sequence[str], render: Callable[[str], str]) -> str:
    """The domain of a prompt by the rule of the documentation, one likelihood at a time."""

    def likelihood(text: str, label: str) -> float:
        context = encode(render(question(text, labels)))
        return engine.score([ScoreRequest(tuple(context), tuple(encode(f" {label}")))])[0].loglikelihood

    return max(labels, key=lambda label: likelihood(prompt, label) - likelihood("", label))


@pytest.mark.parametrize("render", [lambda text: text, lambda text: f"<user>{text}</>"], ids=["plain", "chat"])
def test_prompts_go_to_the_expert_of_their_domain(render: Callable[[str], str], llama: TransformersEngine) -> None:
    prompts = [f"{word} {i}" for i in range(8) for word in ("the", "stop", "zz ab", "7+8")]
    domains = ["math", "code", "cooking"]
    experts = [expert_of(llama, f"e{i}", random_z(llama, i), domain) for i, domain in enumerate(domains)]
    plan = STRATEGIES["prompt"]().plan(job(llama, experts, prompts=[*prompts, prompts[0]], render=render))
    labels = ["code", "cooking", "math", "others"]
    assert [choice.alpha for choice in plan.choices] == [
        {"e0": 0.0, "e1": 1.0, "e2": 0.0},
        {"e0": 0.0, "e1": 0.0, "e2": 1.0},
        {"e0": 1.0, "e1": 0.0, "e2": 0.0},
        {},
    ]
    assert plan.choices[-1].z is None
    named = [labelled(llama, prompt, labels, render) for prompt in prompts]
    assert [labels[row] for row in plan.rows] == [*named, named[0]]
    assert len(set(named)) > 1, "the prompts are of one domain, which shows little"
    assert plan.dispatch == {label: [*named, named[0]].count(label) for label in labels}
    shown = ", ".join(f"{count} {label}" for label, count in plan.dispatch.items() if count)
    assert plan.note == f"prompts by domain: {shown}"


def test_several_experts_of_a_domain_count_as_their_mean(llama: TransformersEngine) -> None:
    zs = [random_z(llama, seed) for seed in range(3)]
    experts = [
        expert_of(llama, f"e{i}", z, domain)
        for i, (z, domain) in enumerate(zip(zs, ["math", "code", "math"], strict=True))
    ]
    plan = STRATEGIES["prompt"]().plan(job(llama, experts))
    assert [choice.alpha for choice in plan.choices] == [
        {"e0": 0.0, "e1": 1.0, "e2": 0.0},
        {"e0": 0.5, "e1": 0.0, "e2": 0.5},
        {},
    ]
    z = plan.choices[1].z
    assert z is not None
    assert all(torch.allclose(z[name], (zs[0][name] + zs[2][name]) / 2) for name in z)


@pytest.mark.parametrize(
    ("strategy", "domains", "options", "message"),
    [
        ("expert", ["math", "code"], {}, "adapt=expert applies one expert, experts=e0+e1 are 2; name one"),
        ("expert", [], {}, "adapt=expert applies one expert, experts= are 0"),
        (
            "mix",
            ["math", "code"],
            {"alpha": (1.0,)},
            "alpha has 1 coefficients for the 2 experts e0+e1; give one for each",
        ),
        ("mix", ["a", "b"], {"alpha": (1.0, -1.0), "normalise": "sum"}, "alpha sums to zero"),
        ("prompt", ["math", None], {}, "adapt=prompt needs experts with a domain, e1 has none"),
        ("prompt", ["others"], {}, "expert e0: the domain 'others' stands for the base model"),
        ("cem", ["math"], {}, "adapt=cem needs labelled adaptation docs"),
    ],
)
def test_misuse_is_told(
    strategy: str, domains: list[str | None], options: dict[str, Any], message: str, llama: TransformersEngine
) -> None:
    experts = [expert_of(llama, f"e{i}", random_z(llama, i), domain) for i, domain in enumerate(domains)]
    with pytest.raises(ArgumentError) as caught:
        STRATEGIES[strategy]().plan(job(llama, experts, **options))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("options", [{"population": 0}, {"generations": 0}, {"elite": 2.0}])
def test_a_search_setting_out_of_range_is_told_before_anything_is_scored(
    options: dict[str, Any], llama: TransformersEngine
) -> None:
    scorer = Landscape(lambda a, b: 0.0)
    with pytest.raises(ArgumentError, match=next(iter(options))):
        search(llama, scorer, **options)
    assert scorer.seen == []


def test_strategies_say_what_they_need() -> None:
    needs = {name: (strategy().needs_experts, strategy().needs_labels) for name, strategy in STRATEGIES.items()}
    assert needs == {
        "none": (False, False),
        "expert": (True, False),
        "mix": (True, False),
        "prompt": (True, False),
        "classifier": (True, False),
        "cem": (True, True),
        "auto": (True, True),
        "best": (True, True),
        "peft": (False, False),
    }
