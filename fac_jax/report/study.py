"""Does coverage help? Detection against the number of samples added, by arm; every figure of a cell; correlations."""

from __future__ import annotations

from collections.abc import Sequence

from fac_jax.diversity.measure import METRICS
from fac_jax.report.blocks import Section, numbers, table, texts
from fac_jax.report.figures import Series, line_figure
from fac_jax.report.markup import Html, join, tag
from fac_jax.report.products import Row, RunView

OF_STUDY = {"fac": "fac", "target_hit_rate": "Target hit rate", "label_agreement": "Label agreement"}
TITLES = {**OF_STUDY, **{metric.name: metric.title for metric in METRICS}}
TRAINED = {"head": "a linear head", "lora": "LoRA"}
OURS = ("one step", "two steps", "random features", "random generations")
KINDS = {"correlations": "all arms", "correlations_of_written": "arms that write, and the seed alone"}
SAID = (
    "Every arm adds its samples to the same seed set; a cell is one arm at one budget. AUPRC is of held-out documents, "
    "means over seeds. The gain is over the seed alone, with a 95% interval over held-out documents (paired "
    "bootstrap): an interval that holds 0 shows no difference. Coverage and diversity are of the whole training set; "
    "label agreement is the share of what was added whose label a head trained on the whole anchor gives too."
)
CORRELATED = (
    "Correlation of each metric with AUPRC over cells, with 95% intervals that draw cells and seeds anew. More samples "
    "raise most metrics and AUPRC alike, so at equal budget only what differs between arms is left. Cells of an arm "
    "share documents, so the intervals are too narrow, and a correlation over a few arms proves no cause."
)


def study(view: RunView) -> list[Section]:
    """The section, where a study was made."""
    found = view.study
    if found is None:
        return []
    trained = [name for name in TRAINED if any(cell[f"auprc_{name}"] for cell in found["cells"])]
    drawings = [figure for name in trained for figure in figures(found, name)]
    body = join(
        tag("p", SAID), tag("div", drawings, class_="figures"), _cells(found, trained), tag("p", CORRELATED),
        *(_correlations(found, name, kind) for name in trained for kind in KINDS),
    )  # fmt: skip
    return [Section("study", "Study", "Does coverage help?", body)]


def figures(found: Row, trained: str) -> list[Html]:
    """AUPRC against the budget: arms of synthesis, and two steps beside the others."""
    arms = list(dict.fromkeys(cell["arm"] for cell in found["cells"] if cell["budget"]))
    others = [arm for arm in arms if arm not in OURS]
    drawn = [
        [arm for arm in OURS if arm in arms],
        [*(arm for arm in ("two steps",) if arm in arms and others), *others],
    ]
    return [_figure(found, trained, group) for group in drawn if group]


def _figure(found: Row, trained: str, arms: Sequence[str]) -> Html:
    lines = []
    for colour, arm in enumerate(arms):
        cells = [
            cell for cell in found["cells"] if cell[f"auprc_{trained}"] and (cell["arm"] == arm or cell["budget"] == 0)
        ]
        cells.sort(key=lambda cell: cell["budget"])
        points = [(float(cell["budget"]), cell[f"auprc_{trained}"]["mean"]) for cell in cells]
        lines.append(Series(arm, points, colour % 4, [_ends(cell[f"auprc_{trained}"]) for cell in cells]))
    return line_figure(f"AUPRC with {TRAINED[trained]}", lines, "samples added to the seed")


def _ends(mean: Row) -> tuple[float, float]:
    return (mean["mean"], mean["mean"]) if mean["low"] is None else (mean["low"], mean["high"])


def _cells(found: Row, trained: Sequence[str]) -> Html:
    metrics = [name for name in TITLES if any(cell[name] for cell in found["cells"])]
    rows = [
        [
            cell["arm"],
            f"{cell['added']['mean']:.0f}",
            *(part for name in trained for part in (_mean(cell[f"auprc_{name}"]), _gain(cell["gain"][name]))),
            *(_mean(cell[name]) for name in metrics),
        ]
        for cell in found["cells"]
    ]
    heads = [part for name in trained for part in (f"AUPRC, {TRAINED[name]}", "gain")]
    heldout, seed = found["heldout"], found["seed"]
    caption = (
        f"{seed['documents']:,} documents in the seed ({seed['positive']:,} positive), {heldout['documents']:,} held "
        f"out ({heldout['positive']:,}: a random scorer has {heldout['positive'] / heldout['documents']:.3f}), "
        f"{found['missing']:,} features missing, {len(found['seeds'])} seeds"
    )
    columns = numbers("added", *heads, *(TITLES[name] for name in metrics))
    return table([*texts("Arm"), *columns], rows, caption)


def _correlations(found: Row, trained: str, kind: str) -> Html:
    columns_of = ("pearson", "spearman", "pearson_at_equal_budget", "spearman_at_equal_budget")
    rows = [
        [TITLES[name], *(_correlation(told.get(column)) for column in columns_of)]
        for name, told in found[kind][trained].items()
        if any(told.values())
    ]
    columns = numbers("Pearson", "Spearman", "Pearson, equal budget", "Spearman, equal budget")
    return table([*texts("Metric"), *columns], rows, f"With AUPRC by {TRAINED[trained]}, {KINDS[kind]}")


def _mean(value: Row | None) -> str:
    if value is None:
        return "–"
    digits = 3 if abs(value["mean"]) < 10 else 1
    half = "" if value["low"] is None else f" ± {value['high'] - value['mean']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{half if half.strip(' ±0.') else ''}"


def _gain(value: Row | None) -> str:
    return "–" if value is None else f"{value['mean']:+.3f} ({value['low']:+.3f} to {value['high']:+.3f})"


def _correlation(value: Row | None) -> str:
    if value is None:
        return "–"
    between = "" if value["low"] is None else f" ({value['low']:+.2f} to {value['high']:+.2f})"
    return f"{value['value']:+.2f}{between}"
