"""Synthesis with one thing changed at a time: a table an ablation."""

from __future__ import annotations

from fac_jax.report.blocks import Section, numbers, table, texts
from fac_jax.report.markup import join, tag
from fac_jax.report.products import Row, RunView
from fac_jax.synthesis.ablation import FIGURES, LEGEND, said, shown_figures

SAID = (
    "All arms are measured by the features that the seed set misses. An arm that writes for other features keeps what "
    "activates those, and meets the missing ones by chance. Texts and tokens are counted as if each arm stood alone; "
    f"behind ± stands half of the 95% interval over seeds. {LEGEND}"
)


def ablations(view: RunView) -> list[Section]:
    """Every ablation that was run, where there are any."""
    if not view.ablations:
        return []
    body = join(tag("p", SAID), *(_table(name, product) for name, product in view.ablations.items()))
    return [Section("ablations", "Ablations", "Synthesis, one thing changed at a time", body)]


def _table(name: str, product: Row) -> str:
    figures = shown_figures(product)
    seeds = len({one["seed"] for one in product["outcomes"]})
    rows = [[arm, *(said(figure, row[figure]) for figure in figures)] for arm, row in product["arms"].items()]
    missing = sorted({count for row in product["arms"].values() for count in row["missing"]})
    caption = (
        f"{name}: written by {product['generator']}, {seeds} seed{'s' * (seeds > 1)}, "
        f"{' to '.join(f'{count:,}' for count in dict.fromkeys((missing[0], missing[-1])))} features missing"
    )
    columns = numbers(*(_capital(FIGURES[figure]) for figure in figures))
    return table([*texts("Arm"), *columns], rows, caption)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
