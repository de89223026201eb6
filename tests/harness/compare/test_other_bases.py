"""Experts of another base model in a grid: in order, shuffled, and searched with and without the base's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2.core.errors import ArgumentError, ExpertMismatchError
from t2.core.expertfile import read_expert, write_expert
from t2.harness.compare.report import Report
from t2.harness.compare.running import compare, run
from tests.harness import tiny
from tests.harness.compare.grids import request

METHODS = "expert,cem(experts=own|foreign|own+foreign)"
TASKS = {"tiny_choice": tiny.choice_task}


def save_other(folder: Path, **shape: int) -> str:
    """Two experts of another model, one called as one of the first model's; a deeper model has a role more."""
    engine = tiny.engine_of(tiny.save_model(folder / "other", seed=5, **shape))
    files = [
        tiny.save_expert(folder / "theirs" / f"{name}.safetensors", engine, seed, domain=name)
        for seed, name in enumerate(("law", "alpha"))
    ]
    if shape:
        law = read_expert(files[0])
        extra = "model.layers.0.mlp.extra.weight"
        manifest = law.manifest.model_copy(update={"targets": {**law.manifest.targets, extra: 3}})
        write_expert(files[0], manifest, {**law.vectors, extra: np.ones(3, dtype=np.float32)})
    return "+".join(map(str, files))


def table(text: str, title: str) -> dict[str, list[str]]:
    """The rows of a table in Markdown, by their first cell."""
    lines = text.partition(f"{title}\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize(
    ("transfer", "shape"), [("strict", {}), ("resample", {"layers": 4, "hidden": 48})], ids=["equal", "different"]
)
def test_rows_of_both_models_experts_in_one_grid(
    transfer: str, shape: dict[str, int], tiny_folder: Path, experts: str, tmp_path: Path
) -> None:
    theirs = save_other(tmp_path, **shape)
    asked = request(tiny_folder, METHODS, tasks=TASKS, experts=f"alpha+beta+{theirs}", transfer=transfer)
    report = compare(asked, tmp_path / "grid")
    assert Report.model_validate_json((tmp_path / "grid" / "report.json").read_bytes()) == report
    rows = {row.label: row for row in report.tasks[0].rows}
    own = [ref for ref in report.experts if ref.transferred is None]
    foreign = [ref for ref in report.experts if ref.transferred is not None]
    assert [ref.name[:5] for ref in own] == ["alpha", "beta"]
    assert [ref.name[:5] for ref in foreign] == ["law", "alpha"]
    labels = [
        *(f"expert {ref.name}" for ref in own),
        *(f"expert {ref.name} of other" for ref in foreign),
        *(f"cem(experts={words})" for words in ("own", "foreign", "own+foreign")),
    ]
    assert list(rows) == ["base", *(label + control for label in labels for control in ("", ", shuffle"))]
    taking = {
        "cem(experts=own)": own,
        "cem(experts=foreign)": foreign,
        "cem(experts=own+foreign)": own + foreign,
        f"expert {foreign[0].name} of other": foreign[:1],
    }
    for label, refs in taking.items():
        assert [ref.digest for ref in rows[label].records[0].experts] == [ref.digest for ref in refs]
        assert list(rows[label].to_controls) == ["shuffle"]
    # The expert acts, and where its numbers stand matters.
    first = rows[f"expert {foreign[0].name} of other"]
    assert len({first.samples, rows[f"{first.label}, shuffle"].samples, rows["base"].samples}) == 3

    told = table((tmp_path / "grid" / "report.md").read_text(), "## Experts")
    matrices = len(tiny.engine_of(tiny_folder).ranks())
    assert told["beta"][1:3] == ["tiny", "–"]
    assert told["law"][1].startswith("other (")
    assert told["law"][2] == f"{matrices} matrices" + (", without mlp.extra.weight" if shape else "")
    page = (tmp_path / "grid" / "report.html").read_text()
    assert "law of other: how components move" in page


@pytest.mark.parametrize(
    ("methods", "whose", "args", "error", "why"),
    [
        (METHODS, "both", {}, ExpertMismatchError, "so transfer=strict applies it all the same"),
        ("cem(experts=law+beata)", "both", {"transfer": "strict"}, ArgumentError, "did you mean 'beta'?"),
        (
            "cem(experts=foreign)",
            "own",
            {"transfer": "strict"},
            ArgumentError,
            "to this base model; name others",
        ),
        ("cem,mix(experts=own)", "theirs", {"transfer": "strict"}, ArgumentError, "belongs to another base model"),
        ("cem,base(experts=own)", "both", {}, ArgumentError, "the base takes no arguments"),
    ],
)
def test_what_cannot_be_taken_over_is_refused_in_a_line(
    methods: str,
    whose: str,
    args: dict[str, Any],
    error: type[Exception],
    why: str,
    tiny_folder: Path,
    experts: str,
    tmp_path: Path,
) -> None:
    theirs = save_other(tmp_path)
    named = {"own": "alpha+beta", "theirs": theirs, "both": f"alpha+beta+{theirs}"}[whose]
    with pytest.raises(error) as refused:
        run(request(tiny_folder, methods, tasks=TASKS, experts=named, **args), tmp_path / "grid")
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "grid" / "grid.json").exists()
