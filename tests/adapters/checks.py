"""What must hold between the two forms of an engine, on a tiny model as on a real one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from t2.adapters.engine.base import Generated, GenerateRequest, Scored, ScoreRequest
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z

TOLERANCE = 1e-3
"""Nats by which likelihoods of the two forms may differ in float32."""


def weights(engine: TransformersEngine) -> str:
    """A digest of every parameter and buffer of the model."""
    digest = hashlib.sha256()
    for name, tensor in engine.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def logits(engine: TransformersEngine, tokens: tuple[int, ...]) -> torch.Tensor:
    """Logits of one text, shape (tokens, vocabulary)."""
    with torch.no_grad():
        out: torch.Tensor = engine.model(torch.tensor([tokens])).logits[0]
    return out


def dense_weights(engine: TransformersEngine, z: Z) -> dict[str, torch.Tensor]:
    """W′(z) of every matrix by a full singular value decomposition, in the parameter's layout."""
    adapted = {}
    for name, vector in z.items():
        target = engine.targets[name]
        u, sigma, vt = torch.linalg.svd(target.matrix.double(), full_matrices=False)
        w = ((u * (sigma * vector.double())) @ vt).float()
        adapted[name] = w.T if target.transposed else w
    return adapted


def in_weight_form(
    engine: TransformersEngine,
    mixtures: Sequence[Z | None],
    rows: Sequence[int],
    generates: Sequence[GenerateRequest],
    scores: Sequence[ScoreRequest],
) -> tuple[list[Generated], list[Scored]]:
    """One run per mixture over its own requests, in their order."""
    generated: dict[int, Generated] = {}
    scored: dict[int, Scored] = {}
    for index, z in enumerate(mixtures):
        own = [i for i, row in enumerate(rows) if row == index]
        with engine.applied(z):
            generated.update(zip(own, engine.generate([generates[i] for i in own]), strict=True))
            scored.update(zip(own, engine.score([scores[i] for i in own]), strict=True))
    return [generated[i] for i in range(len(rows))], [scored[i] for i in range(len(rows))]


def check_forms_agree(
    engine: TransformersEngine,
    mixtures: Sequence[Z | None],
    rows: Sequence[int],
    generates: Sequence[GenerateRequest],
    scores: Sequence[ScoreRequest],
) -> list[Generated]:
    """A mixed batch answers as one run per mixture in weight form does, and the base is the same before and after.

    Returns:
        The answers.
    """
    before = weights(engine)
    generated, scored = in_weight_form(engine, mixtures, rows, generates, scores)
    assert weights(engine) == before
    mixed = engine.generate(generates, mixtures, rows)
    assert mixed == generated
    for one, other in zip(engine.score(scores, mixtures, rows), scored, strict=True):
        assert abs(one.loglikelihood - other.loglikelihood) < TOLERANCE
        assert one.greedy == other.greedy
    for index, z in enumerate(mixtures):
        own = [i for i, row in enumerate(rows) if row == index]
        assert engine.generate([generates[i] for i in own], [z]) == [mixed[i] for i in own]
    assert weights(engine) == before
    return mixed
