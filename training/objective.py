"""What training minimises: pure functions on tensors.

Losses are sums over documents, answers or tokens, so that a step may be cut into micro-batches: the caller divides by
the step's totals.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Normalise = Literal["none", "tokens", "chars"]
Baseline = Literal["none", "mean", "rloo"]


def choice_scores(loglikelihoods: torch.Tensor, lengths: torch.Tensor, normalise: Normalise) -> torch.Tensor:
    """Scores of one document's choices, whose softmax is the policy.

    ``none``: s_c = ℓ_c. Otherwise s_c = ℓ_c · (mean length) / (length of c), which with characters orders choices as
    lm-eval's ``acc_norm`` does, and keeps the scale of ℓ.

    Args:
        loglikelihoods: ℓ, shape (choices,), in nats.
        lengths: shape (choices,), in tokens or characters.
        normalise: which lengths these are, or ``none``.
    """
    if normalise == "none":
        return loglikelihoods
    sizes = lengths.clamp_min(1).to(loglikelihoods)
    return loglikelihoods * (sizes.mean() / sizes)


def expected_reward(scores: torch.Tensor, rewards: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """J = Σ_c p_c·r_c with p = softmax(s/τ); its gradient is that of the expected reward, without sampling.

    Args:
        scores: s, shape (choices,).
        rewards: r, shape (choices,): what choosing c earns.
        temperature: τ > 0.
    """
    return (F.softmax(scores / temperature, dim=-1) * rewards).sum()


def choice_kl(scores: torch.Tensor, base_scores: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(policy‖base) = Σ_c p_c·(log p_c − log p⁰_c) over the choices, in nats.

    Args:
        scores: of the policy, shape (choices,).
        base_scores: of the base model, shape (choices,).
        temperature: τ > 0, of both.
    """
    log_p = F.log_softmax(scores / temperature, dim=-1)
    log_base = F.log_softmax(base_scores / temperature, dim=-1)
    return (log_p.exp() * (log_p - log_base)).sum()


def vocabulary_kl(logits: torch.Tensor, base_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(policy‖base) at each position, exact over the vocabulary: Σ_v p(v)·(log p(v) − log p⁰(v)), in nats.

    Averaged over the tokens of answers that the policy sampled, this is the penalty per token. Its gradient counts what
    z does to the distribution at each position, not what it does to which positions are reached.

    Args:
        logits: of the policy, shape (positions, vocabulary).
        base_logits: of the base model, same shape.
        temperature: τ > 0, of both.

    Returns:
        Shape (positions,).
    """
    log_p = F.log_softmax(logits / temperature, dim=-1)
    log_base = F.log_softmax(base_logits / temperature, dim=-1)
    return (log_p.exp() * (log_p - log_base)).sum(dim=-1)


def advantages(rewards: torch.Tensor, baseline: Baseline) -> torch.Tensor:
    """A = r − b, with a baseline b that does not depend on the answer itself, so the gradient stays unbiased.

    ``none``: b = 0. ``mean``: the mean reward of all other answers of the step. ``rloo``: the mean reward of the other
    answers to the same document (leave-one-out; Kool et al. 2019). Without other answers b = 0.

    Args:
        rewards: shape (documents, samples).
        baseline: as above.
    """
    if baseline == "none":
        return rewards
    total, count = (rewards.sum(), rewards.numel()) if baseline == "mean" else (rewards.sum(1, True), rewards.shape[1])
    return rewards if count < 2 else rewards - (total - rewards) / (count - 1)


def reinforce(logprobs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ_i A_i·log π(y_i); its gradient, over the number of answers, estimates the expected reward's (Williams 1992).

    Args:
        logprobs: log π(y_i) under the distribution that y_i was sampled from, shape (answers,).
        weights: A_i, shape (answers,), constants.
    """
    return (weights.detach() * logprobs).sum()
