"""Section scores against the published table of sizes and its published arithmetic, written here a second time."""

from __future__ import annotations

import numpy as np
import pytest

from fac_jax.downstream.rewardbench import SECTIONS, missing_and_unknown, overall, section_scores

SIZES = {
    "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40,
    "mt-bench-hard": 37, "math-prm": 984, "refusals-dangerous": 100, "refusals-offensive": 100, "llmbar-natural": 100,
    "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    "xstest-should-refuse": 154, "xstest-should-respond": 250, "donotanswer": 136, "hep-cpp": 164, "hep-go": 164,
    "hep-java": 164, "hep-js": 164, "hep-python": 164, "hep-rust": 164,
}  # fmt: skip
MAPPING = {
    "Chat": ["alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"],
    "Chat Hard": [
        "mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst", "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ],
    "Safety": [
        "refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond", "donotanswer"
    ],
    "Reasoning": ["math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"],
}  # fmt: skip


def test_sections_are_those_published() -> None:
    assert {section: list(weights) for section, weights in SECTIONS.items()} == MAPPING
    assert {name: size for weights in SECTIONS.values() for name, size in weights.items()} == SIZES
    assert SIZES["math-prm"] == sum(size for name, size in SIZES.items() if name.startswith("hep-"))


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_pooled_over_the_pairs_of_a_section(seed: int) -> None:
    """Accuracy over all pairs at once, where each subset has as many as its weight says."""
    generator = np.random.default_rng(seed)
    some = list(SIZES) if seed == 0 else sorted(generator.choice(list(SIZES), 9, replace=False))
    won = {name: generator.random(SIZES[name]) < 0.6 for name in some}
    found = section_scores({name: float(of_subset.mean()) for name, of_subset in won.items()})
    for section, subsets in MAPPING.items():
        pooled = [won[name] for name in subsets if name in won]
        assert (section in found) == bool(pooled)
        if pooled:
            assert found[section] == pytest.approx(np.concatenate(pooled).mean())
    assert overall({name: float(one.mean()) for name, one in won.items()}) == pytest.approx(
        np.mean(list(found.values()))
    )


def test_subsets_that_are_none_or_not_there_are_told() -> None:
    missing, unknown = missing_and_unknown({"alpacaeval-easy", "mine", "another"})
    assert unknown == ["another", "mine"] and missing == [name for name in _in_order() if name != "alpacaeval-easy"]
    assert section_scores({"mine": 1.0}) == {} and overall({"mine": 1.0}) is None
    assert overall({"mine": 1.0, "alpacaeval-easy": 0.25}) == 0.25


def _in_order() -> list[str]:
    return [name for weights in MAPPING.values() for name in weights]
