"""Adapted weights: how W′(z) is computed, and what is kept so that changing the mixture costs little."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from t2.adapters.basis import Basis
from t2.adapters.engine.memory import free_bytes, total_bytes
from t2.adapters.expert import Z
from t2.adapters.targets import Target

SHARE = 0.25
"""Share of memory: of the free memory for kept weights, of the total for directions."""
_CHUNK = 1 << 22
"""Elements that are summed at a time on a GPU: few enough that the float32 sum stays in its cache."""
_SEEN = 16
"""Mixtures that are remembered as seen before."""
_SPAN = 4e-6
"""A z this near to the span of the directions, in units of 1 + |z|, lies in it: float32 rounds no better."""


def composed(matrix: torch.Tensor, basis: Basis, vector: torch.Tensor) -> torch.Tensor:
    """W′(z) of a matrix of shape (m, n), on its device and in its dtype.

    With M = Q·diag(z−1)·Qᵀ it is W + M·W, or W + W·M on the input side: r³ + r²·max(m, n) multiplications where
    Q·((z−1)⊙QᵀW) needs 2r²·max(m, n). Summed in float32 and rounded once.
    """
    w = matrix.float()
    q = basis.q.to(w.device)
    m = (q * (vector.detach().to(w.device, torch.float32) - 1)) @ q.T
    moved = torch.addmm(w, m, w) if basis.side == "out" else torch.addmm(w, w, m)
    return moved.to(matrix.dtype)


def adapted(target: Target, basis: Basis, vector: torch.Tensor) -> torch.Tensor:
    """W′(z) of one matrix in the layout and dtype of its parameter; see :func:`composed`."""
    moved = composed(target.matrix, basis, vector)
    return (moved.T if target.transposed else moved).contiguous()


@dataclass(frozen=True, eq=False)
class _Kept:
    """The adapted weights of one mixture, and the tensors that they were made from."""

    z: Z
    originals: Mapping[str, int]
    weights: Mapping[str, torch.Tensor]
    size: int


class KeptWeights:
    """The adapted weights of mixtures that come back, so that applying one again only changes pointers.

    A mixture's weights are held from the second time on that it is applied: a training, whose z never comes back, holds
    none. They are bounded by a share of the memory that is free when they are kept; the longest unused go first.
    """

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self._targets = targets
        self._kept: list[_Kept] = []
        self._seen: deque[Z] = deque(maxlen=_SEEN)

    @property
    def size(self) -> int:
        """Bytes held."""
        return sum(kept.size for kept in self._kept)

    def find(self, z: Z) -> Mapping[str, torch.Tensor] | None:
        """The weights of a mixture, by parameter name; None when they are not held."""
        for kept in self._kept:
            if _same(kept.z, z):
                self._kept.remove(kept)
                if kept.originals != self._pointers(z):
                    return None  # the model was moved or changed
                self._kept.append(kept)
                return kept.weights
        return None

    def keep(self, z: Z, weights: Mapping[str, torch.Tensor]) -> None:
        """Hold the weights of a mixture if it has been seen before and there is room.

        Args:
            z: the mixture; only matrices that it moves.
            weights: its weights; the base's are those of the model now.
        """
        if not any(_same(seen, z) for seen in self._seen):
            self._seen.append({name: vector.detach().clone() for name, vector in z.items()})
            return
        size = sum(weight.nbytes for weight in weights.values())
        # What is held already would be free if it were not.
        allowed = SHARE * (free_bytes(next(iter(weights.values())).device) + self.size)
        while self._kept and self.size + size > allowed:
            del self._kept[0]
        if size <= allowed:
            own = {name: vector.detach().clone() for name, vector in z.items()}
            self._kept.append(_Kept(own, self._pointers(z), dict(weights), size))

    def clear(self) -> None:
        """Let all of them go."""
        self._kept.clear()

    def _pointers(self, z: Z) -> dict[str, int]:
        return {name: self._targets[name].parameter.data_ptr() for name in z}


def _same(one: Z, other: Z) -> bool:
    if one.keys() != other.keys():
        return False
    return all(one[name].device == v.device and torch.equal(one[name], v) for name, v in other.items())


class Directions:
    """What some experts change of each matrix, ΔWₖ = W′(zₖ) − W, so that a mixture of them is one weighted sum.

    W′ is linear in z and W′(z = 1 + c) = (1 + c)·W, so every z with z − 1 = c + Σ βₖ(zₖ − 1) has
    W′ = (1 + c)·W + Σ βₖΔWₖ: whichever way the coefficients were given, per expert, layer or matrix, in whichever
    space, normalised or rescaled. Summed in float32 and rounded once. On a CPU directions are float32, on a GPU, where
    reading them is all it costs, of the parameters' dtype: their rounding is to ΔW what the model's own is to W.

    Args:
        targets: the model's matrices.
        bases: gives the bases of some.
        experts: their z; matrices that are quantised are left out.
    """

    def __init__(
        self, targets: Mapping[str, Target], bases: Callable[[list[str]], Mapping[str, Basis]], experts: Sequence[Z]
    ) -> None:
        self._targets = targets
        self._bases = bases
        self.experts = tuple(experts)
        self._shifts: dict[str, torch.Tensor] = {}
        self._inverse: dict[str, torch.Tensor] = {}
        self._deltas: dict[str, torch.Tensor] | None = None
        self._spare: dict[str, torch.Tensor] = {}
        self._scratch = torch.empty(0)
        for name in dict.fromkeys(name for expert in experts for name in expert):
            if name in targets and targets[name].form is None:
                moved = [e[name] for e in experts if name in e and bool((e[name] != 1).any())]
                shifts = torch.stack([vector.cpu().double() - 1 for vector in moved]) if moved else None
                if shifts is not None:
                    self._shifts[name] = shifts
                    self._inverse[name] = torch.linalg.pinv(torch.cat([torch.ones_like(shifts[:1]), shifts]))

    @property
    def built(self) -> bool:
        """Whether ΔW is in memory."""
        return self._deltas is not None

    @property
    def size(self) -> int:
        """Bytes that they take when built, with one mixture's weights."""
        return sum(
            self._targets[name].parameter.numel()
            * (len(shifts) * self._dtype(name).itemsize + self._targets[name].parameter.itemsize)
            for name, shifts in self._shifts.items()
        )

    def coefficients(self, z: Z) -> dict[str, list[float]] | None:
        """c and βₖ of each matrix of a mixture; None when it is no mixture of these experts."""
        found = {}
        for name, vector in z.items():
            if name not in self._shifts:
                return None
            shift = vector.detach().cpu().double() - 1
            solved = shift @ self._inverse[name]
            error = (shift - solved[0] - solved[1:] @ self._shifts[name]).abs().max()
            if error > _SPAN * (1 + float(vector.abs().max())):
                return None
            found[name] = solved.tolist()
        return found

    def build(self) -> bool:
        """Compute ΔW of every expert if a share of the device's memory holds them.

        Returns:
            Whether it is in memory now.
        """
        if self._deltas is None and self._shifts:
            device = self._targets[next(iter(self._shifts))].parameter.device
            if self.size > SHARE * total_bytes(device):
                return False
            if self.size > free_bytes(device):
                warnings.warn(
                    f"directions of experts need {self.size / 1e9:.2f} GB, which is more than is free on {device}; "
                    "weights are composed without them, and in low precision answers may differ by rounding",
                    stacklevel=2,
                )
                return False
            deltas = {}
            for name, shifts in self._shifts.items():
                target, basis = self._targets[name], self._bases([name])[name]
                w, q = target.matrix.float(), basis.q.to(target.parameter.device)
                stacked = torch.empty(len(shifts), w.numel(), dtype=self._dtype(name), device=w.device)
                for k, shift in enumerate(shifts):
                    m = (q * shift.to(w.device, torch.float32)) @ q.T
                    delta = m @ w if basis.side == "out" else w @ m
                    stacked[k] = (delta.T if target.transposed else delta).reshape(-1)
                deltas[name] = stacked
            self._deltas = deltas
        return self.built

    def weights(self, coefficients: Mapping[str, Sequence[float]]) -> dict[str, torch.Tensor]:
        """W′ by parameter name. The tensors are the same at every call: one mixture at a time."""
        assert self._deltas is not None
        most = max(self._targets[name].parameter.numel() for name in self._shifts)
        if len(self._scratch) < most:
            self._scratch = torch.empty(most)
        for name, row in coefficients.items():
            parameter = self._targets[name].parameter.detach()
            if name not in self._spare:
                self._spare[name] = torch.empty_like(parameter, memory_format=torch.contiguous_format)
            _sum(parameter.reshape(-1), self._deltas[name], row, self._spare[name].view(-1), self._scratch)
        return {name: self._spare[name] for name in coefficients}

    def clear(self) -> None:
        """Let ΔW go; :meth:`build` computes it again."""
        self._deltas = None
        self._spare = {}
        self._scratch = torch.empty(0)

    def _dtype(self, name: str) -> torch.dtype:
        parameter = self._targets[name].parameter
        return parameter.dtype if parameter.is_cuda else torch.float32


def _sum(w: torch.Tensor, deltas: torch.Tensor, row: Sequence[float], out: torch.Tensor, scratch: torch.Tensor) -> None:
    """out = (1 + row[0])·w + Σ row[1 + k]·deltas[k] in float32, shapes (n,), (K, n), (1 + K,), (n,)."""
    if not w.is_cuda:
        beta = torch.tensor(row[1:])
        if w.dtype == torch.float32:
            torch.addmv(w, deltas.T, beta, beta=1 + row[0], out=out)
        else:
            # One buffer for all matrices: fresh pages cost more than the sum.
            out.copy_(scratch[: w.numel()].copy_(w).addmv_(deltas.T, beta, beta=1 + row[0]))
        return
    for start in range(0, w.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        total = w[part].float() * (1 + row[0])
        for delta, share in zip(deltas, row[1:], strict=True):
            total.add_(delta[part], alpha=share)
        out[part].copy_(total)
