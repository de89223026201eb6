"""The objectives as functions: their values, their gradients, and that baselines leave gradients unbiased."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from t2.training.objective import (
    advantages,
    choice_kl,
    choice_scores,
    expected_reward,
    reinforce,
    vocabulary_kl,
)

finite = st.floats(-5, 5)
SCORES = torch.tensor([0.3, -1.2, 0.8, 0.1], dtype=torch.float64)
REWARDS = torch.tensor([-1.0, 1.0, -1.0, 0.5], dtype=torch.float64)


@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=6), st.floats(0.2, 3))
def test_the_gradient_of_the_expected_reward_is_p_times_advantage(pairs: list[tuple[float, float]], tau: float) -> None:
    scores = torch.tensor([s for s, _ in pairs], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([r for _, r in pairs], dtype=torch.float64)
    value = expected_reward(scores, rewards, tau)
    value.backward()
    p = torch.softmax(scores.detach() / tau, -1)
    torch.testing.assert_close(value.detach(), (p * rewards).sum())
    torch.testing.assert_close(scores.grad, p * (rewards - (p * rewards).sum()) / tau)


@pytest.mark.parametrize("tau", [0.7, 1.0])
def test_kl_is_zero_at_the_base_and_taken_under_the_policy(tau: float) -> None:
    base = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
    assert float(choice_kl(base, base, tau)) == 0.0
    p, q = torch.softmax(SCORES / tau, -1), torch.softmax(base / tau, -1)
    under_policy = float((p * (p / q).log()).sum())
    under_base = float((q * (q / p).log()).sum())
    assert abs(under_policy - under_base) > 1e-2
    assert float(choice_kl(SCORES, base, tau)) == pytest.approx(under_policy)
    both = vocabulary_kl(torch.stack([SCORES, base]), torch.stack([base, base]), tau)
    assert both.tolist() == pytest.approx([under_policy, 0.0])


def test_normalised_scores_order_choices_as_acc_norm_and_keep_their_scale() -> None:
    loglikelihoods, lengths = torch.tensor([-4.0, -9.0, -6.0]), torch.tensor([2.0, 9.0, 4.0])
    scores = choice_scores(loglikelihoods, lengths, "chars")
    assert scores.tolist() == pytest.approx([-2.0 * 5, -1.0 * 5, -1.5 * 5])
    assert choice_scores(loglikelihoods, torch.full((3,), 7.0), "tokens").tolist() == loglikelihoods.tolist()
    assert choice_scores(loglikelihoods, lengths, "none").tolist() == loglikelihoods.tolist()


def test_advantages_leave_out_the_answer_itself() -> None:
    rewards = torch.tensor([[1.0, -1.0, -1.0], [1.0, 1.0, -1.0]])
    assert advantages(rewards, "none").tolist() == rewards.tolist()
    assert advantages(rewards, "rloo").tolist() == [[2.0, -1.0, -1.0], [1.0, 1.0, -2.0]]
    mean = advantages(rewards, "mean")
    assert mean[0, 0] == pytest.approx(1 - (-1 / 5))
    assert mean[1, 2] == pytest.approx(-1 - (1 / 5))
    assert advantages(torch.tensor([[1.0]]), "mean").tolist() == [[1.0]]


def outcomes(baseline: str, documents: int, samples: int) -> tuple[torch.Tensor, float]:
    """Mean and total variance of the REINFORCE gradient over all possible samples, by their probabilities."""
    theta = SCORES.clone().requires_grad_()
    p = torch.softmax(theta.detach(), -1)
    total, square = torch.zeros_like(p), 0.0
    for taken in itertools.product(range(len(p)), repeat=documents * samples):
        index = torch.tensor(taken)
        weight = float(p[index].prod())
        gains = advantages(REWARDS[index].view(documents, samples), baseline).flatten()  # type: ignore[arg-type]
        objective = reinforce(torch.log_softmax(theta, -1)[index], gains) / len(taken)
        (gradient,) = torch.autograd.grad(objective, theta)
        total += weight * gradient
        square += weight * float(gradient.square().sum())
    return total, square - float(total.square().sum())


@pytest.mark.parametrize(("documents", "samples"), [(1, 3), (3, 1), (2, 2)])
def test_every_baseline_leaves_the_gradient_unbiased(documents: int, samples: int) -> None:
    theta = SCORES.clone().requires_grad_()
    (exact,) = torch.autograd.grad(expected_reward(theta, REWARDS), theta)
    for baseline in ("none", "mean", "rloo") if samples > 1 else ("none", "mean"):
        mean, _ = outcomes(baseline, documents, samples)
        torch.testing.assert_close(mean, exact)


def test_reinforce_takes_its_weights_as_constants() -> None:
    logprobs = torch.log(torch.tensor([0.5, 0.25])).requires_grad_()
    weights = torch.tensor([2.0, -1.0], requires_grad=True)
    value = reinforce(logprobs, weights)
    value.backward()
    assert float(value.detach()) == pytest.approx(2 * math.log(0.5) - math.log(0.25))
    assert weights.grad is None
