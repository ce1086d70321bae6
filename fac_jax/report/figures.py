"""Figures as inline SVG, drawn by hand: lines over steps, grouped bars, points with intervals, a histogram.

Colours are CSS variables of the page, so a figure follows its light and dark scheme; every figure has a title and a
sentence of description for those who do not see it. Figures are 340 units wide and never enlarged far, so that their
text stays readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fac_jax.report.markup import Html, join, tag

WIDTH = 340
STYLE = Path(__file__).with_name("page.css")
MARKED_POINTS = 8  # a line of so few points shows each of them


@dataclass(frozen=True)
class Series:
    """Points of one line, or bars of one colour; `colour` is 0 to 3, the page's palette."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    intervals: Sequence[tuple[float, float]] = ()
    """Of each point of a line, from where to where it may lie; none: not drawn."""


@dataclass(frozen=True)
class Interval:
    """One row of an interval figure: a mean, its standard deviation, and the values behind it."""

    name: str
    mean: float
    sd: float
    values: Sequence[float]
    colour: int = 0


def number(value: float) -> str:
    """A number as one reads it: 12,345; 0.318; 1.2e-05."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.2g}"
    return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"


def line_figure(title: str, series: Sequence[Series], x_label: str, height: int = 190, from_zero: bool = False) -> Html:
    """Lines over a shared horizontal axis, named at their right ends. Points that are not finite are left out."""
    series = [replace(s, points=[p for p in s.points if all(map(math.isfinite, p))]) for s in series]
    series = [s for s in series if s.points]
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for y in (*(y for _, y in s.points), *(end for ends in s.intervals for end in ends))]
    if not xs:
        return tag("p", f"{title}: no finite values were recorded.", class_="quiet")
    left, right = 44, WIDTH - 10
    lines = len(_legend_rows(series, left)) if len(series) > 1 else 0
    height += 16 * max(0, lines - 1)
    top, bottom = 10 + 16 * lines, height - 34
    x_ticks, y_ticks = ticks(min(xs), max(xs), 4), ticks(0 if from_zero else min(ys), max(ys), 4)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def x_at(x: float) -> float:
        return round(left + (x - x_low) / (x_high - x_low) * (right - left), 1)

    def y_at(y: float) -> float:
        return round(bottom - (y - y_low) / (y_high - y_low) * (bottom - top), 1)

    marks = []
    for y in y_ticks:
        marks.append(tag("line", x1=left, x2=right, y1=y_at(y), y2=y_at(y), class_="grid"))
        marks.append(_label(left - 6, y_at(y) + 4, _tick(y, y_ticks), "end"))
    for x in x_ticks:
        if x_low <= x <= x_high:
            marks.append(_label(x_at(x), bottom + 15, _tick(x, x_ticks), "middle"))
    marks.append(_label((left + right) / 2, height - 4, x_label, "middle"))
    for s in series:
        path = " ".join(f"{x_at(x)},{y_at(y)}" for x, y in s.points)
        if len(s.points) == 1:
            marks.append(tag("circle", cx=x_at(s.points[0][0]), cy=y_at(s.points[0][1]), r=3, class_=f"fill{s.colour}"))
        else:
            marks.append(tag("polyline", points=path, class_=f"line line{s.colour}"))
            if len(s.points) <= MARKED_POINTS:
                marks += [tag("circle", cx=x_at(x), cy=y_at(y), r=2.5, class_=f"fill{s.colour}") for x, y in s.points]
        for (x, _), (low, high) in zip(s.points, s.intervals, strict=False):
            ends = {"y1": y_at(low), "y2": y_at(high)}
            marks.append(tag("line", x1=x_at(x), x2=x_at(x), **ends, class_=f"line line{s.colour} thin"))
    last = ", ".join(f"{s.name} ends at {number(s.points[-1][1])}" for s in series)
    return _figure(
        title, f"{title} against {x_label}: {last}.", height, marks, _legend(series, left) if lines else None
    )


def bar_figure(title: str, groups: Sequence[str], series: Sequence[Series], x_label: str) -> Html:
    """Horizontal bars of fractions in [0, 1], grouped; a series' points are (group index, fraction)."""
    bar, gap, left, top = 15, 12, 52, 22
    step = bar * len(series) + gap
    height = top + step * len(groups) + 22
    full = WIDTH - left - 44
    marks = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = left + share * full
        marks.append(tag("line", x1=at, x2=at, y1=top, y2=height - 22, class_="grid"))
        marks.append(_label(at, height - 8, f"{share:.0%}", "middle"))
    for place, group in enumerate(groups):
        marks.append(_label(left - 6, top + place * step + bar * len(series) / 2 + 4, group, "end"))
    said = []
    for row, s in enumerate(series):
        for group_index, value in s.points:
            y, length = top + int(group_index) * step + row * bar, min(max(value, 0.0), 1.0) * full
            marks.append(
                tag("rect", x=left, y=y, width=round(length, 1), height=bar - 2, rx=2, class_=f"fill{s.colour}")
            )
            marks.append(_label(left + length + 5, y + 10.5, f"{value:.1%}", "start"))
            said.append(f"{s.name} at {groups[int(group_index)]}: {value:.1%}")
    return _figure(title, f"{title} by {x_label}. {'; '.join(said)}.", height, marks, _legend(series, left))


