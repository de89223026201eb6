"""The report on a grid: scores with intervals, what differs from the base and from the controls, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict

from t2.core import statistics
from t2.core.errors import ResultsError
from t2.core.record import AdaptationRecord, ExpertRef
from t2.core.results import Score, TaskResult
from t2.harness.compare.folder import GridFolder, Result
from t2.harness.compare.groups import Choice, Group, read_groups, with_choices
from t2.harness.compare.material import Material
from t2.harness.compare.methods import BASE, Cell
from t2.harness.compare.plan import Request

LEVEL = 0.95
ALPHA = 0.05
BYTES = 4
"""Of a number of an expert or adapter in memory and, mostly, in its file: float32."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(_Frozen):
    """A score over documents with its interval; None where the metric is no mean over documents, or there is one."""

    value: float | None
    low: float | None = None
    high: float | None = None


class Difference(_Frozen):
    """A row less another over the same documents; above 0 the row is better, whichever way the metric points.

    Attributes:
        value, low, high: mean over documents, and its interval.
        p: two-sided, of no difference.
        p_holm: the same adjusted for the tasks of the comparison.
        wins, losses: documents on which the row is better, and worse.
        test: how ``p`` was found.
        could_see: the smallest true difference that a comparison like this finds with a power of 0.8, before Holm.
    """

    value: float
    low: float
    high: float
    p: float
    p_holm: float
    wins: int
    losses: int
    test: str
    could_see: float | None

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, or nothing where it may be chance at the 5% level."""
        if self.p_holm > ALPHA or not self.value:
            return ""
        return "better" if self.value > 0 else "worse"


class Row(_Frozen):
    """A method under a control on one task, over its seeds.

    Attributes:
        seeds: of its cells; None where nothing was drawn.
        score: mean over documents, and for several seeds over these first.
        by_seed: the score of each seed.
        relative: the score over the base's, as the paper gives it.
        to_base: what differs from the base.
        to_controls: what differs from the same method under each control; of rows without control.
        pass1, pass2: seconds of wall clock, mean over seeds; to choose takes pass 1 of all configurations.
        numbers: in the experts that took part, the classifier included, or in the adapter of PEFT.
        bytes: that they take in float32.
        coefficients: of the mixture that a search found.
        no_signal: seeds under which the base was kept since nothing told mixtures apart.
        reused: the share of requests that a cell with the same mixture had answered before.
        records: of its cells.
        commands: the command lines of lm-eval that give its cells.
        samples: digests of the samples of its cells.
        folders: of its cells, under the folder of the comparison.
        choices: of a row that has no cells of its own, for each seed which row's it took, and why.
    """

    method: str
    control: str
    seeds: tuple[int | None, ...]
    score: Estimate
    by_seed: tuple[float | None, ...]
    relative: float | None
    to_base: Difference | None
    to_controls: dict[str, Difference]
    pass1: float
    pass2: float
    numbers: int
    bytes: int
    coefficients: int
    no_signal: int
    reused: float
    records: tuple[AdaptationRecord, ...]
    commands: tuple[str, ...]
    samples: tuple[str, ...]
    folders: tuple[str, ...]
    choices: tuple[Choice, ...] = ()

    @property
    def label(self) -> str:
        """The method and its control."""
        return self.method if self.control == "none" else f"{self.method}, {self.control}"


class TaskReport(_Frozen):
    """One task.

    Attributes:
        metric, filter, higher_is_better: what is reported.
        docs: scored documents.
        scores: of each row all metrics, by ``metric,filter``, mean over seeds.
    """

    task: str
    version: str
    metric: str
    filter: str
    higher_is_better: bool
    docs: int
    rows: tuple[Row, ...]
    scores: dict[str, dict[str, float | None]]


class Report(_Frozen):
    """A comparison.

    Attributes:
        base: the base model's name.
        fingerprint: digest of its adapted matrices.
        identity: digest of everything that determines its answers.
        dtype: of its weights.
        experts: all that took part, adapters of PEFT among them.
        settings: what all cells have in common.
        versions: of the programs.
        material: what pictures need beside the rows.
    """

    schema_version: int = 1
    base: str
    fingerprint: str
    identity: str | None = None
    dtype: str
    experts: tuple[ExpertRef, ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    tasks: tuple[TaskReport, ...]
    material: Material = Material()


def make_report(
    request: Request, folder: GridFolder, done: Sequence[tuple[Cell, Result]], material: Material
) -> Report:
    """The report on a grid that is done.

    Raises:
        ResultsError: lm-eval's files were changed, or cells of a task were not scored on the same documents.
    """
    read = {
        task: read_groups(folder, [(cell, result) for cell, result in done if cell.task == task])
        for task in dict.fromkeys(cell.task for cell, _ in done)
    }
    tasks = [_Task(with_choices(groups, request.methods), request, folder).rows() for groups in read.values()]
    first = done[0][1].record
    experts = {ref.digest: ref for _, result in done for ref in result.record.experts}
    versions = next(iter(read.values()))[0].scored[0].run.versions
    return Report(
        base=first.base.id,
        fingerprint=first.base.fingerprint,
        identity=first.base.identity,
        dtype=first.dtype,
        experts=tuple(experts.values()),
        settings=request.common(),
        versions=dict(versions),
        tasks=_with_holm(tasks),
        material=material,
    )


class _Task:
    """The rows of one task."""

    def __init__(self, groups: Sequence[Group], request: Request, folder: GridFolder) -> None:
        self.groups = groups
        self.folder = folder
        self.base = next(group for group in groups if group.method == BASE)
        run = self.base.scored[0].run
        self.run = run
        metric, filter_ = (request.model_args.get(name) for name in ("metric", "filter"))
        self.score = run.score(None if metric is None else str(metric), None if filter_ is None else str(filter_))
        for group in groups:
            for scored, cell in zip(group.scored, group.cells, strict=True):
                if scored.run.prompts_digest != run.prompts_digest:
                    raise ResultsError(
                        f"{folder.folder(cell)} was scored on other documents than the base; remove that folder"
                    )

    def rows(self) -> TaskReport:
        scores = {}
        for group in self.groups:
            label = group.method if group.control == "none" else f"{group.method}, {group.control}"
            keys = [score.key for score in group.scored[0].run.scores]
            scores[label] = {key: _mean([_find(one, key).score for one in group.scored]) for key in keys}
        return TaskReport(
            task=self.run.task,
            version=self.run.task_version,
            metric=self.score.metric,
            filter=self.score.filter,
            higher_is_better=self.score.higher_is_better,
            docs=self.run.docs,
            rows=tuple(self._row(group) for group in self.groups),
            scores=scores,
        )

    def _row(self, group: Group) -> Row:
        by_seed = tuple(_find(one, self.score.key).score for one in group.scored)
        value, base = _mean(by_seed), _find(self.base.scored[0], self.score.key).score
        controls = [
            other
            for other in self.groups
            if group.control == "none" and other.method == group.method and other.control != "none"
        ]
        found = {other.control: self._difference(group, other) for other in controls}
        records = tuple(result.record for result in group.results)
        requests = sum(result.requests for result in group.results)
        numbers = max(result.numbers for result in group.results)
        return Row(
            method=group.method,
            control=group.control,
            seeds=tuple(cell.seed for cell in group.cells),
            score=self._estimate(group, value),
            by_seed=by_seed,
            relative=value / base if value is not None and base else None,
            to_base=None if group.method == BASE else self._difference(group, self.base),
            to_controls={control: one for control, one in found.items() if one is not None},
            pass1=fmean(group.pass1),
            pass2=fmean(record.timing.pass2 for record in records),
            numbers=numbers,
            bytes=BYTES * numbers,
            coefficients=max(_searched(record) for record in records),
            no_signal=sum(record.no_signal for record in records),
            reused=sum(result.reused for result in group.results) / requests if requests else 0.0,
            records=records,
            commands=tuple(result.command for result in group.results),
            samples=tuple(result.samples_sha256 for result in group.results),
            folders=tuple(f"cells/{cell.name}" for cell in group.cells),
            choices=group.choices,
        )

    def _estimate(self, group: Group, value: float | None) -> Estimate:
        values = self._values(group)
        if values is None:
            return Estimate(value=value)
        found = statistics.mean_interval(list(values.values()), level=LEVEL)
        return Estimate(value=value, low=found.low, high=found.high)

    def _difference(self, group: Group, other: Group) -> Difference | None:
        values, others = self._values(group), self._values(other)
        if values is None or others is None or values.keys() != others.keys():
            return None
        found = statistics.paired(
            list(values.values()),
            [others[doc] for doc in values],
            higher_is_better=self.score.higher_is_better,
            level=LEVEL,
        )
        could = statistics.smallest_detectable(found)
        return Difference(
            value=found.difference,
            low=found.interval.low,
            high=found.interval.high,
            p=found.p,
            p_holm=found.p,
            wins=found.wins,
            losses=found.losses,
            test=found.test,
            could_see=could if math.isfinite(could) else None,
        )

    def _values(self, group: Group) -> dict[str, float] | None:
        """Return the mean over repeats and seeds for each document that has a score.

        Returns:
            None if the score is not a mean over documents, or the seeds scored different documents.
        """
        found = [_find(one, self.score.key) for one in group.scored]
        if any(score.aggregation != "mean" for score in found):
            return None
        columns = [one.by_document(score) for one, score in zip(group.scored, found, strict=True)]
        if len(columns[0]) < 2 or any(column.keys() != columns[0].keys() for column in columns):
            return None
        return {doc: fmean(fmean(column[doc]) for column in columns) for doc in sorted(columns[0])}


def _with_holm(tasks: Sequence[TaskReport]) -> tuple[TaskReport, ...]:
    """Each comparison's p adjusted for the tasks that it was made on."""
    families: dict[tuple[str, str, str], list[tuple[int, int, Difference]]] = {}
    for place, task in enumerate(tasks):
        for number, row in enumerate(task.rows):
            against = {**row.to_controls, **({BASE: row.to_base} if row.to_base else {})}
            for other, difference in against.items():
                families.setdefault((row.method, row.control, other), []).append((place, number, difference))
    adjusted: dict[tuple[int, int, str], Difference] = {}
    for (_, _, other), members in families.items():
        values = statistics.holm([difference.p for _, _, difference in members])
        for (place, number, difference), p in zip(members, values, strict=True):
            adjusted[place, number, other] = difference.model_copy(update={"p_holm": p})
    return tuple(
        task.model_copy(
            update={
                "rows": tuple(
                    row.model_copy(
                        update={
                            "to_base": adjusted.get((place, number, BASE)),
                            "to_controls": {control: adjusted[place, number, control] for control in row.to_controls},
                        }
                    )
                    for number, row in enumerate(task.rows)
                )
            }
        )
        for place, task in enumerate(tasks)
    )


def _find(result: TaskResult, key: str) -> Score:
    return next(score for score in result.run.scores if score.key == key)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _searched(record: AdaptationRecord) -> int:
    return len(record.mixtures[0].alpha) if record.history and record.mixtures else 0
