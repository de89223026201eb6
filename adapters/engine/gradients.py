"""What a training step computes of an adapted matrix, forward and backward, and what it keeps in between.

Neither function below makes a dense gradient of a weight. Both keep one tensor of shape (…, r) in the model's dtype per
matrix and sum the gradient of z in float32 (of a float64 model in float64).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def shifted(y: torch.Tensor, shift: torch.Tensor, q: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y + Q(s⊙Qᵀ(y − b)), the activation form; each row of a batch may have its own s = z − 1.

    Args:
        y: shape (rows·k, …, m), or (…, m) where there is one shift for all.
        shift: s, shape (rows, k), float32 or float64, of the first k components that move.
        q: their columns of Q, shape (m, k), of y's dtype, a constant.
        bias: b, shape (m,), a constant, or None.
    """
    moved: torch.Tensor = _Shifted.apply(y, shift, q, bias)  # type: ignore[no-untyped-call]
    return moved


def spectral(
    x: torch.Tensor, shift: torch.Tensor, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """U·((1+s)⊙D·x) + b with D = QᵀW, U = Q (side ``out``) or D = Qᵀ, U = WQ (side ``in``): W′(z)x with one z = 1 + s.

    With a = max(m, n) this takes 2(1 + r/a) multiplications per weight and token, forward and backward together, where
    the activation form takes 2(1 + 2r/a). Changed weights take no less than 3, and 2r(1 + r/a) per weight besides, to
    build W′ and to take the gradient of z, diag(Qᵀ(Σ g xᵀ)WᵀQ), from that of W′. So this is the least for all but
    square matrices in passes of thousands of tokens: 2.8 for 576×1536, 2.6 for 4096×14336, 4 for square ones.

    Args:
        x: shape (…, n).
        shift: s, shape (r,), float32 or float64; p + p⊙s keeps its digits where p⊙(1+s) would round z.
        down: D, shape (r, n), of x's dtype, a constant.
        up: U, shape (m, r), a constant.
        bias: b, shape (m,), a constant, or None.
    """
    y: torch.Tensor = _Spectral.apply(x, shift, down, up, bias)  # type: ignore[no-untyped-call]
    return y


class _Shifted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, shift: torch.Tensor, q: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        p = (y if bias is None else y - bias) @ q
        ctx.save_for_backward(p, shift)
        ctx.q = q
        return _add(y, _scaled(p, shift), q.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        p, shift = ctx.saved_tensors
        h = g @ ctx.q
        found = _products(p, h, shift) if ctx.needs_input_grad[1] else None
        return _add(g, _scaled(h, shift), ctx.q.T) if ctx.needs_input_grad[0] else None, found, None, None


class _Spectral(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        shift: torch.Tensor,
        down: torch.Tensor,
        up: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        p = F.linear(x, down)
        ctx.save_for_backward(p, shift)
        ctx.factors = down, up
        s = shift.to(p.dtype)
        return F.linear(torch.addcmul(p, p, s), up, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        p, shift = ctx.saved_tensors
        down, up = ctx.factors
        h = g @ up
        found = _products(p, h, shift.unsqueeze(0)).squeeze(0) if ctx.needs_input_grad[1] else None
        moved = torch.addcmul(h, h, shift.to(h.dtype)) @ down if ctx.needs_input_grad[0] else None
        return moved, found, None, None, None


def _scaled(p: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Each row of p times its shift; rows follow one another in the first dimension, each as often as the others."""
    rows = shift.shape[0]
    return (p.reshape(rows, -1, p.shape[-1]) * shift.to(p.dtype).unsqueeze(1)).view(p.shape)


def _products(p: torch.Tensor, h: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Σ over the tokens of each row of p⊙h, shape (rows, r), summed in no less than the shift's dtype."""
    rows, rank = shift.shape
    dtype = torch.promote_types(p.dtype, shift.dtype)
    products = p.reshape(rows, -1, rank).to(dtype) * h.reshape(rows, -1, rank)
    return products.sum(dim=1).to(shift.dtype)


def _add(y: torch.Tensor, p: torch.Tensor, qt: torch.Tensor) -> torch.Tensor:
    """y + p·Qᵀ, one kernel and no tensor between."""
    return torch.addmm(y.reshape(-1, y.shape[-1]), p.reshape(-1, p.shape[-1]), qt).view(y.shape)
