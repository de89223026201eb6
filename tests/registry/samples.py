"""Small experts to upload."""

from __future__ import annotations

from typing import Any

import numpy as np

from t2.core.expertfile import encode_expert
from t2.core.manifest import BaseModelRef, Manifest

FINGERPRINT = "ab" * 32


def expert_bytes(seed: int = 0, *, matrices: int = 4, rank: int = 8, **fields: Any) -> bytes:
    """The file of a random expert; other seeds give other digests, ``fields`` go into the manifest."""
    generator = np.random.default_rng(seed)
    targets = {f"model.layers.{layer}.mlp.up_proj.weight": rank for layer in range(matrices)}
    manifest = Manifest(
        **{
            "name": "sample",
            "base": BaseModelRef(id="org/model", fingerprint=FINGERPRINT),
            "targets": targets,
            "task": "t2_gsm8k",
            "domain": "math",
            "method": "reinforce",
            **fields,
        }
    )
    vectors = {name: generator.normal(1.0, 0.1, manifest.targets[name]).astype(np.float32) for name in manifest.targets}
    return encode_expert(manifest, vectors)
