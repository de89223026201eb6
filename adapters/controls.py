"""Control experts: what an expert's numbers do when they lose their place.

A gain that survives the shuffle comes from the distribution of z, or from the scale of the weights, and not from what
was learned about single components.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch

from t2.adapters.expert import Expert, Z
from t2.core.seeds import generator

Control = Literal["none", "shuffle", "random"]
CONTROLS: tuple[str, ...] = get_args(Control)


def control_expert(expert: Expert, control: Control, seed: int) -> Expert:
    """The control of an expert; applied before any search.

    ``shuffle`` permutes z within each matrix, each expert and matrix by its own permutation (Transformer², Table 5).
    ``random`` draws z from a normal distribution of the same mean and standard deviation per matrix. The digest stays
    that of the source; a record names the control beside it.

    Args:
        expert: the expert.
        control: which control; ``none`` returns the expert itself.
        seed: the user's ``control_seed``.
    """
    if control == "none":
        return expert
    z: Z = {}
    for name in sorted(expert.z):
        vector = expert.z[name]
        rng = generator(seed, "control", control, expert.digest, name)
        if control == "shuffle":
            z[name] = vector[torch.from_numpy(rng.permutation(len(vector)))]
        else:
            drawn = torch.from_numpy(rng.standard_normal(len(vector))).float()
            z[name] = vector.mean() + vector.std(correction=0) * drawn
    return replace(expert, z={name: z[name] for name in expert.z})
