"""Which rows are measured where not all can be, and how far the figure depends on the draw.

Rows are drawn by a hash of their content and the seed, so that a draw depends neither on the order of the documents nor
on their position. Reads and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int64
from scipy.special import stdtrit

from fac_jax.text import Document, document_hash

GROUPS = 10
"""Groups of rows that are left out in turn."""
CONFIDENCE = 0.95


def drawn(documents: Sequence[Document], seed: int) -> list[Document]:
    """The documents in a random order that is fixed by their contents and the seed; any first part is a sample."""
    return sorted(documents, key=lambda document: (document_hash(document.id, f"diversity {seed}"), document.id))


def within(sizes: Sequence[int], budget: float) -> int:
    """How many of the first rows have at most `budget` tokens (or words) together; one at least, if there is one."""
    ends = np.cumsum(np.asarray(sizes, np.int64))
    return max(int(np.searchsorted(ends, budget, "right")), min(1, len(sizes)))


def interval(
    figure: Callable[[Int64[np.ndarray, " chosen"]], float | None], rows: int, of: int
) -> tuple[float, float] | None:
    """95% interval of a figure of `rows` rows, drawn from `of`, over such draws; None where all rows were taken.

    `figure` computes it from some of the rows. Delete-a-group jackknife: the figure without each tenth of the rows in
    turn, with Student's t and the correction for a finite population. A bootstrap would draw rows twice, and copies
    make a set less diverse. For a figure that depends on how many rows there are, it is the spread at this number of
    rows, not a statement on all of them.
    """
    groups = min(GROUPS, rows)
    if rows >= of or groups < 3:
        return None
    every = np.arange(rows)
    whole, without = figure(every), [figure(every[every % groups != group]) for group in range(groups)]
    left = [value for value in without if value is not None]
    if whole is None or len(left) < groups:
        return None
    spread = math.sqrt((groups - 1) * np.var(left) * (1 - rows / of))
    reach = float(stdtrit(groups - 1, (1 + CONFIDENCE) / 2)) * spread
    return whole - reach, whole + reach
