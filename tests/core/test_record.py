"""Records of equal adaptations have equal digests, and are JSON whatever the metric was."""

from __future__ import annotations

import math
from typing import Any

from t2.core.digests import canonical_json
from t2.core.manifest import BaseModelRef
from t2.core.record import AdaptationRecord, Considered, Generation, HeldOut, Timing, UsedMixture


def record(**fields: Any) -> AdaptationRecord:
    values: dict[str, Any] = {
        "key": "k",
        "task": "t2_gsm8k",
        "task_version": "1.0",
        "strategy": "cem",
        "base": BaseModelRef(id="tiny", fingerprint="0" * 64),
        "dtype": "float32",
        "mixtures": (UsedMixture(alpha={"a": 0.5}, requests=3),),
        **fields,
    }
    return AdaptationRecord(**values)


def test_the_digest_of_a_record_leaves_out_time_and_command() -> None:
    first = record()
    assert record(timing=Timing(pass1=3.5, pass2=1), command="lm_eval --model t2").digest() == first.digest()
    changes = {"key": "l", "no_signal": True, "note": "x", "dispatch": {"math": 1}, "adaptation_docs": ("0" * 12,)}
    digests = {record(**{field: value}).digest() for field, value in changes.items()}
    assert len(digests | {first.digest()}) == 1 + len(changes)


def test_the_digest_leaves_out_what_a_machine_predicts() -> None:
    def judged(**fields: Any) -> AdaptationRecord:
        return record(considered=(Considered(strategy="cem", score=0.5, docs=10, cost=60, chosen=True, **fields),))

    assert judged(seconds=3.5).digest() == judged(seconds=70.0).digest() == judged().digest()
    assert judged(reason="cheaper").digest() != judged().digest()
    assert judged().digest() != record().digest()


def test_a_record_comes_back_from_json() -> None:
    whole = record(history=(Generation(best=0.5, mean=0.25, evaluations=4),), settings={"shots": 10})
    assert AdaptationRecord.model_validate_json(whole.model_dump_json()) == whole


def test_a_metric_that_is_no_number_is_null_in_a_record() -> None:
    whole = record(
        history=(Generation(best=-math.inf, mean=math.nan, evaluations=4),),
        held_out=HeldOut(docs=3, before=math.nan, after=0.5),
    )
    assert whole.history[0] == Generation(best=None, mean=None, evaluations=4)
    assert whole.held_out == HeldOut(docs=3, before=None, after=0.5)
    assert (
        AdaptationRecord.model_validate_json(canonical_json(whole.model_dump(mode="json"))).digest() == whole.digest()
    )
