"""Cost model that chooses between weight form and activation form.

Costs depend only on the shapes of the model and of the work, so the same work always gets the same form.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from t2.adapters.expert import Z
from t2.adapters.targets import Target

FormName = Literal["weight", "activation"]

_log = logging.getLogger(__name__)
_SPAN = 12
_NEAR = 4e-6


@dataclass(frozen=True)
class _Machine:
    """Costs on one kind of device in one precision, in multiplications.

    Attributes:
        read: reading one weight from memory.
        layer: fixed overhead of one decoder layer.
        hook: fixed overhead of correcting or changing one matrix.
        elementwise: one element of the correction.
        composed: one multiplication when weights are composed, which happens in float32.
        moved: reading and writing one weight when the weights change.
    """

    read: float
    layer: float
    hook: float
    elementwise: float
    composed: float
    moved: float


_MACHINES = {
    ("cpu", 4): _Machine(read=20, layer=2.6e7, hook=1e6, elementwise=10, composed=1, moved=16),
    ("cpu", 2): _Machine(read=35, layer=4.4e7, hook=1.1e7, elementwise=10, composed=1.5, moved=21),
    ("cuda", 4): _Machine(read=40, layer=5e9, hook=1e9, elementwise=40, composed=1, moved=40),
    ("cuda", 2): _Machine(read=300, layer=5e10, hook=1e10, elementwise=300, composed=10, moved=300),
}
"""Costs by kind of device and bytes of a weight.

CPU costs are fitted to ``python -m benchmarks.speed forms``. GPU costs are derived from the data sheet of an H100 (67
and 990·10¹² operations and 3.35·10¹² bytes per second, 10 µs to start a kernel) and are not measured.
"""


@dataclass(frozen=True)
class Load:
    """Work under one mixture, or of one batch of many.

    Attributes:
        rows: rows side by side.
        prompt: tokens of all their prompts, with padding.
        steps: tokens that each row generates.
    """

    rows: int
    prompt: int
    steps: int


class CostModel:
    """Cost of a piece of work in either form, in multiplications.

    A pass over m tokens costs m multiplications for each weight, one read of every weight, and the overhead of its
    layers. Activation form adds two products with Q, of shape (r, r), for each matrix that a mixture changes. Weight
    form adds one change of the weights for each mixture.

    Args:
        model: the model.
        targets: its adaptable matrices, by parameter name.
    """

    def __init__(self, model: Any, targets: Mapping[str, Target]) -> None:
        self._targets = targets
        kind = "cuda" if torch.device(model.device).type == "cuda" else "cpu"
        # A quantised weight has fewer bytes to read, but is multiplied in the model's dtype.
        self._machine = _MACHINES[kind, 4 if model.dtype.itemsize >= 4 else 2]
        self._weights: int = sum(parameter.numel() for parameter in model.parameters())
        inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings()
        if outputs is not None and outputs.weight is not inputs:
            self._weights -= inputs.numel()  # a lookup, no product
        self._layers = len({target.layer for target in targets.values()})
        self._ranks = {name: target.rank for name, target in targets.items()}

    def forward(self, tokens: int, moving: Collection[str] = ()) -> float:
        """Cost of a pass over ``tokens`` tokens, with the matrices ``moving`` in activation form."""
        machine = self._machine
        cost = self._weights * (tokens + machine.read) + self._layers * machine.layer
        for name in moving:
            rank = self._ranks[name]
            cost += 2 * rank**2 * (tokens + machine.read) + rank * tokens * machine.elementwise + machine.hook
        return cost

    def composing(self) -> float:
        """Cost of changing the weights to a mixture composed from its singular values."""
        sizes = [(target.rank, max(target.shape)) for target in self._targets.values()]
        products = sum(r**3 + r**2 * longest for r, longest in sizes)
        return self._machine.composed * products + self._machine.hook * len(sizes) + self.summing(0)

    def summing(self, directions: int) -> float:
        """Cost of changing the weights to a sum of ``directions`` that are in memory."""
        moved = sum(target.parameter.numel() for target in self._targets.values())
        return self._machine.moved * moved * (2 + directions) + self._machine.hook * len(self._targets)

    def choose(self, mixtures: Sequence[Z | None], in_turn: Sequence[Load], in_one: Sequence[Load]) -> FormName:
        """Return the cheaper form for some work; activation form if no matrix changes.

        Args:
            mixtures: the mixtures that move something.
            in_turn: the batches when mixtures come in turn.
            in_one: the batches of all mixtures together.
        """
        moving = sorted({name for z in mixtures for name in (z or {}) if name in self._ranks})
        if not moving:
            return "activation"
        directions = len(spanning(mixtures))
        change = len(mixtures) * self.composing()
        if 0 < directions < len(mixtures):
            change = directions * self.composing() + len(mixtures) * self.summing(directions)
        weight = change + sum(self._load(load, ()) for load in in_turn)
        activation = sum(self._load(load, moving) for load in in_one)
        _log.debug("%d mixtures: %.2e in weight form, %.2e in activation form", len(mixtures), weight, activation)
        return "weight" if weight < activation else "activation"

    def _load(self, load: Load, moving: Collection[str]) -> float:
        return self.forward(load.prompt, moving) + load.steps * self.forward(load.rows, moving)


def spanning(mixtures: Sequence[Z | None]) -> list[Z]:
    """Return a few mixtures that, together with z = 1, span all given mixtures.

    Returns:
        Nothing where there would be more than half of them or more than a dozen. What is in the span is decided by the
        first matrix alone, so whoever relies on it looks at the others.
    """
    some = [z for z in mixtures if z]
    name = next((name for z in some for name, vector in z.items() if bool((vector != 1).any())), None)
    if name is None:
        return []
    found = _find_independent(name, some, _SPAN + 1)
    return found if len(found) <= min(_SPAN, len(some) // 2) else []


def _find_independent(name: str, mixtures: Sequence[Z], most: int) -> list[Z]:
    """Return at most ``most`` mixtures, each outside the span of z = 1 and of those before it."""
    directions: list[torch.Tensor] = []
    found: list[Z] = []
    first = next(z[name] for z in mixtures if name in z)
    for z in ({name: torch.full_like(first, 2.0)}, *mixtures):
        if name not in z or len(found) == most:
            continue
        rest = z[name].detach().cpu().double() - 1
        bound = _NEAR * (1 + float(z[name].abs().max())) * len(rest) ** 0.5
        for _ in range(2):  # once leaves rounding errors of what is taken off
            for direction in directions:
                rest = rest - direction * (rest @ direction)
        if float(rest.norm()) > bound:
            if directions:
                found.append(z)
            directions.append(rest / rest.norm())
    return found
