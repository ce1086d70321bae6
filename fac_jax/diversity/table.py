"""The metrics of several data sets side by side, for the terminal. Reads `diversity.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

DIRECTIONS = {"higher": "higher", "lower": "lower", "neither": "–"}


def table(products: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A row per metric, a column per data set; below it what is absent, why, and what mends it."""
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    shown.add_column("metric")
    shown.add_column("more diverse")
    for product in products:
        shown.add_column(f"{product['data']} ({product['rows']:,} rows)", justify="right")
    for figures in zip(*(product["figures"] for product in products), strict=True):
        shown.add_row(title(figures[0]), DIRECTIONS[figures[0]["diverse"]], *map(said, figures))
    notes = {
        f"{product['data']}: no {figure['title']}: {figure['absent']}"
        for product in products
        for figure in product["figures"]
        if figure["absent"]
    }
    title_line = "Diversity (of a sample: [95% interval over such samples] and its rows)"
    return Group(Text(title_line, style="bold"), shown, *(Text(note) for note in sorted(notes)))


def title(figure: Mapping[str, Any]) -> str:
    """The metric with its unit."""
    return figure["title"] + (f" ({figure['unit']})" if figure["unit"] else "")


def said(figure: Mapping[str, Any]) -> str:
    """Value, and for a sample its interval and rows; `absent` where there is none."""
    if figure["value"] is None:
        return "absent"
    value = f"{figure['value']:.4g}"
    if figure["rows"] == figure["of"]:
        return value
    between = "" if figure["interval"] is None else " [{:.4g}, {:.4g}]".format(*figure["interval"])
    return f"{value}{between} of {figure['rows']:,}"


def read_product(folder: Path) -> dict[str, Any]:
    """`diversity.json` of a stage's folder."""
    return json.loads((folder / "diversity.json").read_text(encoding="utf-8"))
