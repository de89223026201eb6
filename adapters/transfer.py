"""Experts of another base model: their vectors taken to matrices of another number, depth and rank.

Layers and singular components are told by their relative place: what an expert does to the middle layer's largest
components is done to the other model's middle layer's largest components. Whether that carries what was learned is the
open question of Transformer² (arXiv 2501.06252, section 4.3); where names and ranks agree nothing is changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from t2.adapters.expert import Expert, Z
from t2.core.errors import ExpertMismatchError
from t2.core.manifest import BaseModelRef
from t2.core.record import Transferred


def role_of(name: str) -> tuple[int, str]:
    """The decoder layer in a matrix' name and what follows it, its role, such as ``mlp.up_proj.weight``.

    Raises:
        ValueError: the name has no layer.
    """
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if place is None:
        raise ValueError(f"{name} names no decoder layer")
    return int(parts[place]), ".".join(parts[place + 1 :])


def resample_vector(z: torch.Tensor, rank: int) -> torch.Tensor:
    """z at the relative places of other ranks: zᵢ is linear between components, and both ends stay ends.

    Args:
        z: of shape (r,).
        rank: r′, the number of components wanted.

    Returns:
        Shape (r′,), float32: z itself where r′ = r. Component i′ is z at i′·(r−1)/(r′−1); for r′ = 1 at the middle.
    """
    if len(z) == rank:
        return z
    values = np.interp(_places(rank, len(z)), np.arange(len(z)), z.double().numpy())
    return torch.from_numpy(values).float()


def resample_z(z: Z, ranks: Mapping[str, int]) -> Z:
    """z for the matrices of another model.

    Layer l′ of L′ takes what lies at l′·(L−1)/(L′−1), linear between the two nearest of the L source layers; a matrix
    that one of these lacks counts as z = 1 there. Matrices of roles that z does not have are left out: they keep z = 1.

    Args:
        z: vectors by name; L is one more than the last layer among them.
        ranks: the rank of each matrix of the other model; L′ is one more than the last layer among them.

    Returns:
        Vectors by the other model's names; empty where the models have no role in common.
    """
    source = {role_of(name): vector for name, vector in z.items()}
    wanted = {name: role_of(name) for name in ranks}
    if not source or not wanted:
        return {}
    positions = _places(1 + max(layer for layer, _ in wanted.values()), 1 + max(layer for layer, _ in source))
    resampled: Z = {}
    for name, (layer, role) in wanted.items():
        share, below = math.modf(float(positions[layer]))
        near = [source.get((int(below), role)), source.get((int(below) + 1, role)) if share else None]
        if near == [None, None]:
            continue
        one = torch.ones(ranks[name])
        first, second = (one if vector is None else resample_vector(vector, ranks[name]) for vector in near)
        resampled[name] = torch.lerp(first.double(), second.double(), share).float() if share else first
    return resampled


def unchanged(expert: Expert, base: BaseModelRef) -> Expert:
    """An expert whose names and ranks agree with those of this base model, as it is, marked where it is of another."""
    own = expert.manifest.base
    if own.fingerprint == base.fingerprint:
        return expert
    return replace(expert, transferred=Transferred(base=own, matrices=len(expert.z)))


def resample(expert: Expert, base: BaseModelRef, ranks: Mapping[str, int]) -> Expert:
    """An expert of another base model for this one; one of this base stays as it is.

    Its digest stays that of its file, and ``transferred`` says where it came from and what was left out: the roles that
    this base does not have.

    Args:
        expert: the expert.
        base: the model as loaded.
        ranks: the rank of each of its adaptable matrices.

    Raises:
        ExpertMismatchError: the models have no role in common, or the expert moves some layers only of a model whose
            depth its file therefore does not tell.
    """
    own = expert.manifest.base
    if own.fingerprint == base.fingerprint:
        return expert
    if _some_layers(expert.manifest.training):
        raise ExpertMismatchError(
            f"expert {expert.name} moves some layers only of {own.id}, and its file does not say how many that has; "
            "transfer=resample takes experts of all layers"
        )
    z = resample_z(expert.z, ranks)
    theirs, ours = ({role_of(name)[1] for name in names} for names in (expert.z, ranks))
    if not z:
        raise ExpertMismatchError(
            f"expert {expert.name} scales {', '.join(sorted(theirs))} of {own.id}, of which {base.id} has none; choose "
            f"an expert of {base.id}, or of a model whose matrices go by the same names"
        )
    kept = Transferred(base=own, matrices=len(z), left_out=tuple(sorted(theirs - ours)))
    return replace(expert, z=z, transferred=kept)


def _some_layers(training: Mapping[str, Any]) -> bool:
    """Whether what an expert's file says of its making, by training or by mixing, names layers."""
    settings = training.get("settings")
    return training.get("layers") is not None or (isinstance(settings, dict) and settings.get("layers") is not None)


def _places(wanted: int, there: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Where each of so many points lies among so many others, when the ends of both agree; one lies in the middle."""
    if wanted == 1:
        return np.array([(there - 1) / 2])
    return np.arange(wanted, dtype=np.float64) * (there - 1) / (wanted - 1)
