"""What the seed set lacks, as sections of the page: coverage before and after, and the missing features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fac_jax.report.blocks import Section, absent, entry, facts, more, numbers, span, table, texts, veil
from fac_jax.report.figures import Series, bar_figure, line_figure
from fac_jax.report.markup import Html, join, tag
from fac_jax.report.products import TESTS, Missing, Row, RunView
from fac_jax.report.verdict import ARMS, percent

OPEN = 20
"""Missing features shown at once."""
MOST = 300
"""Missing features on the page at most, those after OPEN folded away; the product holds all."""
SPANS = 3
"""Passages shown per feature."""

DEFINITION = (
    "FAC is the share of the relevant features active on the anchor that a set of documents activates too. A feature "
    "is active on a document when its highest activation there exceeds the threshold."
)
LENGTH = (
    "Longer text activates more features. The last column is therefore the coverage of random pieces of the anchor "
    "with as many tokens as the seed set has: mean, and 5% to 95% of the draws. A seed set below it is less diverse "
    "than its length explains."
)
CURVE = (
    "In closed form, over all orders in which the documents could be taken: where a curve is still rising, more "
    "documents of the same kind would cover more; where it is flat, they would not."
)
READING = (
    "Highest anchor activation first. Below each explanation stand the anchor passages on which the feature is most "
    "active, the activating token marked. What may be harmful is blurred: click it, or press Space on it."
)


def coverage(view: RunView) -> Section:
    """Before and after, at every threshold."""
    title, short = "Coverage before and after", "Coverage"
    if view.coverage is None:
        return Section("coverage", short, title, absent("Coverage", "fac coverage CONFIG"))
    if view.evaluation is None:
        after = absent("Coverage after synthesis", "fac evaluate CONFIG")
    else:
        after = join(_bars(view.evaluation["rows"]), _after(view.evaluation["rows"], view.threshold))
    before = _before(view.coverage["sweep"], view.threshold)
    body = join(tag("p", DEFINITION), before, tag("p", LENGTH, class_="quiet small"), after)
    if "curves" in view.coverage:  # an older product has none; `fac coverage CONFIG` makes it again
        body = join(body, _curves(view.coverage["curves"]), _checks(view.coverage["validity"]))
    return Section("coverage", short, title, body)


def _before(sweep: Sequence[Row], threshold: float) -> Html:
    columns = (
        *("Threshold", "Anchor activates", "Seed covers", "Missing", "FAC", "95% over documents"),
        "FAC of anchor pieces, same length",
    )
    rows = [
        [
            f"{row['threshold']:g}",
            f"{row['anchor_features']:,}",
            f"{row['anchor_features'] - row['missing_features']:,}",
            f"{row['missing_features']:,}",
            percent(row["fac"]),
            "–" if row.get("fac_low") is None else f"{percent(row['fac_low'])} to {percent(row['fac_high'])}",
            _matched(row["length_matched"]),
        ]
        for row in sweep
    ]
    relevant = sweep[0]["relevant_features"]
    caption = f"The seed set against the anchor, of {relevant:,} relevant features; shaded: the threshold used"
    return table(numbers(*columns), rows, caption, [row["threshold"] for row in sweep].index(threshold))


def _matched(matched: Row | None) -> str:
    """A length-matched figure with its 5% to 95% range over draws."""
    if matched is None or matched["fac"] is None:
        return "–"
    return f"{percent(matched['fac'])} ({percent(matched['low'])} to {percent(matched['high'])})"


def _curves(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Html:
    """How coverage grows with the number of documents."""
    series = [
        Series(name, list(zip(one["documents"], one["fac"], strict=True)), colour)
        for colour, (name, one) in enumerate(curves.items())
    ]
    figure = line_figure("FAC of so many documents, expected over their orders", series, "documents", from_zero=True)
    return join(tag("div", figure, class_="figures"), tag("p", CURVE, class_="quiet small"))


def _checks(found: Mapping[str, Mapping[str, Any]]) -> Html:
    """What the figures hang on besides the content of the documents."""

    def share(count: int, total: int) -> str:
        return f"{count:,} ({percent(count / total)})" if total else "–"

    names = list(found)
    lines = {
        "Features that are never active": [share(o["dead_features"], o["features"]) for o in found.values()],
        "Features active on more than a tenth of the tokens": [
            share(o["dense_features"], o["features"]) for o in found.values()
        ],
        "Of these, relevant": [f"{one['relevant_dense_features']:,}" for one in found.values()],
        "Relevant features active on very short documents alone": [
            f"{one['only_in_short_text']:,}" for one in found.values()
        ],
        "Very short documents (under 8 content tokens)": [f"{one['short_documents']:,}" for one in found.values()],
        "Rank correlation of length and relevant features": [
            "–" if one["length_correlation"] is None else f"{one['length_correlation']:.2f}" for one in found.values()
        ],
        "Variance of their number that length explains": [
            "–" if one["length_r2"] is None else percent(one["length_r2"]) for one in found.values()
        ],
    }
    rows = [[name, *cells] for name, cells in lines.items()]
    return table([*texts(""), *numbers(*names)], rows, "What these figures hang on besides content")


def _bars(rows: Sequence[Row]) -> Html:
    levels = sorted({row["threshold"] for row in rows})

    def bars(arm: str, key: str) -> Series:
        found = {row["threshold"]: row[key] for row in rows if row["set"] == arm}
        points = [(place, found[level]) for place, level in enumerate(levels) if found[level] is not None]
        return Series(arm, points, ARMS.index(arm))

    groups = [f"> {level:g}" for level in levels]
    fac = [bars(arm, "fac") for arm in ARMS[:3]]
    hits = [bars(arm, "target_hit_rate") for arm in ARMS[1:3]]
    figures = [
        bar_figure("Coverage (FAC)", groups, fac, "threshold"),
        bar_figure("Missing features hit by the new samples", groups, hits, "threshold"),
    ]
    return tag("div", figures, class_="figures")


def _after(rows: Sequence[Row], threshold: float) -> Html:
    columns = ("Documents", "Tokens", "FAC", "Missing features hit", "FAC, same length added", "Raw ratio")
    cells = [
        [
            row["set"],
            f"{row['documents']:,}",
            f"{row['tokens']:,}",
            percent(row["fac"]),
            "–" if row["set"] == "seed" else percent(row["target_hit_rate"]),
            _matched(row["length_matched"]),
            "undefined" if row["raw_fac_ratio"] is None else f"{row['raw_fac_ratio']:.3f}",
        ]
        for row in rows
        if row["threshold"] == threshold
    ]
    caption = f"With and without the synthetic samples, threshold {threshold:g}"
    return table([*texts("Set"), *numbers(*columns)], cells, caption)


def missing(view: RunView) -> Section:
    """Each missing feature with its explanation and the anchor text that shows it."""
    title, short = f"{len(view.missing):,} missing features", "Missing"
    if view.coverage is None:
        absence = absent("The list of missing features", "fac coverage CONFIG")
        return Section("missing", short, "Missing features", absence)
    if not view.missing:
        nothing = tag("p", "None: the seed set activates all that the anchor activates.")
        return Section("missing", short, title, nothing)
    entries = [_entry(item, view.threshold, view.harmful) for item in view.missing[:MOST]]
    left = len(view.missing) - len(entries)
    body = join(
        tag("p", READING),
        more(entries, OPEN, "missing features"),
        tag("p", f"{left:,} more are in ", tag("code", "coverage/missing.parquet"), ".") if left else None,
    )
    return Section("missing", short, title, body)


def _entry(item: Missing, threshold: float, harmful: bool) -> Html:
    side = facts(
        f"anchor peak {item.anchor_peak:.2f}",
        f"{item.anchor_documents:,} anchor document{'' if item.anchor_documents == 1 else 's'}",
        _evidence(item.relevance),
        *_scores(item.explanation),
        _reached(item.kept_peak, threshold),
    )
    passages = [
        tag("li", tag("span", f"{s.score:.2f}", class_="score"), tag("div", span(s.before, s.token, s.after)))
        for s in item.spans[:SPANS]
    ]
    return entry(f"Feature {item.feature}", side, _said(item.explanation, harmful), tag("ul", passages, class_="spans"))


def _evidence(relevance: Row) -> str | None:
    """Why a feature counts as relevant, in a few words."""
    if relevance.get("label"):
        passes = relevance.get("labels") or []
        return f"judged {' and '.join(passes) if len(passes) > 1 else relevance['label']}"
    if relevance.get("q") is not None:
        return f"AUROC {relevance['auroc']:.2f}, q {relevance['q']:.2g}"
    return None


def _scores(explanation: Row) -> list[str]:
    """How well the explanation did on held-out documents."""
    found = [
        f"{test} AUROC {explanation[f'{test}_auroc']:.2f} ({explanation[f'{test}_low']:.2f} to "
        f"{explanation[f'{test}_high']:.2f})"
        for test in TESTS
        if explanation.get(f"{test}_auroc") is not None
    ]
    if explanation.get("generation_score") is not None:
        found.append(f"{percent(explanation['generation_score'])} of texts written from it activate it")
    return found


def _reached(peak: float | None, threshold: float) -> str | None:
    if peak is None:
        return None
    return f"kept samples reach {peak:.2f}" if peak > threshold else "not reached by kept samples"


def _said(explanation: Row, harmful: bool) -> Html:
    """The explanation: an LLM's sentence, or the embedded method's two lists of tokens. Veiled for a harmful task."""
    shown = veil if harmful else join
    if not explanation.get("explanation"):
        return tag("p", "No explanation was found.", class_="said quiet")
    if not explanation.get("fires_on"):
        return tag("p", shown(explanation["explanation"]), class_="said")
    parts = [tag("span", "Fires on ", class_="quiet"), shown(_tokens(explanation["fires_on"]))]
    if explanation.get("promotes"):
        parts += [tag("span", " · promotes ", class_="quiet"), shown(_tokens(explanation["promotes"]))]
    return tag("p", parts, class_="said")


def _tokens(tokens: Sequence[str]) -> Html:
    """Tokens side by side, with their spaces made visible."""
    return join(*[[" " if place else None, tag("code", t.replace(" ", "␣"))] for place, t in enumerate(tokens)])
