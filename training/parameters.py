"""From the vector that is trained to z: parametrisations and rescaling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from t2.adapters.expert import Z
from t2.core.seeds import generator
from t2.training.config import TrainConfig


class Trainable(Protocol):
    """What a vector θ of shape (parameters,), float32, stands for: tensors by name, which passes take."""

    def initial(self) -> torch.Tensor:
        """θ before the first step."""
        ...

    def z(self, theta: torch.Tensor) -> Z:
        """The tensors, new ones, without gradient."""
        ...

    def gradient(self, theta: torch.Tensor, z: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """∇θ from the gradients of the tensors at θ; one without a gradient counts as zero."""
        ...


class PlainParameters:
    """θ as some tensors one after another, such as an adapter's; weight decay pulls each number towards 0.

    Args:
        first: the tensors at first, by name.
    """

    def __init__(self, first: Z) -> None:
        self._first = {name: tensor.detach().float().cpu() for name, tensor in first.items()}

    def initial(self) -> torch.Tensor:
        """See :class:`Trainable`."""
        return torch.cat([tensor.flatten() for tensor in self._first.values()])

    def z(self, theta: torch.Tensor) -> Z:
        """See :class:`Trainable`."""
        parts = torch.split(theta.detach(), [tensor.numel() for tensor in self._first.values()])
        return {
            name: part.clone().view(tensor.shape)
            for (name, tensor), part in zip(self._first.items(), parts, strict=True)
        }

    def gradient(self, theta: torch.Tensor, z: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See :class:`Trainable`."""
        found = {name: z[name].grad for name in self._first}
        return torch.cat(
            [
                torch.zeros(self._first[name].numel()) if grad is None else grad.float().cpu().flatten()
                for name, grad in found.items()
            ]
        )


class Parameters:
    """θ of all adapted matrices as one vector, and the z that it stands for.

    ``direct``: z = 1 + θ, and θ = 0 at first. ``sigmoid``: z = max_mult·sigmoid(p) with p = init_mean + θ, and
    θ = init_std·N(0, 1) at first, the form and the values of the public code of Transformer² (which keeps p in bfloat16
    and draws it without a seed). Either way weight decay pulls θ towards 0: z = 1, or one p for all components, which
    rescaled is z = 1 too.

    Rescaled, the moving components z_i, i < k, of a matrix are multiplied by Σσ / Σ(σ⊙z), both sums over i < k. So its
    nuclear norm stays, and with a ``rank`` the other components keep z = 1.

    Args:
        config: gives ``parametrisation``, ``max_mult``, ``init_mean``, ``init_std``, ``rank`` and ``rescale``.
        ranks: rank of each matrix, by name.
        sigma: for rescaling, singular values of each matrix in descending order, shape (r,).
    """

    def __init__(
        self, config: TrainConfig, ranks: Mapping[str, int], sigma: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self.config = config
        self.ranks = dict(ranks)
        self.sizes = {name: min(config.rank or full, full) for name, full in ranks.items()}
        self.count = sum(self.sizes.values())
        leading = {n: (sigma or {})[n][:size].double() for n, size in self.sizes.items()} if config.rescales else {}
        # A matrix of zeros has no norm to keep.
        self._sigma = {name: values for name, values in leading.items() if float(values.sum()) > 0}

    def initial(self) -> torch.Tensor:
        """θ before the first step, shape (parameters,), float32; with ``sigmoid`` it follows from the seed."""
        if self.config.parametrisation == "direct":
            return torch.zeros(self.count)
        drawn = generator(self.config.seed, "initial parameters").standard_normal(self.count)
        return torch.from_numpy(self.config.init_std * drawn).float()

    def z(self, theta: torch.Tensor) -> Z:
        """z by matrix name, each of shape (r,), without gradient, from θ of shape (parameters,)."""
        with torch.no_grad():
            return self._z(theta)

    def gradient(self, theta: torch.Tensor, z: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """∇θ, shape (parameters,), from the gradients of z at θ; a matrix without one counts as zero."""
        leaf = theta.detach().clone().requires_grad_()
        grown = self._z(leaf)
        gradients = [
            torch.zeros(rank) if (found := z[name].grad) is None else found.float().cpu()
            for name, rank in self.ranks.items()
        ]
        (gradient,) = torch.autograd.grad(list(grown.values()), leaf, gradients)
        return gradient

    def _z(self, theta: torch.Tensor) -> Z:
        config = self.config
        found: Z = {}
        for name, part in zip(self.sizes, torch.split(theta, list(self.sizes.values())), strict=True):
            if config.parametrisation == "direct":
                moving = 1 + part
            else:
                moving = config.max_mult * torch.sigmoid(config.init_mean + part)
            if name in self._sigma:
                sigma = self._sigma[name]
                moving = moving * (sigma.sum() / (sigma * moving).sum()).float()
            found[name] = torch.cat([moving, torch.ones(self.ranks[name] - len(part))])
        return found
