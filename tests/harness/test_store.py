from __future__ import annotations

from pathlib import Path

import pytest

from t2.core.errors import StorageError
from t2.core.record import AdaptationRecord, Considered, HeldOut, ModelRef, Timing, UsedMixture
from t2.harness import store
from t2.harness.summary import format_summary


def record(**changes: object) -> AdaptationRecord:
    base = AdaptationRecord(
        key="k" * 64,
        task="arc",
        task_version="1.0",
        strategy="cem",
        base=ModelRef(id="tiny", fingerprint="0" * 64),
        dtype="float32",
        held_out=HeldOut(docs=10, before=0.4, after=0.6),
        mixtures=(UsedMixture(alpha={"math": 0.25, "code": 0.0, "reasoning": 0.75}, requests=40),),
        note="best of 30 mixtures",
        timing=Timing(pass1=12.25, pass2=3.5),
    )
    return base.model_copy(update=changes)


def test_what_is_stored_is_loaded() -> None:
    plan = store.StoredPlan(alphas=({"math": 1.0}, {}), rows=(0, 1, 0))
    path = store.save(store.Stored(record=record(), plan=plan))
    assert path == store.path_of("k" * 64)
    assert store.load("k" * 64) == store.Stored(record=record(), plan=plan)
    assert store.load("l" * 64) is None


def test_a_file_cut_inside_a_character_counts_as_absent() -> None:
    stored = store.Stored(record=record(note="best, α"), plan=store.StoredPlan(alphas=({},), rows=(0,)))
    path = store.save(stored)
    data = path.read_bytes()
    path.write_bytes(data[: data.index("α".encode()) + 1])
    assert store.load("k" * 64) is None


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match=r"cannot write .*adaptations"):
        store.save(store.Stored(record=record(), plan=store.StoredPlan(alphas=({},), rows=(0,))))


def test_the_summary_names_what_was_adapted() -> None:
    text = format_summary([record()], {"arc": Path("somewhere/r.json")})
    for part in ("cem", "math 0.25, reasoning 0.75", "0.4 → 0.6 (10 docs)", "12.2 s", "3.5 s", "somewhere/r.json"):
        assert part in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in rows}) == 1
    assert "code 0" not in text


def test_the_summary_tells_no_signal_controls_and_dispatch() -> None:
    mixtures = (UsedMixture(alpha={"math": 1.0}, requests=3), UsedMixture(alpha={}, requests=5))
    text = format_summary([record(no_signal=True, control="shuffle", mixtures=mixtures, task="gsm")], {})
    assert "0.4 → 0.6 (10 docs), NO SIGNAL" in text
    assert "cem (shuffle)" in text
    assert "3× math 1; 5× base" in text


def test_the_summary_says_what_auto_chose() -> None:
    considered = (Considered(strategy="none"), Considered(strategy="mix", chosen=True))
    text = format_summary([record(strategy="auto", considered=considered)], {})
    assert "|auto: mix" in text


def test_the_summary_of_many_coefficients_stays_short() -> None:
    many = {f"math@layer{i}": 0.5 for i in range(90)}
    text = format_summary([record(mixtures=(UsedMixture(alpha=many, requests=1),))], {})
    assert "… 82 more" in text
    assert max(map(len, text.splitlines())) < 400
