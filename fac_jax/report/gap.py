"""What the seed set lacks, as sections of the page: coverage before and after, and the missing features."""

from __future__ import annotations

from collections.abc import Sequence

from fac_jax.report.blocks import Section, absent, entry, facts, more, numbers, span, table, texts
from fac_jax.report.figures import Series, bar_figure
from fac_jax.report.markup import Html, join, tag
from fac_jax.report.products import Missing, Row, RunView
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
READING = (
    "Highest anchor activation first. Below each explanation stand the anchor passages on which the feature is most "
    "active, the activating token marked. Passages are blurred because many are harmful: click one, or press Space "
    "on it."
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
    return Section("coverage", short, title, body)


def _before(sweep: Sequence[Row], threshold: float) -> Html:
    columns = ("Threshold", "Anchor activates", "Seed covers", "Missing", "FAC", "FAC of anchor pieces, same length")
    rows = [
        [
            f"{row['threshold']:g}",
            f"{row['anchor_features']:,}",
            f"{row['anchor_features'] - row['missing_features']:,}",
            f"{row['missing_features']:,}",
            percent(row["fac"]),
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
    entries = [_entry(item, view.threshold) for item in view.missing[:MOST]]
    left = len(view.missing) - len(entries)
    body = join(
        tag("p", READING),
        more(entries, OPEN, "missing features"),
        tag("p", f"{left:,} more are in ", tag("code", "coverage/missing.parquet"), ".") if left else None,
    )
    return Section("missing", short, title, body)


def _entry(item: Missing, threshold: float) -> Html:
    side = facts(
        f"anchor peak {item.anchor_peak:.2f}",
        f"{item.anchor_documents:,} anchor document{'' if item.anchor_documents == 1 else 's'}",
        _evidence(item.relevance),
        _reached(item.kept_peak, threshold),
    )
    passages = [
        tag("li", tag("span", f"{s.score:.2f}", class_="score"), tag("div", span(s.before, s.token, s.after)))
        for s in item.spans[:SPANS]
    ]
    return entry(f"Feature {item.feature}", side, _said(item.explanation), tag("ul", passages, class_="spans"))


def _evidence(relevance: Row) -> str | None:
    """Why a feature counts as relevant, in a few words."""
    if relevance.get("label"):
        return f"judged {relevance['label']}"
    if relevance.get("q") is not None:
        return f"AUROC {relevance['auroc']:.2f}, q {relevance['q']:.2g}"
    return None


def _reached(peak: float | None, threshold: float) -> str | None:
    if peak is None:
        return None
    return f"kept samples reach {peak:.2f}" if peak > threshold else "not reached by kept samples"


def _said(explanation: Row) -> Html:
    """The explanation: an LLM's sentence, or the embedded method's two lists of tokens."""
    if not explanation.get("explanation"):
        return tag("p", "No explanation was found.", class_="said quiet")
    if not explanation.get("fires_on"):
        return tag("p", explanation["explanation"], class_="said")
    parts = [tag("span", "Fires on ", class_="quiet"), _tokens(explanation["fires_on"])]
    if explanation.get("promotes"):
        parts += [tag("span", " · promotes ", class_="quiet"), _tokens(explanation["promotes"])]
    if explanation.get("heldout_auroc") is not None:
        parts.append(tag("span", f" · held-out AUROC {explanation['heldout_auroc']:.2f}", class_="quiet small"))
    return tag("p", parts, class_="said")


def _tokens(tokens: Sequence[str]) -> Html:
    """Tokens side by side, with their spaces made visible."""
    return join(*[[" " if place else None, tag("code", t.replace(" ", "␣"))] for place, t in enumerate(tokens)])
