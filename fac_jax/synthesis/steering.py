"""How hard each draw is steered: strengths tried in turn, and a search where none of them was enough.

A strength is a multiple of the feature's anchor peak: 1 adds as much of the feature's direction as the text of the
anchor that activates it most. The grid is the same for all features, and multiplied by a factor of each feature's own:
1 in the first attempt; then higher where what was written still were samples, lower where the writer broke.
Reads and writes no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fac_jax.llm.client import Steer

FACTOR = 1.5
"""Between the strengths of one attempt and those of the next."""


@dataclass(frozen=True)
class Strengths:
    """Strengths of the draws of every feature."""

    grid: tuple[float, ...] = ()
    """Taken in turn; empty: no draw is steered."""
    factors: Mapping[int, float] = field(default_factory=dict)
    """By feature, of those that were searched for."""

    def steer(self, feature: int, peak: float, index: int) -> Steer | None:
        """What draw `index` of a feature with that anchor peak is steered by; None with a strength of 0."""
        multiple = self.grid[index % len(self.grid)] * self.factors.get(feature, 1.0) if self.grid else 0.0
        return Steer(feature, multiple * peak) if multiple else None

    def searched(self, intact: Mapping[int, Sequence[bool]]) -> Strengths:
        """The next attempt's, from whether each steered draw of the features that are still unmet was a sample."""
        moved = {feature: next_factor(self.factors.get(feature, 1.0), drawn) for feature, drawn in intact.items()}
        return Strengths(self.grid, {**self.factors, **moved})


UNSTEERED = Strengths()


def next_factor(factor: float, intact: Sequence[bool]) -> float:
    """Higher when most draws were samples, lower when most were none, and the same when neither was so."""
    excess = 2 * sum(intact) - len(intact)
    if not excess:
        return factor
    return factor * FACTOR if excess > 0 else factor / FACTOR
