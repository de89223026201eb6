"""Pass 2 in batches whose rows have mixtures of their own, where that is faster than one mixture after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z
from t2.harness.adaptation import Runtime
from t2.harness.args import DISPATCHING
from t2.harness.generation import Generations
from t2.harness.rules import rules_of


def answer_in_rows(
    runtime: Runtime, requests: Sequence[Instance], mixtures: Sequence[Z | None], rows: Sequence[int]
) -> list[str] | None:
    """Generated answers, each under a mixture of its own, which in float32 are those of lm-eval's model.

    Args:
        runtime: model, engine and settings.
        requests: of the type ``generate_until``.
        mixtures: the distinct mixtures.
        rows: for each request the index of its mixture.

    Returns:
        None if lm-eval's model must answer, one mixture after another. This is so if it costs less, if answers could
        differ by rounding and ``mixed`` does not allow that, if the model computes differently in a batch, if answers
        are sampled (lm-eval's model uses another generator), if prompts hold pictures, if the strategy dispatches no
        prompts, or if a request or the generation configuration uses a feature that the engine does not implement.
    """
    engine, lm, mixed = runtime.engine, runtime.lm, runtime.settings.mixed
    if runtime.settings.adapt not in DISPATCHING or mixed == "never":
        return None
    if not isinstance(engine, TransformersEngine) or getattr(lm, "MULTIMODAL", False):
        return None
    generations, rules = Generations(lm), rules_of(lm)
    exact = engine.precision == "float32" and getattr(lm, "mixed_precision_dtype", None) is None
    if (mixed == "exact" and not exact) or any(generations.samples(request) for request in requests):
        return None
    if not generations.same_in_batches(requests):
        return None
    asked = [generations.request(request) for request in requests]
    size: Any = lm.batch_size
    with rules.arithmetic():
        if not engine.pads(asked):
            return None
        if not engine.faster_in_rows(asked, mixtures, rows, size if isinstance(size, int) else None):
            return None
        found = engine.generate(asked, mixtures, rows, progress="Running generate_until requests")
    return [generations.answer(request, one) for request, one in zip(requests, found, strict=True)]
