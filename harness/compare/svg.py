"""Charts as SVG: lines with bands, points with intervals, bars and tables of shades, all with their axes and values.

Colours are CSS variables of the page around them (``--ink``, ``--grid``, ``--c0`` …), so that charts follow its theme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 8
_FONT = 'font-family="system-ui, sans-serif" font-size="12" fill="var(--ink)"'
_CHAR = 6.6
"""Width of a character of 12 pixels, about."""


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        label: in the legend.
        points: x and y.
        band: for each point the lower and upper edge of a band around it.
        dashed: whether it is.
        dots: whether points are marked.
        colour: number of its colour; None takes its place among the lines.
    """

    label: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] = ()
    dashed: bool = False
    dots: bool = False
    colour: int | None = None


@dataclass(frozen=True)
class Point:
    """A value with its interval, on a row of its own; ``note`` stands right of it."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    strong: bool = False


def lines(title: str, x_label: str, y_label: str, series: Sequence[Line], *, width: int = 560) -> str:
    """A chart of lines with a legend on its right."""
    height, left, top, bottom = 300, 66, 34, 48
    legend = 34 + max((_width(line.label) for line in series), default=0)
    right = int(legend) + 10
    inner_width, inner_height = width - left - 10, height - top - bottom
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points] + [
        edge for line in series for pair in line.band for edge in pair
    ]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_low, x_high = min(x_ticks[0], *xs), max(x_ticks[-1], *xs)
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x_low) / (x_high - x_low or 1) * inner_width,
            top + inner_height - (y - y_low) / (y_high - y_low or 1) * inner_height,
        )

    body = [_text(left, 18, title, weight="600")]
    for tick in y_ticks:
        _, y = place(x_low, tick)
        body.append(_rule(left, y, left + inner_width, y))
        body.append(_text(left - 7, y + 4, number(tick, y_ticks), anchor="end"))
    for tick in x_ticks:
        x, _ = place(tick, y_low)
        body.append(_rule(x, top, x, top + inner_height))
        body.append(_text(x, top + inner_height + 17, number(tick, x_ticks), anchor="middle"))
    body.append(_text(left + inner_width / 2, height - 8, x_label, anchor="middle"))
    body.append(_text(14, top + inner_height / 2, y_label, anchor="middle", turned=True))
    for index, line in enumerate(series):
        colour = f"var(--c{(index if line.colour is None else line.colour) % COLOURS})"
        if line.band:
            edge = [place(x, high) for (x, _), (_, high) in zip(line.points, line.band, strict=True)]
            edge += [place(x, low) for (x, _), (low, _) in reversed(list(zip(line.points, line.band, strict=True)))]
            body.append(f'<polygon points="{_points(edge)}" fill="{colour}" fill-opacity="0.18"/>')
        placed = [place(x, y) for x, y in line.points]
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        body.append(f'<polyline points="{_points(placed)}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
        if line.dots or len(placed) == 1:
            body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed]
        y = top + 8 + 18 * index
        x = left + inner_width + 12
        body.append(f'<path d="M{x:.0f} {y}h18" stroke="{colour}" stroke-width="2.4"{dash}/>')
        body.append(_text(x + 24, y + 4, line.label))
    return _svg(width + right, max(height, top + 18 * len(series) + 8), title, body)


def intervals(title: str, x_label: str, points: Sequence[Point], *, zero: float | None = 0.0, percent: bool) -> str:
    """Values with their intervals, one under another, with a line at ``zero``; ``percent`` writes shares in points."""
    row, top, bottom, inner_width = 24, 34, 46, 380
    left = 18 + max(_width(point.label) for point in points)
    right = 14 + max(_width(point.note) for point in points)
    edges = [edge for p in points for edge in (p.value, p.low, p.high) if edge is not None]
    scale = ticks(min([*edges, *([] if zero is None else [zero])]), max([*edges, *([] if zero is None else [zero])]))
    low, high = min(scale[0], *edges), max(scale[-1], *edges)
    height = top + row * len(points) + bottom

    def place(x: float) -> float:
        return left + (x - low) / (high - low or 1) * inner_width

    body = [_text(10, 18, title, weight="600")]
    foot = top + row * len(points)
    for tick in scale:
        body.append(_rule(place(tick), top, place(tick), foot))
        text = number(100 * tick, [100 * each for each in scale]) if percent else number(tick, scale)
        body.append(_text(place(tick), foot + 17, text, anchor="middle"))
    if zero is not None:
        body.append(
            f'<path d="M{place(zero):.1f} {top}V{foot}" stroke="var(--ink)" stroke-width="1.4" stroke-dasharray="3 3"/>'
        )
    body.append(_text(left + inner_width / 2, height - 8, x_label, anchor="middle"))
    for index, point in enumerate(points):
        y = top + row * (index + 0.5)
        colour = "var(--c1)" if point.strong else "var(--c0)"
        body.append(_text(left - 10, y + 4, point.label, anchor="end"))
        if point.low is not None and point.high is not None:
            start, end = place(point.low), place(point.high)
            body.append(f'<path d="M{start:.1f} {y:.1f}H{end:.1f}" stroke="{colour}" stroke-width="2"/>')
        body.append(f'<circle cx="{place(point.value):.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        body.append(_text(left + inner_width + 10, y + 4, point.note))
    return _svg(left + inner_width + right, height, title, body)


def bars(title: str, x_label: str, values: Mapping[str, float]) -> str:
    """Horizontal bars from 0, with their values."""
    row, top, bottom, inner_width = 24, 34, 46, 320
    left = 18 + max(_width(label) for label in values)
    scale = ticks(min(0.0, *values.values()), max(0.0, *values.values()))
    low, high = scale[0], scale[-1]
    foot = top + row * len(values)

    def place(x: float) -> float:
        return left + (x - low) / (high - low or 1) * inner_width

    body = [_text(10, 18, title, weight="600")]
    for tick in scale:
        body.append(_rule(place(tick), top, place(tick), foot))
        body.append(_text(place(tick), foot + 17, number(tick, scale), anchor="middle"))
    body.append(_text(left + inner_width / 2, foot + 38, x_label, anchor="middle"))
    for index, (label, value) in enumerate(values.items()):
        y, x = top + row * index + 4, min(place(0), place(value))
        wide = abs(place(value) - place(0))
        body.append(_text(left - 10, y + 12, label, anchor="end"))
        body.append(f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="16" fill="var(--c{index % COLOURS})"/>')
        body.append(_text(left + inner_width + 10, y + 12, f"{value:.3g}"))
    return _svg(left + inner_width + 70, foot + bottom, title, body)


def shades(
    title: str,
    x_label: str,
    y_label: str,
    columns: Sequence[str],
    rows: Mapping[str, Sequence[float]],
    *,
    texts: Mapping[str, Sequence[str]] | None = None,
    span: tuple[float, float] | None = None,
) -> str:
    """A table of shades, each cell with its value.

    Args:
        columns: names, from left to right.
        rows: values by the name of their row, from the top.
        texts: what stands in the cells instead of the values.
        span: values of the lightest and the darkest shade; two-sided around 0 where they are of different sign.
    """
    every = [value for row in rows.values() for value in row]
    low, high = span or (min(0.0, *every), max(0.0, *every))
    shown = {name: (texts or {}).get(name) or [f"{value:.2g}" for value in row] for name, row in rows.items()}
    wide = max(26.0, 10 + max(_width(text) for row in shown.values() for text in row))
    names = max(_width(name) for name in columns)
    turned = names + 8 > wide
    tall, left, top = 24, 44 + max(_width(name) for name in rows), 40
    head = names * 0.75 + 14 if turned else 20
    body = [_text(10, 18, title, weight="600")]
    start = top + head
    for index, name in enumerate(columns):
        x = left + wide * (index + 0.5)
        if turned:
            body.append(
                f'<text x="{x:.1f}" y="{start - 6:.1f}" {_FONT} transform="rotate(-45 {x:.1f} {start - 6:.1f})">'
                f"{escape(name)}</text>"
            )
        else:
            body.append(_text(x, start - 7, name, anchor="middle"))
    for place, (name, row) in enumerate(rows.items()):
        y = start + tall * place
        body.append(_text(left - 8, y + 16, name, anchor="end"))
        for index, value in enumerate(row):
            x = left + wide * index
            colour = "var(--c1)" if value < 0 else "var(--c0)"
            reach = -low if value < 0 else high
            strength = min(1.0, abs(value) / reach) if reach > 0 else 0.0
            body.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide - 1.5:.1f}" height="{tall - 1.5}" fill="{colour}" '
                f'fill-opacity="{0.06 + 0.6 * strength:.2f}"/>'
            )
            body.append(_text(x + wide / 2 - 0.7, y + 16, shown[name][index], anchor="middle"))
    foot = start + tall * len(rows)
    body.append(_text(left + wide * len(columns) / 2, foot + 20, x_label, anchor="middle"))
    body.append(_text(14, start + tall * len(rows) / 2, y_label, anchor="middle", turned=True))
    width = max(left + wide * len(columns) + (names * 0.75 if turned else 0) + 14, 20 + 1.1 * _width(title))
    height = max(foot + 30, start + tall * len(rows) / 2 + _width(y_label) / 2 + 6)
    return _svg(width, height, title, body)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that span an interval: steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        low, high = (low - 0.5, high + 0.5) if low == 0 else (low - abs(low) / 10, high + abs(low) / 10)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if rough <= power * factor * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def number(value: float, scale: Sequence[float]) -> str:
    """A tick's text, with as many decimals as its scale needs."""
    step = abs(scale[1] - scale[0]) if len(scale) > 1 else abs(value) or 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{decimals}f}" if abs(value) < 1e6 else f"{value:.3g}"


def _svg(width: float, height: float, title: str, body: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'
    )
    return "\n".join([head, *body, "</svg>"])


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "400", turned: bool = False) -> str:
    place = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" {_FONT} text-anchor="{anchor}" font-weight="{weight}"{place}>'
        f"{escape(text)}</text>"
    )


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="var(--grid)" stroke-width="1"/>'


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _width(text: str) -> float:
    return _CHAR * len(text)
