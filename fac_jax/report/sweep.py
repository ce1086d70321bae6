"""Several autoencoders side by side: what sparsity costs, and which features died, by kind and width."""

from __future__ import annotations

from collections.abc import Sequence

from fac_jax.report.apparatus import KINDS
from fac_jax.report.blocks import Section, numbers, table, texts
from fac_jax.report.figures import Series, line_figure, number
from fac_jax.report.markup import join, tag
from fac_jax.report.products import Row, RunView


def sweep(view: RunView) -> list[Section]:
    """FVU and dead features against L0, a figure for each layer and width, and a table of all, where there are any."""
    if view.sweep is None:
        return []
    members: Sequence[Row] = view.sweep["members"]
    kinds = sorted({(member["layer"], member["features"]) for member in members})
    several = len({layer for layer, _ in kinds}) > 1
    figures = [
        line_figure(
            f"{title}, {f'layer {layer}, ' if several else ''}{width:,} features",
            _lines(members, (layer, width), key),
            "L0 (mean active features)",
            from_zero=zero,
        )
        for key, title, zero in (("fvu", "FVU", False), ("dead_fraction", "Dead fraction", True))
        for layer, width in kinds
    ]
    rows = [
        [
            KINDS[member["variant"]],
            f"{member['layer']}",
            f"{member['features']:,}",
            f"{member['k']}",
            f"{member['seed']}",
            number(member["l0"]),
            number(member["fvu"]),
            number(member["cosine"]),
            f"{member['dead_fraction']:.1%}",
            f"{member['dense_fraction']:.1%}",
        ]
        for member in members
    ]
    said = (
        f"{len(members)} autoencoders trained on the same {view.sweep['rows']:,} rows in {view.sweep['steps']:,} "
        "steps, measured on held-out rows. K is what was asked for: a bound of L0 for Top-K and Matryoshka on it, a "
        "mean for BatchTopK, a target for JumpReLU. Dead: active on no held-out row; dense: on more than a tenth."
    )
    columns = numbers("Layer", "Features", "K", "Seed", "L0", "FVU", "Cosine", "Dead", "Dense")
    body = join(tag("p", said), tag("div", figures, class_="figures"), table([*texts("Kind"), *columns], rows))
    return [Section("sweep", "Sweep", "Several autoencoders side by side", body)]


def _lines(members: Sequence[Row], kind: tuple[int, int], key: str) -> list[Series]:
    lines, chosen = [], [member for member in members if (member["layer"], member["features"]) == kind]
    for colour, (variant, name) in enumerate(KINDS.items()):
        points = sorted((member["l0"], member[key]) for member in chosen if member["variant"] == variant)
        if points:
            lines.append(Series(name, points, colour))
    return lines
