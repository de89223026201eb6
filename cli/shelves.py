"""What the commands on experts share: which of file and registry a text means, and how each is shown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from t2.core.curve import CurvePoint
from t2.core.errors import ArgumentError
from t2.core.expertfile import ExpertFile
from t2.core.references import METRIC_PATTERN, is_name
from t2.harness.catalogue import FILE_NAME, find_file, own_experts
from t2.harness.shipped import PREFIX, demo_dir
from t2.registry.schemas import MetricRange

Registry = Annotated[
    str | None,
    typer.Option("--registry", help="The registry: a URL or a folder; else T2_REGISTRY_URL, else your own."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 40
_RANGE = re.compile(r"(?P<name>[^<>=]+?)\s*(?P<sign>>=|<=|=)\s*(?P<value>\S+)")


def local_file(text: str) -> Path | None:
    """The file of this machine that a text means; None where it means the registry.

    What exists as a path, or ends as expert files do, is a path; with ``@`` it is a reference; then a name in
    ``T2_EXPERTS_DIR`` goes before one in the registry.

    Raises:
        ArgumentError: a folder without the file of one expert.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        found = find_file(str(path))
        return found if found is not None else path / FILE_NAME
    if path.exists() or text.endswith(".safetensors"):
        return path
    if "@" in text:
        return None
    own = own_experts().get(text)
    if own is not None:
        return own
    return None if is_name(text) else path


def describe_file(file: Path, expert: ExpertFile) -> dict[str, Any]:
    """A file as ``--json`` tells it."""
    shipped = file.parent.parent == demo_dir()
    return {
        "path": str(file),
        "name": f"{PREFIX}{file.parent.name}" if shipped else expert.manifest.name,
        "digest": expert.digest,
        "distance": distance(expert),
        "manifest": expert.manifest.model_dump(mode="json"),
    }


def distance(expert: ExpertFile) -> dict[str, float]:
    """How far an expert's values are from the base, where they are 1."""
    offsets = np.abs(np.concatenate(list(expert.vectors.values())).astype(np.float64) - 1.0)
    return {"mean": float(offsets.mean()), "max": float(offsets.max())}


def curve_fields(points: Sequence[CurvePoint], total: int) -> list[tuple[str, object]]:
    """A reward curve in a line for each split."""
    fields: list[tuple[str, object]] = []
    for split in ("train", "validation"):
        scores = [point.score for point in points if point.split == split]
        if scores:
            bars = sparkline(scores)
            fields.append((f"{split} score", f"{bars} {scores[0]:.4g} → {scores[-1]:.4g}, best {max(scores):.4g}"))
    return [*fields, ("curve", f"{total} points")] if total else []


def curve_rows(points: Sequence[CurvePoint]) -> tuple[Sequence[str], list[Sequence[object]]]:
    """Header and rows of a table of points."""
    header = ("step", "split", "reward", "score", "kl", "learning rate", "gradient norm", "seconds")
    cells = [(p.step, p.split, p.reward, p.score, p.kl, p.learning_rate, p.gradient_norm, p.seconds) for p in points]
    return header, [["-" if c is None else f"{c:.6g}" if isinstance(c, float) else c for c in row] for row in cells]


def sparkline(values: Sequence[float]) -> str:
    """Values as a row of at most 40 bars, each the mean of those it stands for."""
    parts = np.array_split(np.array(values, dtype=np.float64), min(len(values), _WIDTH))
    means = [float(part.mean()) for part in parts]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def parse_ranges(texts: Sequence[str]) -> tuple[MetricRange, ...]:
    """Conditions such as ``validation.score>=0.5``; two on one metric hold together.

    Raises:
        ArgumentError: a text is none.
    """
    ranges: dict[str, MetricRange] = {}
    for text in texts:
        match = _RANGE.fullmatch(text.strip())
        value = _number(match["value"]) if match else None
        if match is None or value is None or not re.fullmatch(METRIC_PATTERN, match["name"]):
            raise ArgumentError(f"--metric {text!r}: write a metric, >=, <= or =, and a number: validation.score>=0.5")
        known = ranges.setdefault(match["name"], MetricRange(name=match["name"]))
        update = {"minimum": value} if match["sign"] != "<=" else {}
        update |= {"maximum": value} if match["sign"] != ">=" else {}
        ranges[match["name"]] = known.model_copy(update=update)
    return tuple(ranges.values())


def parse_metrics(texts: Sequence[str]) -> dict[str, float]:
    """Metrics such as ``acc=0.75``.

    Raises:
        ArgumentError: a text is none.
    """
    found = {}
    for text in texts:
        name, equals, number = text.partition("=")
        value = _number(number)
        if not equals or value is None or not re.fullmatch(METRIC_PATTERN, name):
            raise ArgumentError(f"--metric {text!r}: write a name, = and a number: acc=0.75")
        found[name] = value
    return found


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None
