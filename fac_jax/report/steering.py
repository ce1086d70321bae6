"""What a steering vector does to the answers to held-out questions: a figure of robust accuracy, and a table."""

from __future__ import annotations

from fac_jax.report.blocks import Section, numbers, table, texts
from fac_jax.report.figures import Series, line_figure
from fac_jax.report.markup import Html, join, tag
from fac_jax.report.products import Row, RunView

SAID = (
    "Each question is asked with its choices in both orders; robust accuracy is the share of questions whose matching "
    "choice wins in both, so a model that goes by the letter has none. SCR is robust accuracy at a multiplier of 1 "
    "less that at -1. The random direction is as long as the vector of the kept samples; ± is one sd over seeds."
)


def steering(view: RunView) -> list[Section]:
    """The section, where vectors were measured."""
    found = view.steering
    if found is None:
        return []
    multipliers = [f"{m:g}" for m in found["multipliers"]]
    rows = [
        [
            name,
            *(_percent(row["robust_accuracy"][m]) for m in multipliers),
            _percent(row["scr"]),
            _percent(row["positional_bias"]["0"]),
            *(_percent(row["probability"][m]) for m in ("-1", "0", "1")),
        ]
        for name, row in found["arms"].items()
    ]
    columns = numbers(
        *(f"Robust at {m}" for m in multipliers),
        "SCR",
        "Same letter twice at 0",
        *(f"p(match) at {m}" for m in (-1, 0, 1)),
    )
    samples = found["samples"]
    caption = (
        f"{found['questions']:,} held-out questions in both orders; vectors at layer {found['layer']} of "
        f"{samples['kept']:,} kept and {samples['random']:,} blind samples, {len(found['seeds'])} seeds"
    )
    lines = [
        Series(name, [(float(m), row["robust_accuracy"][m]["mean"]) for m in multipliers], colour)
        for colour, (name, row) in enumerate(found["arms"].items())
    ]
    figure = line_figure("Robust accuracy", lines, "multiplier of the vector", from_zero=True)
    body = join(
        tag("p", SAID),
        tag("div", [figure], class_="figures"),
        table([*texts("Vector"), *columns], rows, caption),
        _norms(found["equal_norm"]) if "equal_norm" in found else None,
    )
    return [Section("steering", "Steering", "Answers under a steering vector", body)]


def _norms(behaviours: list[Row]) -> Html:
    rows = [
        [one["behaviour"], one["run"], f"{one['samples']:,}", *(_length(one[name]) for name in ("norm_before", "norm"))]
        for one in behaviours
    ]
    caption = (
        f"The vectors of {len(rows)} behaviours were brought to the mean of their norms, seed by seed; every vector "
        "above is as long"
    )
    return table([*texts("Behaviour", "Run"), *numbers("Samples", "Norm before", "Norm after")], rows, caption)


def _length(spread: Row) -> str:
    return f"{spread['mean']:.3g} ± {spread['sd']:.2g}"


def _percent(spread: Row) -> str:
    return f"{spread['mean']:.1%} ± {100 * spread['sd']:.1f}"
