"""The pictures of a report: what differs, α, searches, dispatch, and what experts and base are made of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from statistics import fmean

from t2.core.record import AdaptationRecord
from t2.harness.compare import tables
from t2.harness.compare.material import SHARES, Material
from t2.harness.compare.report import Row, TaskReport
from t2.harness.compare.svg import Line, Point, bars, intervals, lines, shades

_QUARTER = SHARES.index(1 / 4)


def of_task(task: TaskReport) -> Iterator[str]:
    """Scores and differences, then what each search and dispatch did, in the order of the rows."""
    scored = [row for row in task.rows if row.score.value is not None]
    percent = tables.is_share(task)
    if scored:
        yield intervals(
            f"{task.task}: scores with 95% intervals",
            f"{task.metric}{tables.unit(task)}",
            [_score(task, row) for row in scored],
            zero=next((row.score.value for row in scored), None),
            percent=percent,
        )
    compared = [row for row in task.rows if row.to_base is not None]
    if compared:
        yield intervals(
            f"{task.task}: less the base, with 95% intervals",
            f"difference of {task.metric}{', points' if percent else ''}; orange: more than chance after Holm",
            [_to_base(task, row) for row in compared],
            percent=percent,
        )
    for row in (row for row in task.rows if not row.choices):
        for seed, record in zip(row.seeds, row.records, strict=True):
            yield from of_record(record, row.label if seed is None else f"{row.label}, seed {seed}")


def of_record(record: AdaptationRecord, label: str) -> Iterator[str]:
    """The confusion matrix of a dispatch, or the course of a search, and α."""
    calibration = record.calibration
    if calibration is not None and calibration.confusion:
        yield confusion(record, label)
    if record.history:
        yield history(record, label)
    if record.history or len(record.mixtures) > 1:
        alpha = mean_alpha(record)
        if any("@" in name for name in alpha):
            yield grouped_alpha(alpha, label)
        elif alpha:
            many = len(record.mixtures) > 1
            yield bars(f"{label}: α" + (", mean over requests" if many else ""), "coefficient of the expert", alpha)


def confusion(record: AdaptationRecord, label: str) -> str:
    """For each domain the share and number of its held-out prompts that were given each name; then the scored ones'."""
    calibration = record.calibration
    assert calibration is not None
    rows: dict[str, list[float]] = {}
    texts: dict[str, list[str]] = {}
    known = [*((name, given) for name, given in calibration.confusion.items())]
    known += [(f"scored: {name}", given) for name, given in calibration.scored.items()]
    for name, given in known:
        counts = [given.get(other, 0) for other in calibration.labels]
        total = sum(counts) or 1
        rows[name] = [count / total for count in counts]
        texts[name] = [f"{count}" for count in counts]
    title = f"{label}: domains that prompts were given"
    return shades(title, "name that was given", "domain", calibration.labels, rows, texts=texts, span=(0.0, 1.0))


def history(record: AdaptationRecord, label: str) -> str:
    """Best and mean score on the adaptation documents by generation, with the base's."""
    best = [(i + 1.0, one.best) for i, one in enumerate(record.history) if one.best is not None]
    mean = [(i + 1.0, one.mean) for i, one in enumerate(record.history) if one.mean is not None]
    series = [Line("best so far", best, dots=True), Line("mean of the generation", mean, dots=True)]
    before = record.held_out.before if record.held_out is not None else None
    if before is not None:
        series.append(Line("base", [(1.0, before), (float(max(2, len(record.history))), before)], dashed=True))
    metric = record.objective.metric if record.objective is not None else "score"
    docs = f" on {record.held_out.docs} adaptation documents" if record.held_out is not None else ""
    shown = [line for line in series if line.points]
    return lines(f"{label}: the search", "generation", f"{metric}{docs}", shown)


def mean_alpha(record: AdaptationRecord) -> dict[str, float]:
    """α by expert (and group), the mean over requests where prompts have mixtures of their own."""
    total = sum(used.requests for used in record.mixtures) or 1
    names = dict.fromkeys(name for used in record.mixtures for name in used.alpha)
    return {name: sum(used.alpha.get(name, 0.0) * used.requests for used in record.mixtures) / total for name in names}


def grouped_alpha(alpha: Mapping[str, float], label: str) -> str:
    """α by expert and layer; matrices of a layer count by their mean."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, value in alpha.items():
        expert, _, group = name.rpartition("@")
        layer = re.search(r"\d+", group)
        found.setdefault(expert, {}).setdefault(layer[0] if layer else group, []).append(value)
    columns = sorted({layer for row in found.values() for layer in row}, key=lambda each: (len(each), each))
    rows = {expert: [fmean(row.get(layer, [0.0])) for layer in columns] for expert, row in found.items()}
    return shades(f"{label}: α per expert and layer", "layer", "expert", columns, rows)


def of_material(material: Material) -> Iterator[str]:
    """Reward curves, profiles of z, and spectra."""
    if material.curves:
        for split in ("train", "validation"):
            series = [
                Line(
                    one.expert, [(float(step), reward) for step, of, reward, _ in one.points if of == split], dots=True
                )
                for one in material.curves
            ]
            shown = [line for line in series if line.points]
            if shown:
                yield lines(f"Reward curves: {split} documents", "gradient step", "mean reward", shown)
    for one in material.profiles:
        band = list(zip(one.low, one.high, strict=True))
        points = list(zip(one.places, one.mean, strict=True))
        yield lines(
            f"{one.expert}: how components move",
            "place of the component, from the largest σ (0) to the smallest (1)",
            "z − 1: mean, and band of 80%",
            [Line("z − 1", points, band=band)],
        )
    if material.profiles:
        yield lines(
            "How far experts move by layer",
            "layer",
            "root mean square of z − 1",
            [
                Line(one.expert, [(float(layer), value) for layer, value in one.layers.items()], dots=True)
                for one in material.profiles
                if one.layers
            ],
        )
    yield from _spectra(material)


def _spectra(material: Material) -> Iterator[str]:
    modules = list(dict.fromkeys(one.module for one in material.spectra))
    if not modules:
        return
    by_share, by_layer = [], []
    for module in modules:
        own = sorted((one for one in material.spectra if one.module == module), key=lambda one: one.layer)
        shares = [fmean(one.sigma[index] for one in own) for index in range(len(SHARES))]
        by_share.append(Line(module, list(zip(SHARES, shares, strict=True)), dots=True))
        by_layer.append(Line(module, [(float(one.layer), one.sigma[_QUARTER]) for one in own], dots=True))
    yield lines(
        "Spectra: Σσ in the top r components, by module", "r over the rank of the matrix", "share of Σσ", by_share
    )
    yield lines("Spectra: Σσ in the top quarter of the components, by layer", "layer", "share of Σσ", by_layer)


def _score(task: TaskReport, row: Row) -> Point:
    value = row.score.value
    assert value is not None
    return Point(row.label, value, row.score.low, row.score.high, tables.value_text(task, value))


def _to_base(task: TaskReport, row: Row) -> Point:
    one = row.to_base
    assert one is not None
    note = f"{tables.value_text(task, one.value, sign=True)}  p {tables.p_value(one.p_holm)}"
    return Point(row.label, one.value, one.low, one.high, note, strong=bool(one.verdict))
