"""A report as one HTML file: no network, no scripts, light and dark."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

from t2.harness.compare import pictures, tables
from t2.harness.compare.markdown import about, about_task, headline
from t2.harness.compare.report import Report
from t2.harness.compare.tables import Table

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --paper: #ffffff; --grid: #d9dde2; --soft: #f3f5f7;
  --c0: #2f6fb4; --c1: #d9702b; --c2: #3f8f4f; --c3: #8d5bb5;
  --c4: #b4413c; --c5: #1f8f96; --c6: #8a6d1f; --c7: #c0568f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --paper: #16191c; --grid: #3a4047; --soft: #1f2327;
    --c0: #6ea8e6; --c1: #f0985c; --c2: #76c487; --c3: #be96e0;
    --c4: #e8827d; --c5: #62c6cc; --c6: #cfb25e; --c7: #ea92c2; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 74rem; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--grid); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--grid); white-space: nowrap; }
td code { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; }
.note { font-size: 13px; max-width: 60rem; }
.warning { font-weight: 600; color: var(--c4); }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; max-width: 100%; overflow-x: auto; vertical-align: top; }
"""


def page(report: Report) -> str:
    """The whole report."""
    title = headline(report)
    body = [f"<h1>{escape(title)}</h1>", f"<p>{escape(about(report))}</p>"]
    for task in report.tasks:
        body.append(f"<h2>{escape(task.task)}</h2>")
        body.append(f"<p>{escape(about_task(task))}</p>")
        body += [f'<p class="warning">{escape(note)}</p>' for note in tables.notes(task)]
        body.append(_table(tables.scores(task)))
        found = list(pictures.of_task(task))
        body += _figures(found[:2])
        for table in (tables.choices(task), tables.controls(task), tables.costs(task)):
            body += [] if table is None else [_table(table)]
        if found[2:]:
            body.append("<h3>What the strategies did</h3>")
            body += _figures(found[2:])
        body.append(f"<details><summary>Every run</summary>{_table(tables.runs(task))}</details>")
    body.append("<h2>Experts and base</h2>")
    body.append(_table(tables.experts(report)))
    body += _figures(pictures.of_material(report.material))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _figures(found: Iterable[str]) -> list[str]:
    return [f"<figure>{svg}</figure>" for svg in found]


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    note = f'<p class="note">{_cell(table.note)}</p>' if table.note else ""
    return (
        f'<h3>{escape(table.title)}</h3><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def _cell(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
