"""RewardBench's own arithmetic (arXiv 2403.13787): accuracies of subsets to scores of sections, and their mean.

    section = sum over its subsets of (weight x accuracy) / sum of the weights

A weight is the subset's size as published, whatever part of it was scored; math-prm's is that of all code together. (An
early version of the published table had the sizes of the two xstest subsets the wrong way round.) Pure functions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40
    },
    "Chat Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
        "xstest-should-respond": 250, "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
        "hep-rust": 164,
    },
}  # fmt: skip
"""Weights of the subsets of each section."""


def section_scores(accuracies: Mapping[str, float]) -> dict[str, float]:
    """Scores by section, of accuracies by subset; a section of which no subset is there has none."""
    scores = {}
    for section, weights in SECTIONS.items():
        there = {subset: weight for subset, weight in weights.items() if subset in accuracies}
        if there:
            total = sum(weight * accuracies[subset] for subset, weight in there.items())
            scores[section] = total / sum(there.values())
    return scores


def overall(accuracies: Mapping[str, float]) -> float | None:
    """Mean of the sections that are there; None where none is."""
    scores = section_scores(accuracies)
    return sum(scores.values()) / len(scores) if scores else None


def missing_and_unknown(subsets: Collection[str]) -> tuple[list[str], list[str]]:
    """Subsets of the benchmark that are not there, and those there that it has not."""
    known = [subset for weights in SECTIONS.values() for subset in weights]
    return [one for one in known if one not in subsets], sorted(set(subsets) - set(known))
