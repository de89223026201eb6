"""A report as Markdown."""

from __future__ import annotations

from t2.harness.compare import tables
from t2.harness.compare.report import Report, TaskReport
from t2.harness.compare.tables import Table


def markdown(report: Report) -> str:
    """The whole report."""
    parts = [f"# {headline(report)}", about(report), _table(tables.experts(report), 2)]
    for task in report.tasks:
        parts.append(f"## {task.task}")
        parts.append(about_task(task))
        parts += [f"**{note}**" for note in tables.notes(task)]
        every = (tables.scores, tables.choices, tables.controls, tables.costs, tables.runs)
        for table in (make(task) for make in every):
            if table is not None:
                parts.append(_table(table, 3))
    return "\n\n".join(parts) + "\n"


def headline(report: Report) -> str:
    """The title."""
    return f"Comparison on {report.base}"


def about(report: Report) -> str:
    """What holds for all of it."""
    settings = dict(report.settings)
    given = {**settings.pop("model_args"), **{name: value for name, value in settings.items() if value}}
    common = ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in given.items()
        if name != "seed"
    )
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    model = f"Model {report.identity[:12]}, weights" if report.identity is not None else "Weights"
    return f"{model} {report.fingerprint[:12]} in {report.dtype}; {common}. {versions}."


def about_task(task: TaskReport) -> str:
    """What holds for all rows of a task."""
    better = "higher" if task.higher_is_better else "lower"
    chosen = "" if task.filter == "none" else f" after the filter {task.filter}"
    return f"Version {task.version}, {task.docs} documents, {task.metric}{chosen}; {better} is better."


def _table(table: Table, level: int) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "---|" * len(table.header)
    text = "\n".join([f"{'#' * level} {table.title}", "", line(table.header), rule, *map(line, table.rows)])
    return f"{text}\n\n{table.note}" if table.note else text
