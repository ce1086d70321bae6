"""How far explanations and verdicts can be trusted: scores on held-out documents beside their controls, a judge's
agreement with itself, and spans that look as if they were written to sway a model.

`features/scores/`, `features/agreement.py` and `features/injection.py` say what each figure means; nothing is shown
for what a run did not measure.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fac_jax.report.blocks import Section, absent, numbers, table, texts
from fac_jax.report.figures import Series, bar_figure
from fac_jax.report.markup import Html, join, tag
from fac_jax.report.products import TESTS, Row, RunView
from fac_jax.report.verdict import percent

WHAT = (
    "Explanations are made from half of the anchor's documents and tested on the other half. Detection: is the feature "
    "active on this passage? The silent passages are mostly those of its nearest neighbours. Fuzzing: is it active at "
    "the marked token? AUROC 0.5 is a coin. The control asks the same by explanations that were shuffled among the "
    "features: what it has above 0.5 would come from the choice of passages, not from the explanations."
)
HOW = {
    "embedded": "Rated by simulation: a feature is expected where the tokens stand that its explanation names.",
    "llm": "Rated by a language model that sees the explanation and the passage. An unreadable reply counts as a coin.",
}
KAPPAS = {"Cohen’s kappa": "kappa", "by steps of the scale": "kappa_linear"}
"""Measures of agreement, as one reads them."""
BINS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Lower ends of the bars."""


def explanations(view: RunView) -> Section:
    """What the tests of the explanations and the passes of the judge came to."""
    title, short = "How far explanations can be trusted", "Trust"
    summary = view.summary("explanations")
    if not summary:
        return Section("explanations", short, title, absent("Explanations", "fac explain CONFIG"))
    relevance = view.summary("relevance")
    body = join(
        tag("p", _counted(summary)),
        _tests(summary) if any(summary.get(f"{test}_auroc") for test in TESTS) else None,
        _figure(view),
        _written(summary.get("generation")),
        _paragraph("The judge and itself. ", agreed(relevance)),
        _paragraph("Passages that give orders. ", suspects(relevance)),
    )
    return Section("explanations", short, title, body)


def interval(found: Row | None, figure: str = "mean") -> str:
    """`0.689 (0.685 to 0.693)`: a figure over features with its bootstrap interval; – where there is none."""
    if found is None:
        return "–"
    return f"{found[figure]:.3f} ({found[f'{figure}_low']:.3f} to {found[f'{figure}_high']:.3f})"


def suspects(relevance: Row) -> str | None:
    """One sentence on passages that look like orders to a model; None where nobody looked for them."""
    if relevance.get("suspect_spans") is None:
        return None
    found, shown = relevance["suspect_spans"], relevance["spans_shown"]
    return (
        f"{found:,} of the {shown:,} passages shown to the judge look as if they were written to sway a language "
        "model; they were shown as data, like all others."
    )


def agreed(relevance: Row) -> str | None:
    """One sentence on how far the passes of a judge agree; None where there was one pass."""
    found = relevance.get("agreement") or {}
    if not found.get("features"):
        return None
    kappas = [f"{name} {found[key]:.2f}" for name, key in KAPPAS.items() if found[key] is not None]
    return (
        f"{found['features']:,} features were judged {relevance['passes']} times, their passages in another order each "
        f"time: {percent(found['same_label'])} got the same label, {percent(found['same_relevance'])} the same side of "
        f"the line. {'; '.join(kappas) or 'Cohen’s kappa is undefined: one label was given to all'}."
    )


def _counted(summary: Row) -> str:
    rest = {"cannot_tell": "without a pattern", "failed": "with an unreadable reply", "left_out": "not asked about"}
    others = [f"{summary[key]:,} {said}" for key, said in rest.items() if summary.get(key)]
    asked = f"{summary['explained']:,} of {summary['features']:,} features that the anchor activates are explained"
    return f"{asked}{'; ' if others else ''}{', '.join(others)}."


def _tests(summary: Row) -> Html:
    rows = []
    for test in TESTS:
        found, control = summary.get(f"{test}_auroc"), summary.get(f"control_{test}_auroc")
        features = "0" if found is None else f"{found['features']:,}"
        rows.append([test.capitalize(), features, interval(found), interval(found, "median"), interval(control)])
    columns = numbers("Features", "Mean AUROC", "Median", "Control: shuffled explanations")
    unread, asked = summary.get("rating_replies_unreadable", 0), summary.get("rating_replies", 0)
    said = f" {unread:,} of {asked:,} replies could not be read." if asked else ""
    return join(
        tag("p", WHAT),
        tag("p", f"{HOW[summary['method']]}{said}", class_="quiet small"),
        table([*texts("Test"), *columns], rows, "On documents that explanations were not made from; 95% intervals"),
    )


def _figure(view: RunView) -> Html | None:
    series = [
        Series(test, list(enumerate(_shares(view.aurocs[test]))), colour)
        for test, colour in zip(TESTS, (2, 1), strict=True)
        if view.aurocs.get(test)
    ]
    names = ["< 0.5", *(f"≥ {low:g}" for low in BINS[1:])]
    return tag("div", bar_figure("Features by AUROC", names, series, "AUROC"), class_="figures") if series else None


def _shares(values: Sequence[float]) -> list[float]:
    place = np.searchsorted(BINS, np.asarray(values), side="right") - 1
    return (np.bincount(place, minlength=len(BINS)) / len(values)).tolist()


def _written(found: Row | None) -> Html | None:
    """Does a text written from the explanation alone activate the feature?"""
    if not found:
        return None
    above = f"above {found['threshold']:g}"
    rows = [
        [f"Share of texts with a peak {level}", interval(found[key]), interval(found[control])]
        for level, key, control in (
            (above, "generation_score", "generation_control"),
            ("above 0", "generation_any", "generation_control_any"),
        )
    ]
    features = (found["generation_score"] or {"features": 0})["features"]
    caption = (
        f"{found['texts']:,} texts for {features:,} features, written by {found['writer']} from the explanation alone "
        f"({found['unusable']:,} were no text); the control: texts that were written for the other features"
    )
    return table([*texts("Generation"), *numbers("Own texts", "Control: others’ texts")], rows, caption)


def _paragraph(heading: str, said: str | None) -> Html | None:
    return tag("p", tag("strong", heading), said) if said else None
