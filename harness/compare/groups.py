"""Rows of a grid that is done: the cells of a method under a control, and rows that choose among others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from t2.core.errors import ResultsError
from t2.core.record import AdaptationRecord
from t2.core.results import TaskResult, read_results
from t2.harness.compare.folder import GridFolder, Result
from t2.harness.compare.methods import Cell, Method


class Choice(BaseModel):
    """What a user would have got who chose a configuration by its score on the adaptation documents.

    Attributes:
        seed: under which.
        taken: the configuration's label.
        held_out: the score of each on the adaptation documents.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int | None
    taken: str
    held_out: dict[str, float | None]


@dataclass(frozen=True)
class Group:
    """The cells of a row, with what lm-eval wrote of them.

    Attributes:
        method: the label of the row.
        control: of its experts.
        cells, results, scored: one for each seed.
        pass1: seconds of each seed.
        choices: for each seed, of a row that takes the cells of others.
    """

    method: str
    control: str
    cells: tuple[Cell, ...]
    results: tuple[Result, ...]
    scored: tuple[TaskResult, ...]
    pass1: tuple[float, ...]
    choices: tuple[Choice, ...] = ()


def read_groups(folder: GridFolder, done: Iterable[tuple[Cell, Result]]) -> list[Group]:
    """The rows of one task.

    Raises:
        ResultsError: lm-eval's files were changed.
    """
    found: dict[tuple[str, str], list[tuple[Cell, Result, TaskResult]]] = {}
    for cell, result in done:
        (scored,) = read_results(folder.folder(cell) / result.results)
        found.setdefault((cell.method, cell.control), []).append((cell, result, scored))
    groups = []
    for (method, control), members in found.items():
        cells, results, scored_ = zip(*members, strict=True)
        seconds = tuple(result.record.timing.pass1 for result in results)
        groups.append(Group(method, control, cells, results, scored_, seconds))
    return groups


def with_choices(groups: Sequence[Group], methods: Sequence[Method]) -> list[Group]:
    """Rows with those that choose among them, each after the last that it may take.

    Args:
        groups: of one task.
        methods: of the grid.

    Raises:
        ResultsError: configurations were fitted to different documents.
    """
    found = list(groups)
    for choice in dict.fromkeys(method.choice for method in methods if method.choice is not None):
        labels = [method.label for method in methods if method.choice == choice]
        among = [group for group in found if group.method in labels]
        place = 1 + max(place for place, group in enumerate(found) if group.method in labels)
        controls = dict.fromkeys(group.control for group in among)
        found[place:place] = [
            _chosen(choice, [group for group in among if group.control == control]) for control in controls
        ]
    return found


def choose(records: Sequence[AdaptationRecord]) -> int:
    """The place of the configuration with the best score on the adaptation documents, the first of equals.

    Nothing else is looked at: not what any of them scored on the documents of the result.

    Args:
        records: of configurations on one task under one seed.

    Raises:
        ResultsError: they were fitted to different documents, so that their scores are not comparable.
    """
    first = records[0]
    for record in records:
        if (record.adaptation_docs, record.objective) != (first.adaptation_docs, first.objective):
            raise ResultsError(
                f"{first.task}: configurations to choose from were fitted to different documents; name them apart "
                "with --methods, or do the comparison again in another folder"
            )
    sign = 1 if first.objective is None or first.objective.higher_is_better else -1
    scores = [held_out(record) for record in records]
    signed = [float("-inf") if score is None else sign * score for score in scores]
    return signed.index(max(signed))


def held_out(record: AdaptationRecord) -> float | None:
    """The score of what answered on the adaptation documents."""
    return None if record.held_out is None else record.held_out.after


def _chosen(choice: str, among: Sequence[Group]) -> Group:
    by_seed = list(zip(*(group.results for group in among), strict=True))
    places = [choose([result.record for result in results]) for results in by_seed]
    return Group(
        method=choice,
        control=among[0].control,
        cells=tuple(among[place].cells[seed] for seed, place in enumerate(places)),
        results=tuple(among[place].results[seed] for seed, place in enumerate(places)),
        scored=tuple(among[place].scored[seed] for seed, place in enumerate(places)),
        pass1=tuple(sum(seconds) for seconds in zip(*(group.pass1 for group in among), strict=True)),
        choices=tuple(
            Choice(
                seed=results[place].seed,
                taken=results[place].method,
                held_out={result.method: held_out(result.record) for result in results},
            )
            for results, place in zip(by_seed, places, strict=True)
        ),
    )
