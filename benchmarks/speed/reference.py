"""The procedure of Transformer²'s public code, written anew: the yardstick of most ratios.

Every matrix is decomposed once into U, σ and Vᵀ, kept in the model's dtype. A mixture is applied by composing each
matrix densely, U·diag(σ⊙z)·Vᵀ, and copying every weight of the model, the adapted ones and all others. Mixtures are
evaluated in turn.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from t2.adapters.basis import Basis
from t2.adapters.expert import Z
from t2.adapters.targets import Target


class Reference:
    """A model under the reference procedure.

    Args:
        model: the model; it is changed in place by :meth:`apply`, and as it was after ``apply(None)``.
        targets: its adapted matrices.
        bases: their bases where they are at hand, for U, σ and Vᵀ without another decomposition; None decomposes.
    """

    def __init__(
        self, model: nn.Module, targets: Mapping[str, Target], bases: Mapping[str, Basis] | None = None
    ) -> None:
        self._targets = targets
        self._weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self._model = model
        self.factors: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        for name, target in targets.items():
            dtype = target.parameter.dtype
            w = target.matrix.float()
            u, sigma, vt = _factors(w, bases[name]) if bases else torch.linalg.svd(w, full_matrices=False)
            self.factors[name] = u.to(dtype), sigma.to(dtype), vt.to(dtype)

    @torch.no_grad()
    def apply(self, z: Z | None) -> None:
        """Put a mixture into the weights; None is the base."""
        composed: dict[int, torch.Tensor] = {}
        for name, vector in (z or {}).items():
            u, sigma, vt = self.factors[name]
            target = self._targets[name]
            matrix = (u * (sigma * vector.to(sigma.device, sigma.dtype))) @ vt
            composed[id(target.parameter)] = matrix.T if target.transposed else matrix
        for name, parameter in self._model.named_parameters():
            parameter.data.copy_(composed.get(id(parameter), self._weights[name]))


def _factors(w: torch.Tensor, basis: Basis) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, sigma = basis.q.to(w.device), basis.sigma.to(w.device)
    scale = sigma.clamp_min(torch.finfo(torch.float32).tiny)
    if basis.side == "out":
        return q, sigma, (q.T @ w) / scale.unsqueeze(1)
    return (w @ q) / scale, sigma, q.T.contiguous()
