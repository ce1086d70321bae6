"""Rows of the residual stream with where each came from, and the types they can be stored in.

bfloat16 and float16 rows are kept as they are. An int8 row is the nearest multiples of its largest element / 127, with
that scale beside it: half the bytes, and an error that the store states (`rounding` in manifest.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Int8, Int32, Int64, UInt64

PIECE_ROWS = 64  # converted to float32 at a time: 1 MiB at width 4,096, which the caches hold


@dataclass(frozen=True)
class Rows:
    """Rows of the store. `doc` is the document id as a number: `f"{doc:016x}"` is `Document.id`.

    `doc`, `position` and `token` are empty where nobody asked for them: they cost a store one read in two.
    """

    resid: Float[np.ndarray, "b d"]
    """bfloat16 or float16."""
    doc: UInt64[np.ndarray, " b"]
    position: Int32[np.ndarray, " b"]
    token: Int32[np.ndarray, " b"]

    def __len__(self) -> int:
        return len(self.resid)

    @property
    def has_origin(self) -> bool:
        """Whether `doc`, `position` and `token` are there."""
        return len(self.doc) == len(self)

    def take(self, index: Int64[np.ndarray, " n"], into: Rows | None = None) -> Rows:
        """The rows at `index`, in new arrays or in those of `into`."""
        if into is None:
            into = empty_rows(len(index), self.resid.shape[1], self.resid.dtype, self.has_origin)
        for f in dataclasses.fields(self):
            source, target = getattr(self, f.name), getattr(into, f.name)
            if len(target) == 0:  # nobody asked for it
                continue
            if source.dtype == ml_dtypes.bfloat16:  # numpy moves its own types 4 times as fast
                source, target = source.view(np.uint16), target.view(np.uint16)
            np.take(source, index, axis=0, out=target, mode="clip")  # "clip": with "raise" numpy buffers the output
        return into

    def span(self, start: int, stop: int) -> Rows:
        """Rows [start, stop), without a copy."""
        return Rows(self.resid[start:stop], self.doc[start:stop], self.position[start:stop], self.token[start:stop])

    def fill(self, start: int, other: Rows) -> None:
        """Copy `other` over the rows from `start` on."""
        for f in dataclasses.fields(self):
            getattr(self, f.name)[start : start + len(other)] = getattr(other, f.name)


def empty_rows(rows: int, d_model: int, dtype: np.dtype | type = ml_dtypes.bfloat16, with_origin: bool = True) -> Rows:
    """Arrays to be filled."""
    resid, known = np.empty((rows, d_model), dtype), rows if with_origin else 0
    return Rows(resid, np.empty(known, np.uint64), np.empty(known, np.int32), np.empty(known, np.int32))


def row_dtype(stored: str) -> np.dtype:
    """Type of `Rows.resid` in a store whose manifest says `stored`."""
    return np.dtype(np.float16) if stored == "float16" else np.dtype(ml_dtypes.bfloat16)


def to_int8(resid_bd: Float[np.ndarray, "b d"]) -> tuple[Int8[np.ndarray, "b d"], Float32[np.ndarray, " b"], float]:
    """Rounded rows, the scale of each, and the sum of squared errors."""
    rounded_bd, scale_b, error = np.empty(resid_bd.shape, np.int8), np.empty(len(resid_bd), np.float32), 0.0
    for start in range(0, len(resid_bd), PIECE_ROWS):
        span = slice(start, start + PIECE_ROWS)
        piece_bd = resid_bd[span].astype(np.float32)
        scale_b[span] = np.abs(piece_bd).max(axis=1) / 127
        scale_b1 = np.where(scale_b[span] > 0, scale_b[span], 1)[:, None]
        nearest_bd = np.rint(piece_bd / scale_b1)
        rounded_bd[span] = nearest_bd
        error += float(np.square(nearest_bd * scale_b1 - piece_bd).sum(dtype=np.float64))
    return rounded_bd, scale_b, error


def from_int8(
    rounded_bd: Int8[np.ndarray, "b d"], scale_b: Float32[np.ndarray, " b"], into: Float[np.ndarray, "b d"]
) -> None:
    """Write the rows that `to_int8` rounded into `into`."""
    for start in range(0, len(rounded_bd), PIECE_ROWS):
        span = slice(start, start + PIECE_ROWS)
        into[span] = rounded_bd[span] * scale_b[span, None]
