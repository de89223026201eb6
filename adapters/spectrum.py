"""How much of a model, and of what experts do to it, lies in the first components of its matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from t2.adapters.expert import Z


@dataclass(frozen=True)
class Kept:
    """What the first k components of some matrices hold.

    Attributes:
        group: the matrices, by what they were grouped by.
        matrices: how many.
        rank: the largest rank of one.
        k: how many components are kept; all of a matrix of a smaller rank.
        sigma: their share of Σσ, from 0 to 1.
        energy: their share of Σσ², which is ‖W‖².
        moved: of each expert, its share of ‖W′ − W‖² = Σ((z−1)σ)²; None where it leaves these matrices as they are.
    """

    group: str
    matrices: int
    rank: int
    k: int
    sigma: float
    energy: float
    moved: Mapping[str, float | None]


def kept(
    sigmas: Mapping[str, torch.Tensor],
    groups: Mapping[str, str],
    ranks: Sequence[int],
    experts: Mapping[str, Z] | None = None,
) -> list[Kept]:
    """What is kept by the first k components, group by group and k by k.

    Args:
        sigmas: σ by matrix, each of shape (r,), descending.
        groups: the group of each matrix.
        ranks: the values of k.
        experts: z by expert.
    """
    found = []
    for group in dict.fromkeys(groups[name] for name in sigmas):
        chosen = {name: sigma.double() for name, sigma in sigmas.items() if groups[name] == group}
        moves = {
            expert: [(z[name].double() - 1) * sigma for name, sigma in chosen.items() if name in z]
            for expert, z in (experts or {}).items()
        }
        found += [
            Kept(
                group=group,
                matrices=len(chosen),
                rank=max(len(sigma) for sigma in chosen.values()),
                k=k,
                sigma=_share(list(chosen.values()), k) or 0.0,
                energy=_share([sigma.square() for sigma in chosen.values()], k) or 0.0,
                moved={expert: _share([move.square() for move in moved], k) for expert, moved in moves.items()},
            )
            for k in ranks
        ]
    return found


def _share(parts: Sequence[torch.Tensor], k: int) -> float | None:
    """The share of the sum of some vectors that their first k entries have; None of nothing."""
    whole = sum(float(part.sum()) for part in parts)
    return sum(float(part[:k].sum()) for part in parts) / whole if whole else None
