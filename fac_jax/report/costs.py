"""What the answers of a language model server cost: by purpose, by feature, and for each feature newly covered.

Reads the run's ledger (`llm/ledger.py`), which holds every answer that was paid for in this run directory, also those
whose product was set aside since. A run that asked no server has no such section.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fac_jax.llm.ledger import Sum, price, sum_of, sums_by
from fac_jax.report.blocks import Section, numbers, table, texts
from fac_jax.report.markup import join, tag
from fac_jax.report.products import RunView

DEAREST = 10
"""Features listed."""


def costs(view: RunView) -> list[Section]:
    """A table by purpose and one of the features that cost most; nothing when nothing was asked."""
    if not view.ledger:
        return []
    money = _priced(view)
    by_purpose = sums_by(view.ledger, "purpose")
    total = sum_of(view.ledger)
    rows = [[name or "other", *_cells(found, money)] for (name,), found in sorted(by_purpose.items())]
    rows.append(["All", *_cells(total, money)])
    by_feature = {key[0]: found for key, found in sums_by(view.ledger, "feature").items() if key[0] is not None}
    dearest = sorted(by_feature.items(), key=lambda item: (-item[1].cost, -item[1].tokens, item[0]))[:DEAREST]
    named = [[f"{feature}", *_cells(found, money)] for feature, found in dearest if found.answers]
    heads = [
        *numbers("Answers", "From the cache", "Tokens read", "Tokens written"),
        *(numbers("Cost") if money else []),
    ]
    body = join(
        tag("p", said(view)),
        table([*texts("Purpose"), *heads], rows),
        table([*texts("Feature"), *heads], named, "The features that took most") if named else None,
    )
    return [Section("costs", "Costs", "What the answers cost", body)]


def said(view: RunView) -> str:
    """One sentence with the sum, and what it comes to for each missing feature that the kept samples activate."""
    total = sum_of(view.ledger)
    words = (
        f"{total.answers:,} answers were paid for and {total.cached:,} came from the cache: {_spelled(view, total, 1)}"
    )
    covered = sum((missing.kept_peak or 0.0) > view.threshold for missing in view.missing)
    if covered:
        words += f", {_spelled(view, total, covered)} for each of {covered:,} newly covered features"
    return f"{words}."


def _priced(view: RunView) -> bool:
    return price(view.config.llm, 0, 0) is not None


def _spelled(view: RunView, found: Sum, shares: int) -> str:
    """A sum divided by `shares`: `12,300 tokens at a cost of 0.0412`."""
    cost = f" at a cost of {found.cost / shares:,.4f}" if _priced(view) else ""
    return f"{found.tokens / shares:,.0f} tokens{cost}"


def _cells(found: Sum, money: bool) -> Sequence[Any]:
    counts = [found.answers, found.cached, found.prompt_tokens, found.completion_tokens]
    return [*(f"{count:,}" for count in counts), *([f"{found.cost:,.4f}"] if money else [])]
