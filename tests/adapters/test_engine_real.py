"""The engine on SmolLM2-135M-Instruct: what holds on tiny models holds on a trained one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM

from t2.adapters.engine.base import GenerateRequest, ScoreRequest
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z
from t2.harness.base import DEMO_ID
from tests.adapters.checks import check_forms_agree, weights

PROMPTS = ["The capital of France is", "def add(a, b):\n", "2 + 3 =", "Once upon a time", "Water boils at"]
ANSWERS = [" Paris", "    return a + b", " 5", " there was", " 100"]


@pytest.fixture(scope="module")
def smollm(smollm2: HFLM) -> TransformersEngine:
    return TransformersEngine(smollm2.model, smollm2.tokenizer, DEMO_ID)


def some_z(engine: TransformersEngine, seed: int) -> Z:
    """Every matrix of a first, a middle and a last layer: all bases of the model would take a minute."""
    rng = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(1 + 0.15 * rng.standard_normal(target.rank)).float()
        for name, target in engine.targets.items()
        if target.layer in (0, 15, 29)
    }


def test_forms_and_rows_agree_and_the_base_comes_back(smollm: TransformersEngine) -> None:
    encode = smollm.tokenizer.encode
    contexts = [tuple(encode(prompt)) for prompt in PROMPTS]
    generates = [GenerateRequest(context, 12, ("\n\n",)) for context in contexts]
    scores = [ScoreRequest(context, tuple(encode(text))) for context, text in zip(contexts, ANSWERS, strict=True)]
    before = smollm.score(scores)
    answers = check_forms_agree(
        smollm, [some_z(smollm, 0), None, some_z(smollm, 1)], [0, 1, 2, 0, 2], generates, scores
    )
    base = smollm.generate(generates)
    assert [answer == other for answer, other in zip(answers, base, strict=True)].count(True) < len(PROMPTS)
    assert "Paris" in smollm.tokenizer.decode(list(base[0].tokens))
    assert smollm.score(scores) == before


def test_ones_are_the_base_bit_for_bit(smollm: TransformersEngine) -> None:
    ones = {name: torch.ones(rank) for name, rank in smollm.ranks().items()}
    request = [ScoreRequest(tuple(smollm.tokenizer.encode(PROMPTS[0])), tuple(smollm.tokenizer.encode(ANSWERS[0])))]
    before, digest = smollm.score(request), weights(smollm)
    assert smollm.score(request, [ones]) == before
    with smollm.applied(ones):
        assert smollm.score(request) == before
        assert weights(smollm) == digest
