"""What a run found, in sentences and key numbers computed from its products: said once, shown on page and terminal.

A sentence claims a difference between classifiers only when two things hold: the intervals mean +- one standard
deviation over training seeds do not overlap, and the 95% bootstrap interval of the difference over held-out documents
excludes zero. Otherwise it says that no difference is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fac_jax.report.products import RunView

ARMS = ("seed", "seed+random", "seed+kept", "anchor")
"""Order and colours of arms, the same in every table and figure."""

_NAMES = {"seed": "the seed set alone", "seed+random": "the seed set with random generations"}


@dataclass(frozen=True)
class KeyNumber:
    """A number that stands out at the head of the report."""

    name: str
    value: str
    under: str


def headline(view: RunView) -> str:
    """The page's title: the first finding, or that there is none yet."""
    if view.coverage is None:
        return "A run without findings yet"
    row = view.coverage["chosen"]
    return f"The seed set misses {row['missing_features']} of {row['anchor_features']} {view.task} features"


def notice(view: RunView) -> str | None:
    """What is shown though the config has changed since it was made; None where nothing is."""
    if not view.outdated:
        return None
    return (
        f"Outdated, made with other settings or inputs than the config has now: {', '.join(view.outdated)}. "
        "`fac status CONFIG` says what changed."
    )


def verdict(view: RunView) -> list[str]:
    """The findings, one sentence each; those whose stage has not run are left out."""
    return [sentence for sentence in (_gap(view), _gain(view), _classifier(view)) if sentence]


def key_numbers(view: RunView) -> list[KeyNumber]:
    """At most four numbers, with what they are."""
    found = []
    if view.coverage is not None:
        row = view.coverage["chosen"]
        value = f"{row['missing_features']} of {row['anchor_features']}"
        under = f"relevant features active on the anchor, not on the seed (threshold {row['threshold']:g})"
        found.append(KeyNumber("Missing features", value, under))
    after = view.after("seed+kept")
    before, random = view.after("seed"), view.after("seed+random")
    if after and before and random:
        value = f"{percent(before['fac'])} → {percent(after['fac'])}"
        found.append(
            KeyNumber("Coverage (FAC)", value, f"seed, then with kept samples; random ones {percent(random['fac'])}")
        )
        under = f"by {_count(len(view.kept), 'kept sample')}; as many random ones {percent(random['target_hit_rate'])}"
        found.append(KeyNumber("Missing features hit", percent(after["target_hit_rate"]), under))
    arms = view.finetune["arms"] if view.finetune else {}
    if view.finetune and "auprc" in arms["seed+kept"]:
        compared = compare(view.finetune, "seed+kept", "seed")
        first = f"{arms['seed']['auprc']['mean']:.3f} vs " if compared else ""
        says = (
            f"seed, with kept samples: {compared.says.removesuffix(' from').removesuffix(' than')}; "
            if compared
            else ""
        )
        under = f"{says}a random scorer {view.finetune['heldout']['base_rate']:.3f}"
        found.append(KeyNumber("Held-out AUPRC", f"{first}{arms['seed+kept']['auprc']['mean']:.3f}", under))
    return found


@dataclass(frozen=True)
class Comparison:
    """How one arm of the classifier did against another."""

    arm: str
    other: str
    says: str
    """`higher than`, `lower than` or `not shown to differ from`."""
    low: float
    high: float

    def __str__(self) -> str:
        interval = f"{self.low:+.3f} to {self.high:+.3f}".replace("-", "−")
        return f"{self.arm} is {self.says} {self.other} (95% interval of the difference {interval})"


def compare(finetune: Mapping[str, Any], arm: str, other: str) -> Comparison | None:
    """An honest comparison of two arms by AUPRC; None when either was not trained."""
    arms = finetune["arms"]
    found = [d for d in finetune["differences"] if (d["arm"], d["minus"]) == (arm, other)]
    if not found:
        return None
    low, high = found[0]["low"], found[0]["high"]
    first, second = arms[arm]["auprc"], arms[other]["auprc"]
    apart = abs(first["mean"] - second["mean"]) > first["sd"] + second["sd"]
    says = "higher than" if apart and low > 0 else "lower than" if apart and high < 0 else "not shown to differ from"
    return Comparison(arm, other, says, low, high)


def percent(share: float | None) -> str:
    """A share as one reads it; an undefined one (empty denominator) is said to be so."""
    return "undefined" if share is None else f"{share:.1%}"


def _gap(view: RunView) -> str | None:
    if view.coverage is None:
        return None
    row, config = view.coverage["chosen"], view.config
    if not row["anchor_features"]:
        return (
            f"{_count(row['relevant_features'], 'feature')} of layer {config.backbone.layer} are relevant to "
            f"{view.task}, but the anchor activates none of them at threshold {row['threshold']:g}, so coverage is "
            "undefined."
        )
    return (
        f"Of {_count(row['relevant_features'], 'feature')} of layer {config.backbone.layer} judged relevant to "
        f"{view.task}, the anchor ({view.coverage['anchor']['documents']:,} documents) activates "
        f"{row['anchor_features']:,} at threshold {row['threshold']:g}; the seed set "
        f"({view.coverage['seed']['documents']:,} documents) covers {percent(row['fac'])} of these and misses "
        f"{row['missing_features']:,}."
    )


def nothing_to_write_for(view: RunView) -> str:
    """Why no feature is missing."""
    if view.coverage is not None and not view.coverage["chosen"]["anchor_features"]:
        return "The anchor activates no relevant feature at this threshold, so there was nothing to write samples for."
    return "No feature is missing, so there was nothing to write samples for."


def _gain(view: RunView) -> str | None:
    before, random, kept = (view.after(name) for name in ARMS[:3])
    if not (before and random and kept):
        return None
    if not view.kept and not view.missing:
        return nothing_to_write_for(view)
    if not view.kept:
        return f"No generation passed the filter, so coverage stays at {percent(before['fac'])}."
    if kept["fac"] == before["fac"]:
        moves = f"coverage stays at {percent(kept['fac'])}"
    else:
        moves = f"coverage rises from {percent(before['fac'])} to {percent(kept['fac'])}"
    return (
        f"With {_count(len(view.kept), 'synthetic sample')}, each kept for an activation measured above the threshold, "
        f"{moves}; with as many randomly chosen generations it is {percent(random['fac'])}."
    )


def _classifier(view: RunView) -> str | None:
    if view.finetune is None:
        return None
    arms, heldout = view.finetune["arms"], view.finetune["heldout"]
    kept = arms["seed+kept"]
    if kept.get("added") == 0 or "auprc" not in kept:
        return f"No classifier could be trained with kept samples: {kept.get('not_trained', 'none were kept')}."
    others = [(name, found) for name in ("seed", "seed+random") if (found := compare(view.finetune, "seed+kept", name))]
    clauses = [
        f"{found.says} {_NAMES[name]} ({arms[name]['auprc']['mean']:.3f} ± {arms[name]['auprc']['sd']:.3f})"
        for name, found in others
    ]
    return (
        "A linear classifier trained on the seed set with the kept samples reaches an AUPRC of "
        f"{kept['auprc']['mean']:.3f} ± {kept['auprc']['sd']:.3f} on {heldout['documents']:,} held-out documents (a "
        f"random scorer: {heldout['base_rate']:.3f}); it is "
        f"{' and '.join(clauses) or 'the only arm that could be trained'}."
    )


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"
