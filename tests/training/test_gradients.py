"""The gradients of a training step on a real (tiny) model: against differences, and against exact sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from t2.adapters.engine.likelihood import Branches
from t2.core.seeds import derive_seed
from t2.training.api import build_problem
from t2.training.choices import ChoiceProblem
from t2.training.config import make_config
from t2.training.methods import build_engine
from t2.training.objective import choice_kl, expected_reward, vocabulary_kl
from t2.training.problem import Measured
from t2.training.rollouts import GenerationProblem
from t2.training.split import batch_docs, split_docs
from tests.harness import tiny
from tests.training import planted

REPEATS = 40


def problem_of(lm: HFLM, task: ConfigurableTask, **values: Any) -> Any:
    config = make_config(task=str(task.task_name), name="x", **values)
    return build_problem(config, build_engine(lm, config), lm, task, split_docs(task, 0))


def random_z(problem: Any, scale: float = 0.1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: 1 + scale * torch.randn(rank, generator=generator) for name, rank in problem.setup.engine.ranks().items()
    }


def leaves(z: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: vector.clone().requires_grad_() for name, vector in z.items()}


def flat(z: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([torch.zeros_like(v) if v.grad is None else v.grad for v in z.values()]).double()


def gradient(
    problem: Any, z: Mapping[str, torch.Tensor], docs: list[int], step: int = 0
) -> tuple[torch.Tensor, Measured]:
    """The gradient of what is maximised."""
    grown = leaves(z)
    measured = problem.accumulate(grown, docs, step)
    return -flat(grown), measured


def directions(size: int, count: int) -> torch.Tensor:
    drawn = torch.randn(count, size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return drawn / drawn.norm(dim=1, keepdim=True)


@torch.no_grad()
def choice_objective(problem: ChoiceProblem, z: Mapping[str, torch.Tensor], docs: list[int], kl: float) -> float:
    picked = problem._training_docs(docs)
    base = [scores for scores, _ in problem._run(picked)]
    with problem.setup.engine.activation([z]):
        found = [scores for scores, _ in problem._run(picked)]
    values = [
        float(expected_reward(scores, doc.rewards)) - kl * float(choice_kl(scores, base_scores))
        for scores, base_scores, doc in zip(found, base, picked, strict=True)
    ]
    return sum(values) / len(values)


@pytest.mark.parametrize("kl", [0.0, 0.5])
@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_the_exact_gradient_over_choices_equals_differences(exact_lm: HFLM, kl: float, metric: str) -> None:
    task = tiny.choice_task("q", {"training": tiny.questions(24), "test": tiny.questions(4, 100)})
    problem = problem_of(exact_lm, task, kl=kl, metric=metric, micro_tokens=120)
    z, docs = random_z(problem), list(range(6))
    analytic, _ = gradient(problem, z, docs)
    sizes = [len(vector) for vector in z.values()]
    epsilon = 1e-2
    for direction in directions(sum(sizes), 4):
        parts = dict(zip(z, torch.split(direction.float(), sizes), strict=True))
        ahead = choice_objective(problem, {n: v + epsilon * parts[n] for n, v in z.items()}, docs, kl)
        behind = choice_objective(problem, {n: v - epsilon * parts[n] for n, v in z.items()}, docs, kl)
        assert (ahead - behind) / (2 * epsilon) == pytest.approx(float(analytic @ direction), rel=1e-2, abs=2e-5)


def test_cutting_a_step_into_passes_does_not_change_its_gradient(exact_lm: HFLM) -> None:
    task = tiny.choice_task("q", {"training": tiny.questions(24), "test": tiny.questions(4, 100)})
    found = []
    for micro_tokens in (40, 4096):
        problem = problem_of(exact_lm, task, kl=0.1, micro_tokens=micro_tokens)
        found.append(gradient(problem, random_z(problem), list(range(8)))[0])
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)


def agrees(estimates: list[torch.Tensor], exact: torch.Tensor) -> None:
    """The mean of independent estimates is within four of its standard errors of ``exact``, along 8 directions."""
    stacked = torch.stack(estimates) @ directions(exact.numel(), 8).T
    error = stacked.std(dim=0) / len(estimates) ** 0.5
    assert bool((error > 0).all())
    assert float(((stacked.mean(dim=0) - directions(exact.numel(), 8) @ exact) / error).abs().max()) < 4
    # And that is a test: it would see the gradient missing.
    assert float(torch.stack(estimates).mean(dim=0) @ exact / exact.norm() ** 2) == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize(("baseline", "samples"), [("none", 8), ("mean", 8), ("rloo", 8)])
def test_sampled_choices_agree_with_the_exact_gradient(tiny_lm: HFLM, baseline: str, samples: int) -> None:
    task, docs = planted.choices(), list(range(8))
    exact, _ = gradient(problem_of(tiny_lm, task), random_z(problem_of(tiny_lm, task)), docs)
    problem = problem_of(tiny_lm, task, objective="reinforce", baseline=baseline, samples=samples)
    z = random_z(problem)
    agrees([gradient(problem, z, docs, step)[0] for step in range(REPEATS)], exact)


@pytest.mark.parametrize(("baseline", "temperature"), [("mean", 1.0), ("rloo", 1.5)])
def test_sampled_answers_agree_with_the_exact_gradient(tiny_lm: HFLM, baseline: str, temperature: float) -> None:
    """Answers of one token, so that all of them can be summed over."""
    task = planted.texts(generation_kwargs={"until": ["\n"], "max_gen_toks": 1, "do_sample": False})
    problem = problem_of(tiny_lm, task, baseline=baseline, temperature=temperature, samples=16)
    docs, z = [0, 1, 2, 3], random_z(problem)
    vocabulary = problem.setup.model.vocabulary
    exact = torch.zeros(sum(map(len, z.values())), dtype=torch.float64)
    for doc, instance in zip(docs, problem._prepare([problem.setup.train[i] for i in docs]), strict=True):
        request = problem.setup.docs.generation(instance)
        rewards = torch.tensor(
            [
                problem.setup.reward(
                    problem.setup.docs.metrics(
                        problem.setup.train[doc], [instance], [problem.setup.docs.text([token], request.stop)]
                    )
                )
                for token in range(vocabulary)
            ]
        )
        grown = leaves(z)
        with problem.setup.engine.activation([grown]):
            spans = problem.setup.model.run([Branches(request.context, tuple((t,) for t in range(vocabulary)))])
        logprobs = spans.loglikelihoods(temperature)
        assert float(logprobs.detach().exp().sum()) == pytest.approx(1, abs=1e-4)
        (logprobs.exp() * rewards).sum().backward()
        exact += flat(grown) / len(docs)
    agrees([gradient(problem, z, docs, step)[0] for step in range(REPEATS)], exact)


def test_what_a_models_generation_configuration_says_of_logits_is_not_in_the_policy(
    tiny_lm: HFLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of(tiny_lm, planted.texts(), temperature=1.0, samples=4)
    docs = problem.setup.train[:2]
    instances = problem._prepare(docs)
    expected = problem._answer(docs, instances, None, 5, None)
    assert len({rollout.tokens for rollout in expected}) > 4
    own = {"min_p": 0.9, "num_beams": 2, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(40, 60))}
    for name, value in own.items():
        monkeypatch.setattr(tiny_lm.model.generation_config, name, value)
    assert problem._answer(docs, instances, None, 5, None) == expected
    assert tiny_lm.model.generation_config.num_beams == 2


def test_answers_of_several_tokens_count_each_token_once(tiny_lm: HFLM) -> None:
    problem: GenerationProblem = problem_of(tiny_lm, planted.texts(), baseline="none", samples=2)
    z, docs = random_z(problem), [0, 1, 2]
    found, measured = gradient(problem, z, docs, 3)
    instances = problem._prepare([problem.setup.train[i] for i in docs])
    seed_z = {name: vector.clone() for name, vector in z.items()}
    rollouts = problem._answer(
        [problem.setup.train[i] for i in docs], instances, seed_z, derive_seed(0, "rollouts", 3), None
    )
    assert {len(rollout.tokens) for rollout in rollouts} != {1}
    assert measured.reward == pytest.approx(sum(rollout.reward for rollout in rollouts) / 6)
    grown = leaves(z)
    total = torch.zeros(())
    with problem.setup.engine.activation([grown]):
        for rollout in rollouts:
            ids = torch.tensor([[*rollout.context, *rollout.tokens]])
            logprobs = problem.setup.engine.model(ids).logits[0].log_softmax(-1)
            start = len(rollout.context) - 1
            logprob = sum(logprobs[start + i, token] for i, token in enumerate(rollout.tokens))
            total = total + rollout.reward * logprob / len(rollouts)
    total.backward()
    torch.testing.assert_close(found, flat(grown), atol=1e-4, rtol=1e-3)


def test_the_penalty_on_answers_is_zero_at_the_base_and_pulls_towards_it(tiny_lm: HFLM) -> None:
    task = planted.texts()
    problem = problem_of(tiny_lm, task, kl=2.0, samples=2, reward_right=1e-9, reward_wrong=0.0)
    base = {name: torch.ones(rank) for name, rank in problem.setup.engine.ranks().items()}
    at_base, measured = gradient(problem, base, [0, 1, 2])
    assert measured.kl == pytest.approx(0, abs=1e-7)
    assert float(at_base.norm()) < 1e-4
    z = random_z(problem, 0.2)
    away, measured = gradient(problem, z, [0, 1, 2])
    assert measured.kl is not None
    assert measured.kl > 1e-3
    # Against its gradient, the penalty on the same answers falls.
    generation = problem._prepare(problem.setup.train[:3])
    answers = problem._answer(problem.setup.train[:3], generation, z, 0, None)
    branches = [Branches(answer.context, (answer.tokens,)) for answer in answers]
    sizes = [len(vector) for vector in z.values()]
    step = dict(zip(z, torch.split(1e-2 * away.float() / away.norm(), sizes), strict=True))
    with torch.no_grad():
        plain = problem.setup.model.run(branches).logits
        values = []
        for mixture in (z, {name: vector + step[name] for name, vector in z.items()}):
            with problem.setup.engine.activation([mixture]):
                values.append(float(vocabulary_kl(problem.setup.model.run(branches).logits, plain).mean()))
    assert values[1] < values[0]


def test_kl_of_choices_is_zero_for_the_base_and_grows_away_from_it(tiny_lm: HFLM) -> None:
    problem = problem_of(tiny_lm, planted.choices())
    assert problem.measure(None).kl == 0
    moved = problem.measure(random_z(problem, 0.2)).kl
    assert moved is not None
    assert moved > 1e-3


def test_an_epoch_is_the_mean_of_its_batches(exact_lm: HFLM) -> None:
    task = tiny.choice_task("q", {"training": tiny.questions(24), "test": tiny.questions(4, 100)})
    problem = problem_of(exact_lm, task, kl=0.1)
    z, docs = random_z(problem), batch_docs(12, 12, 3, 0)
    assert sorted(docs) == list(range(12))
    whole, measured = gradient(problem, z, list(docs))
    parts = [gradient(problem, z, list(docs[i : i + 5])) for i in (0, 5, 10)]
    mean = sum(weight * part for weight, (part, _) in zip((5, 5, 2), parts, strict=True)) / 12
    torch.testing.assert_close(whole, mean, atol=1e-6, rtol=1e-4)
    assert measured.reward == pytest.approx(sum(w * m.reward for w, (_, m) in zip((5, 5, 2), parts, strict=True)) / 12)


@pytest.mark.parametrize("kind", ["choices", "texts"])
def test_the_next_token_gradient_is_that_of_the_written_formula(tiny_lm: HFLM, kind: str) -> None:
    task = planted.choices() if kind == "choices" else planted.texts()
    kl, docs = 0.3, [0, 1, 2, 5]
    problem = problem_of(tiny_lm, task, objective="next-token", kl=kl, micro_tokens=60)
    assert problem.method == "next-token"
    z = random_z(problem)
    found, measured = gradient(problem, z, docs)
    grown = leaves(z)
    logits_of, base_of, targets = [], [], []
    for doc in (problem.setup.train[i] for i in docs):
        context = tiny_lm.tok_encode(f"Q: {doc['q']}\nA:")
        answer = tiny_lm.tok_encode(f" {doc['choices'][doc['gold']]}", add_special_tokens=False)
        ids = torch.tensor([[*context, *answer]])
        with torch.no_grad():
            base_of.append(tiny_lm.model(ids).logits[0, len(context) - 1 : -1])
        with problem.setup.engine.activation([grown]):
            logits_of.append(tiny_lm.model(ids).logits[0, len(context) - 1 : -1])
        targets += answer
    logits, base = torch.cat(logits_of), torch.cat(base_of)
    likelihood = torch.log_softmax(logits, -1)[torch.arange(len(targets)), torch.tensor(targets)].mean()
    penalty = vocabulary_kl(logits, base).mean()
    (likelihood - kl * penalty).backward()
    torch.testing.assert_close(found, flat(grown), atol=1e-5, rtol=1e-3)
    assert measured.reward == pytest.approx(float(likelihood.detach()), abs=1e-4)
    assert measured.kl == pytest.approx(float(penalty.detach()), rel=1e-3)
