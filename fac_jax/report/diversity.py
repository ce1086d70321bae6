"""Data sets by the metrics of diversity that others report, side by side."""

from __future__ import annotations

from fac_jax.diversity.table import DIRECTIONS, said, title
from fac_jax.report.blocks import Section, numbers, table, texts
from fac_jax.report.markup import join, tag
from fac_jax.report.products import RunView


def diversity(view: RunView) -> list[Section]:
    """A table of the data sets that were measured, if any: coverage says what is missing, these do not."""
    if not view.diversity:
        return []
    products = list(view.diversity.values())
    columns = [f"{product['data']} ({product['rows']:,} rows)" for product in products]
    rows = [
        [title(figures[0]), DIRECTIONS[figures[0]["diverse"]], *map(said, figures)]
        for figures in zip(*(product["figures"] for product in products), strict=True)
    ]
    notes = [
        tag("p", f"{product['data']}: no {figure['title']}: {figure['absent']}", class_="absent")
        for product in products
        for figure in product["figures"]
        if figure["absent"]
    ]
    about = (
        "Measured on all rows, or on a random sample where that is said: [95% interval over such samples] of so many "
        "rows. Most depend on how much text there is, so sets of different size compare poorly. Clusters, and the "
        f"density in NovelSum, are those of {', '.join(sorted({product['reference'] for product in products}))}."
    )
    body = join(tag("p", about), table([*texts("Metric", "More diverse"), *numbers(*columns)], rows), *notes)
    return [Section("diversity", "Diversity", "Other measures of diversity", body)]
