"""The few building blocks of the page: section, table, entry, veiled text, marked span, activation meter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fac_jax.report.markup import Html, join, tag


@dataclass(frozen=True)
class Section:
    """A part of the page; `short` is its name in the bar of sections."""

    id: str
    short: str
    title: str
    body: Html


@dataclass(frozen=True)
class Column:
    """Heading of a table's column; numbers are set right."""

    heading: str
    numeric: bool


def texts(*headings: str) -> list[Column]:
    """Columns of text."""
    return [Column(heading, numeric=False) for heading in headings]


def numbers(*headings: str) -> list[Column]:
    """Columns of numbers."""
    return [Column(heading, numeric=True) for heading in headings]


def render(section: Section) -> Html:
    """The section with its heading."""
    return tag("section", tag("h2", section.title), section.body, id=section.id)


def table(
    columns: Sequence[Column], rows: Sequence[Sequence[object]], caption: str | None = None, chosen: int | None = None
) -> Html:
    """A table that scrolls sideways on a phone; the first cell of a row is its heading, row `chosen` is shaded."""
    kinds = ["n" if column.numeric else None for column in columns]
    head = [tag("th", c.heading, class_=kind, scope="col") for c, kind in zip(columns, kinds, strict=True)]
    body = []
    for place, row in enumerate(rows):
        first, *rest = row
        cells = [tag("th", first, class_=kinds[0], scope="row")]
        cells += [tag("td", cell, class_=kind) for cell, kind in zip(rest, kinds[1:], strict=True)]
        body.append(tag("tr", cells, class_="chosen" if place == chosen else None))
    name = caption or columns[0].heading
    inner = tag("table", tag("thead", tag("tr", head)), tag("tbody", body), aria_label=name)
    above = tag("p", caption, class_="caption") if caption else None  # a real caption would scroll away with the table
    return join(above, tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label=name))


def entry(name: str, side: Html, *content: object) -> Html:
    """A feature or a document: name and facts at the side, content beside them (below them on a phone)."""
    return tag("article", tag("div", tag("h3", name), side), tag("div", content), class_="entry")


def facts(*lines: str | None) -> Html:
    """Small grey lines beside an entry; None is left out."""
    return tag("ul", [tag("li", line) for line in lines if line is not None], class_="facts")


def more(entries: Sequence[Html], shown: int, what: str) -> Html:
    """Entries, those after the first `shown` folded away."""
    rest = entries[shown:]
    folded = tag("details", tag("summary", f"{len(rest):,} more {what}"), rest) if rest else None
    return join(entries[:shown], folded)


def veil(*content: object) -> Html:
    """Text that may be harmful: blurred until it is clicked or, from the keyboard, until Space is pressed on it."""
    switch = tag("input", type="checkbox", aria_label="Show this text, which may be harmful")
    return tag("label", switch, tag("span", *content), class_="veil")


def span(before: str, token: str, after: str) -> Html:
    """A veiled piece of a document with its activating token marked."""
    return veil(before, tag("mark", token), after)


def meter(score: float, threshold: float, most: float) -> Html:
    """An activation as a bar from 0 to `most`, with the threshold that it had to exceed as a tick."""
    width, full = 300, 200.0
    most = max(most, score, threshold, 1e-9)
    at, said = round(threshold / most * full, 1), f"activation {score:.2f}, threshold {threshold:g}"
    bar = {"x": 0, "y": 3, "height": 9, "rx": 3}
    return tag(
        "svg",
        tag("title", said),
        tag("rect", **bar, width=full, class_="track"),
        tag("rect", **bar, width=round(score / most * full, 1), class_="fill2"),
        tag("line", x1=at, x2=at, y1=0, y2=15, class_="tick"),
        tag("text", f"{score:.2f} > {threshold:g}", x=full + 8, y=12),
        viewBox=f"0 0 {width} 16",
        role="img",
        aria_label=said,
    )


def chip(label: str, embedded: bool = False) -> Html:
    """A short label in a frame; an embedded method stands out."""
    return tag("span", label, class_="chip embedded" if embedded else "chip")


def absent(what: str, command: str) -> Html:
    """A line in place of a part whose stage has not run, saying which command makes it."""
    return tag("p", f"{what} is not in this run yet: ", tag("code", command), " makes it.", class_="absent")