def interval_figure(title: str, rows: Sequence[Interval], baseline: float, baseline_name: str, x_label: str) -> Html:
    """A row per arm: a point at the mean, a bar of one standard deviation, a tick per value; a line at the baseline."""
    left, top, step = 92, 24, 34
    height = top + step * len(rows) + 36
    values = [v for r in rows for v in (r.mean - r.sd, r.mean + r.sd, *r.values)] + [baseline]
    low, high = min(values), max(values)
    margin = max((high - low) * 0.12, 0.01)
    low, high = max(0.0, low - margin), min(1.0, high + margin)
    right, bottom = WIDTH - 14, height - 36

    def x_at(x: float) -> float:
        return round(left + (x - low) / (high - low) * (right - left), 1)

    marks = []
    for x in ticks(low, high, 5):
        if low <= x <= high:
            marks.append(tag("line", x1=x_at(x), x2=x_at(x), y1=top, y2=bottom, class_="grid"))
            marks.append(_label(x_at(x), bottom + 15, _tick(x, ticks(low, high, 5)), "middle"))
    marks.append(tag("line", x1=x_at(baseline), x2=x_at(baseline), y1=top - 6, y2=bottom, class_="baseline"))
    marks.append(_label(min(max(x_at(baseline), left + 34), right - 40), top - 10, baseline_name, "middle"))
    for place, row in enumerate(rows):
        y = top + place * step + step / 2
        marks.append(_label(left - 10, y + 4, row.name, "end"))
        ends = x_at(max(low, row.mean - row.sd)), x_at(min(high, row.mean + row.sd))
        marks.append(tag("line", x1=ends[0], x2=ends[1], y1=y, y2=y, class_=f"line line{row.colour} thick"))
        marks += [
            tag("line", x1=x_at(v), x2=x_at(v), y1=y - 7, y2=y + 7, class_=f"line line{row.colour} thin")
            for v in row.values
        ]
        marks.append(tag("circle", cx=x_at(row.mean), cy=y, r=4.5, class_=f"fill{row.colour} ringed"))
    marks.append(_label((left + right) / 2, height - 4, x_label, "middle"))
    said = "; ".join(f"{r.name} {r.mean:.3f} plus or minus {r.sd:.3f}" for r in rows)
    return _figure(title, f"{title}: {said}; {baseline_name} {baseline:.3f}.", height, marks)


def standalone(figure: Html) -> str:
    """The drawing of a figure as an SVG file of its own, in the page's colours, which follow the reader's scheme."""
    svg = figure[figure.index("<svg") : figure.rindex("</svg>") + len("</svg>")]
    opened = svg.index(">") + 1
    background = '<rect width="100%" height="100%" style="fill: var(--paper)"/>'
    title = svg[opened : svg.index("</desc>") + len("</desc>")]
    style = f"<style><![CDATA[{STYLE.read_text(encoding='utf-8')}]]></style>"
    rest = svg[opened + len(title) :]
    return f'<svg xmlns="http://www.w3.org/2000/svg"{svg[4:opened]}{title}{style}{background}{rest}'


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that span [low, high], about `about` of them."""
    if not high > low:
        low, high = low - abs(low) * 0.05 - 1e-3, high + abs(high) * 0.05 + 1e-3
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _tick(value: float, among: Sequence[float]) -> str:
    """A tick's label, with as many decimals as tell it from its neighbours."""
    step = among[1] - among[0]
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _figure(title: str, description: str, height: int, marks: Sequence[Html], legend: Html | None = None) -> Html:
    drawing = tag(
        "svg",
        tag("title", title),
        tag("desc", description),
        legend,
        marks,
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_label=description,
    )
    return tag("figure", tag("figcaption", title), drawing)


def _legend(series: Sequence[Series], left: float) -> Html:
    marks = []
    for line, row in enumerate(_legend_rows(series, left)):
        for x, s in row:
            marks.append(tag("rect", x=x, y=3 + 16 * line, width=10, height=10, rx=2, class_=f"fill{s.colour}"))
            marks.append(_label(x + 14, 12 + 16 * line, s.name, "start"))
    return join(marks)


def _legend_rows(series: Sequence[Series], left: float) -> list[list[tuple[float, Series]]]:
    """Names side by side as far as there is room, each with where it begins."""
    rows: list[list[tuple[float, Series]]] = [[]]
    x = left
    for s in series:
        width = 26 + 6.2 * len(s.name)
        if rows[-1] and x + width > WIDTH:
            rows.append([])
            x = left
        rows[-1].append((x, s))
        x += width
    return rows


def _label(x: float, y: float, label: str, anchor: str) -> Html:
    return tag("text", label, x=round(x, 1), y=round(y, 1), text_anchor=anchor)
