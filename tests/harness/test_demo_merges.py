"""What a merge of the demo experts leaves unexplained: the figures that the limits of ``t2 expert extract`` rest on."""

from __future__ import annotations

import math

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from t2.adapters.convert.pair import DROWNED, ROUNDING, TOLERANCE, fit
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import load_expert
from t2.harness.catalogue import find_expert


@pytest.mark.parametrize("name", ["code", "math", "reasoning"])
def test_rounding_is_all_that_a_merge_leaves(smollm2: HFLM, name: str) -> None:
    engine = TransformersEngine(smollm2.model, smollm2.tokenizer, "demo")
    expert = load_expert(find_expert(f"demo/{name}"))
    few = {matrix: expert.z[matrix] for matrix in list(expert.z)[::41]}
    with engine.applied(few):
        merged = {matrix: engine.targets[matrix].parameter.data.clone() for matrix in few}
    whole = [fit(engine, matrix, value) for matrix, value in merged.items()]
    assert max(found.relative for found in whole) < 1e-5 < TOLERANCE
    rounded = [fit(engine, matrix, value.to(torch.bfloat16)) for matrix, value in merged.items()]
    assert all(0.95 < found.residual / found.rounding < 1.05 < ROUNDING for found in rounded)
    residual, change = (math.hypot(*values) for values in zip(*((f.residual, f.change) for f in rounded), strict=True))
    assert TOLERANCE < residual / change < DROWNED
    for (matrix, vector), found in zip(few.items(), rounded, strict=True):
        assert float((found.z - vector).abs().max()) < 0.2, matrix
        assert float((found.z - vector).square().mean().sqrt()) < 0.01, matrix
