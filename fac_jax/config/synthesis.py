"""`synthesize` and `ablation`: samples for what is missing, and with one thing changed at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from fac_jax.config.checks import check


@dataclass(frozen=True)
class SynthesizeConfig:
    """Missing features to new samples."""

    max_features: int | None = None
    """Missing features that are written for, those with the highest anchor peaks first; by default all."""
    candidates: int = 4
    """Step 1: candidates per missing feature and attempt."""
    attempts: int = 1
    """Step 1: attempts at most, each for the features that no candidate has activated yet; those left are exhausted."""
    second_step: int = 4
    """Step 2: candidates per missing feature, from its contrastive pair."""
    keep_per_feature: int = 1
    """Samples kept per feature, best activation first."""
    temperature: float = 0.8
    """Sampling temperature (paper: 0.8)."""
    top_p: float = 0.9
    """Nucleus (paper: 0.9)."""
    max_new_tokens: int = 900
    """Tokens a candidate may take (paper: 900)."""
    steer: tuple[float, ...] = ()
    """Embedded writer only: strengths that candidates take in turn, as multiples of the feature's anchor peak. So much
    of its direction is added while the text is written (0: none); later attempts go higher, or lower where what was
    written is no sample. Empty: by prompting alone."""

    def __post_init__(self) -> None:
        check(
            all(math.isfinite(strength) and strength >= 0 for strength in self.steer),
            f"synthesize.steer is {self.steer}; strengths must be 0 or more",
        )
        least = {"candidates": 1, "attempts": 1, "second_step": 0, "keep_per_feature": 1, "max_new_tokens": 8}
        for name, floor in least.items():
            check(
                getattr(self, name) >= floor, f"synthesize.{name} is {getattr(self, name)}; it must be at least {floor}"
            )
        check(
            self.max_features is None or self.max_features >= 1,
            f"synthesize.max_features is {self.max_features}; it must be at least 1, or absent for all",
        )
        check(self.temperature >= 0, f"synthesize.temperature is {self.temperature}; it must not be negative")
        check(0 < self.top_p <= 1, f"synthesize.top_p is {self.top_p}; it must lie in (0, 1]")


@dataclass(frozen=True)
class ArmConfig:
    """One arm of an ablation: what differs from the run's own settings; what is absent does not."""

    target: Literal["missing", "random missing", "random relevant", "random"] = "missing"
    """Features that are written for: those missing, highest anchor peaks first; as many at random of those missing, of
    the relevant ones that the anchor activates, or of all that it activates (the last two: the paper's controls)."""
    max_features: int | None = None
    """synthesize.max_features."""
    feature_ratio: float | None = None
    """This share of the missing features is written for, instead of max_features (paper: 30, 60 and 100%). At random, a
    seed's smaller shares lie in its larger ones."""
    candidates: int | None = None
    """synthesize.candidates."""
    attempts: int | None = None
    """synthesize.attempts."""
    second_step: int | None = None
    """synthesize.second_step."""
    keep_per_feature: int | None = None
    """synthesize.keep_per_feature."""
    temperature: float | None = None
    """synthesize.temperature."""
    steer: tuple[float, ...] | None = None
    """synthesize.steer. Where an arm has it, every arm's fluency is measured."""
    threshold: float | None = None
    """coverage.threshold: also of what is missing, and so of what is written for."""
    samples: str | None = None
    """Nothing is written: the samples are the lines of this file (as in synthesis/kept.jsonl of a run with another
    model: transfer)."""

    def __post_init__(self) -> None:
        ratio = self.feature_ratio
        check(ratio is None or 0 < ratio <= 1, f"feature_ratio is {ratio}; it must lie in (0, 1]")
        check(
            ratio is None or self.max_features is None,
            f"an arm has both feature_ratio {ratio} and max_features {self.max_features}; keep one",
        )

    @property
    def synthesis(self) -> dict[str, Any]:
        """Settings of `synthesize` that the arm changes."""
        named = (item.name for item in fields(SynthesizeConfig) if hasattr(self, item.name))
        return {name: value for name in named if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class AblationConfig:
    """Synthesis with one thing changed at a time, side by side: `fac ablate`."""

    name: str = "ablation"
    """Names the product, ablations/NAME."""
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    """What is compared, by name."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each arm is run once with each, in place of run.seed; intervals are over them."""

    def __post_init__(self) -> None:
        for what, name in (("ablation.name", self.name), *(("an arm's name", arm) for arm in self.arms)):
            plain = bool(name.strip()) and not name.startswith(".") and not set(name) & set("/\\")
            check(
                plain,
                f"{what} is {name!r}; it names a folder, so it must not be empty, begin with a dot or hold / or \\",
            )
        check(
            bool(self.seeds) and len(set(self.seeds)) == len(self.seeds),
            f"ablation.seeds is {list(self.seeds)}; name one seed or more, none twice",
        )
