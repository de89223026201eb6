"""What a search shows: one line on a terminal, few lines in a log, nothing of the engine's own bars."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from t2.adapters import progress
from t2.adapters.engine.base import GenerateRequest
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z
from t2.adapters.search import Budget
from t2.adapters.strategies import STRATEGIES, Plan, Score
from tests.adapters.conftest import expert_of, random_z
from tests.adapters.test_few_shot import Docs, many
from tests.adapters.test_strategies import job

Raced = type("Raced", (Docs,), {"bounds": (0.0, 1.0)})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Asking(Raced):  # type: ignore[misc, valid-type]
    """A scorer that really asks the engine, with a text for its bar."""

    def __init__(self, engine: TransformersEngine) -> None:
        super().__init__(8, lambda x, doc: float(int(abs(x) * 1000 + doc) % 3 == 0))
        self.engine = engine

    @staticmethod
    def number(z: Z | None) -> float:
        return 0.0 if z is None else float(next(iter(z.values()))[0])

    def evaluate(self, mixtures: Sequence[Z | None], docs: Sequence[int] | None = None) -> list[Score]:
        shown = list(range(self.docs) if docs is None else docs)
        asked = [GenerateRequest((5 + doc, 6), 2) for _ in mixtures for doc in shown]
        self.engine.generate(asked, mixtures, [m for m in range(len(mixtures)) for _ in shown], progress="inner bar")
        found: list[Score] = super().evaluate(mixtures, docs)
        return found


def search(engine: TransformersEngine, scorer: Any, experts: Any, **options: Any) -> Plan:
    settings: dict[str, Any] = {"population": 6, "generations": 3, "space": "delta", **options}
    work = job(engine, experts, scorer, **settings)
    return STRATEGIES["cem"]().plan(replace(work, progress=True))


@pytest.fixture
def small(llama: TransformersEngine) -> TransformersEngine:
    """Batches of a few rows, so that a generation takes several."""
    return TransformersEngine(llama.model, llama.tokenizer, "small", batch_size=5)


def test_a_terminal_shows_one_line_for_a_search(small: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "EVERY", (0.0, 60.0))
    plan = search(small, Asking(small), [expert_of(small, k, random_z(small, i)) for i, k in enumerate("ab")])
    text = terminal.getvalue()
    assert "inner bar" not in text
    # Neither a second line nor a cursor that moves up from one.
    assert text.count("\n") == 1
    assert "\x1b[A" not in text
    looks = [look.strip() for look in text.split("\r") if look.strip()]
    searching = [look for look in looks if look.startswith("tiny: searching: ")]
    assert any(re.search(r"answers \d+/\d+$", look) for look in searching)
    assert "0/18 mixtures" in searching[0]
    assert plan.held_out is not None
    base, best = f"base {plan.held_out.before:.4g}", f"best {plan.held_out.after:.4g}"
    assert any(f"generation 1/3, best {plan.held_out.before:.4g}, {base}" in look for look in searching)
    assert re.search(
        rf"^tiny: searching: 18/18 mixtures \|.*\| \d\d:\d\d, 00:00 left, generation 3/3, {best}, {base}$", looks[-1]
    )
    counted = [int(re.findall(r"(\d+)/\d+ mixtures", look)[0]) for look in searching]
    assert counted == sorted(counted)
    assert any(0 < count < 18 for count in counted)
    assert all(re.search(r"\d\d:\d\d left|\? left", look) for look in searching)


def test_a_log_gets_a_line_now_and_then(
    small: TransformersEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = [expert_of(small, k, random_z(small, i)) for i, k in enumerate("ab")]
    plan = search(small, Asking(small), experts)
    assert plan.held_out is not None
    (line,) = capsys.readouterr().err.splitlines()
    best, base = plan.held_out.after, plan.held_out.before
    assert re.fullmatch(
        rf"t2: tiny: searching: 18/18 mixtures, 00:\d\d, 00:00 left, generation 3/3, best {best:.4g}, base {base:.4g}",
        line,
    )
    small.generate([GenerateRequest((5, 6), 2)] * 12, progress="alone")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "EVERY", (0.2, 0.0))
    search(small, Asking(small), experts)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 10
    assert all(re.match(r"t2: tiny: [a-z ]+: \d+/\d+ mixtures, ", line) for line in lines)


def test_a_budget_bounds_what_is_to_come(llama: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "EVERY", (0.0, 60.0))
    scorer = Docs(4, lambda x, doc: x)
    search(llama, scorer, many(llama, 2), population=5, generations=100, budget=Budget(evaluations=20))
    totals = [int(total) for total in re.findall(r"searching: \d+/(\d+) mixtures", terminal.getvalue())]
    assert totals[0] == 500
    assert all(total < 30 for total in totals[3:])


def test_many_experts_are_chosen_in_the_same_line(llama: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "EVERY", (0.0, 60.0))
    search(llama, Docs(8, lambda x, doc: x), many(llama, 12), preselect=3)
    text = terminal.getvalue()
    assert text.count("\n") == 1
    assert (
        text.index("tiny: first mixtures: ") < text.index("tiny: choosing experts: ") < text.index("tiny: searching: ")
    )


def test_an_error_ends_the_line(llama: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)

    def fail(mixtures: object, docs: object = None) -> list[Score]:
        raise KeyboardInterrupt

    scorer = Docs(4, lambda x, doc: x)
    monkeypatch.setattr(scorer, "evaluate", fail)
    with pytest.raises(KeyboardInterrupt):
        search(llama, scorer, many(llama, 2))
    assert terminal.getvalue().endswith("\n")
    with progress.request_bar("free again", 3) as alone:
        alone.update(3)
    assert "free again" not in terminal.getvalue()  # it took less than a second
