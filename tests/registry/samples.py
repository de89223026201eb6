"""Small experts and runs to upload."""

from __future__ import annotations

from typing import Any

import numpy as np
import safetensors.numpy

from t2.core.digests import sha256
from t2.core.expertfile import METADATA_KEY
from t2.core.manifest import BaseModelRef, Manifest
from t2.core.record import ExpertRef
from t2.core.results import EvaluatedBase, Sample, Score, TaskResult, TaskRun, samples_digests
from t2.core.runfile import encode_run

FINGERPRINT = "ab" * 32


def expert_bytes(seed: int = 0, *, matrices: int = 4, rank: int = 8, **fields: Any) -> bytes:
    """The file of a random expert; ``fields``, also invalid ones, go into the manifest."""
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
    return safetensors.numpy.save(vectors, metadata={METADATA_KEY: manifest.canonical()})


def run_bytes(seed: int = 0, *, answers: int = 0, experts: tuple[str, ...] = (), docs: int = 6, **fields: Any) -> bytes:
    """The file of a made-up run; other ``answers`` give other samples, ``fields`` go into the run.

    Args:
        experts: digests.
    """
    right = np.random.default_rng(answers).integers(2, size=docs)
    samples = [
        Sample(
            doc_hash=sha256(f"doc {doc}".encode()),
            prompt_hash=sha256(f"prompt {doc}".encode()),
            target_hash=sha256(b"target"),
            answers={"none": sha256(f"answer {answers} {doc}".encode())},
            scores={"acc,none": float(right[doc])},
        )
        for doc in range(docs)
    ]
    score = Score(
        metric="acc",
        filter="none",
        score=float(right.mean()),
        stderr=0.1,
        n=docs,
        higher_is_better=True,
        aggregation="mean",
    )
    docs_digest, prompts_digest, samples_digest = samples_digests(samples)
    given = {
        "task": "t2_gsm8k",
        "task_version": "1.0",
        "n_shot": 0,
        "docs": docs,
        "docs_digest": docs_digest,
        "prompts_digest": prompts_digest,
        "samples_digest": samples_digest,
        "scores": (score,),
        "model": "t2",
        "base": EvaluatedBase(id="org/model", fingerprint=FINGERPRINT),
        "dtype": "float32",
        "strategy": "mix",
        "control": "none",
        "experts": tuple(ExpertRef(name=f"expert {digest[:6]}", digest=digest) for digest in experts),
        "settings": {"adapt": "mix", "space": "paper"},
        "evaluation": {},
        "seeds": {"random": 0, "adapt": seed},
        "record": None,
        "versions": {"lm_eval": "0.4.13"},
        "evaluated_at": None,
    }
    return encode_run(TaskResult(TaskRun(**{**given, **fields}), tuple(samples)))
