"""The one place where randomness is seeded.

A user gives one seed. Every consumer derives its own from it by name, so that adding a consumer never shifts another's
stream, and no code touches a global generator.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed for the consumer called ``names``: 63 bits of SHA-256 over the user's seed and the names."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator for the consumer called ``names``."""
    return np.random.default_rng(derive_seed(seed, *names))
