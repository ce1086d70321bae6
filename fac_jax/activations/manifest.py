"""What a store says about itself: manifest, commit records, statistics. Plain dataclasses, no input or output.

A commit record carries sums over its shard, so that statistics of a store of any size are reductions over records and
no row is read again. Everything is kept as JSON beside its own SHA-256: a flipped bit in a row count must not pass.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import BFloat16, Float64

from fac_jax.errors import UserError
from fac_jax.plain import from_plain, to_plain

T = TypeVar("T")

VERSION = 1
SAMPLED_NORMS = 256  # per shard, for the quantiles
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
PIECE_ROWS = 1024  # converted to float32 at a time


@dataclass(frozen=True)
class SplitTotals:
    """What one split holds."""

    rows: int
    parts: tuple[tuple[str, int], ...]
    """Path of the split's part of each shard, below the store, and its rows."""
    mean: tuple[float, ...]
    """Mean residual [d_model]."""
    mean_square: float
    """Mean squared norm of a residual; minus the squared norm of `mean` it is the variance that FVU divides by."""
    norm_quantiles: dict[str, float]
    """Quantiles ("0.5" is the median) of the residuals' Euclidean norms, from `SAMPLED_NORMS` rows of each shard."""


@dataclass(frozen=True)
class Totals:
    """What a complete store holds."""

    splits: dict[str, SplitTotals]
    counts: dict[str, int]
    """What the harvest counted over the corpus (documents, computed tokens, ...), summed over writers."""


@dataclass(frozen=True)
class Manifest:
    """What the rows of a store are: two harvests with equal manifests (totals aside) make equal stores."""

    model: str
    """Source of the backbone, as in the config."""
    model_digest: str
    layer: int
    """Blocks applied before the residual is read."""
    d_model: int
    compute_dtype: str
    """Type the backbone was run in."""
    tokenizer_digest: str
    corpus_digest: str
    """Of every setting that decides which rows there are, and in which order."""
    shard_rows: int
    seed: int
    """Of the shuffling inside shards."""
    writers: int
    """Processes among which the documents are dealt; each writes shards of its own."""
    dtype: str = "bfloat16"
    """Of the stored rows; float16 would overflow on massive activations."""
    version: int = VERSION
    totals: Totals | None = None
    """Present when the store is complete."""


@dataclass(frozen=True)
class Cursor:
    """A place in the corpus: `skip` content tokens into the batch that begins with document `first`."""

    first: int = 0
    skip: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    """What the harvest had counted before that batch."""


@dataclass(frozen=True)
class Part:
    """The rows of one split in a shard, and sums over them."""

    rows: int
    sum: tuple[float, ...]
    """Sum of the residuals [d_model]."""
    sum_squares: float
    """Sum of their squared norms."""
    norms: tuple[float, ...]
    """Norms of up to `SAMPLED_NORMS` random rows."""


@dataclass(frozen=True)
class Record:
    """A committed shard: its parts by split, and where in the corpus the next shard begins."""

    parts: dict[str, Part]
    next: Cursor


@dataclass(frozen=True)
class Finished:
    """A writer's last word: how many shards it committed, and what it counted."""

    shards: int
    counts: dict[str, int]


def check_holds(
    manifest: Manifest, path: str | Path, remedy: str = "run `fac harvest` again or set train.store", **asked: Any
) -> None:
    """Raise UserError unless every named field of the manifest has the value asked for, such as `layer=16`."""
    other = {name: value for name, value in asked.items() if getattr(manifest, name) != value}
    if other:
        holds = ", ".join(f"{name} {getattr(manifest, name)}" for name in other)
        asks = ", ".join(str(value) if len(other) == 1 else f"{name} {value}" for name, value in other.items())
        raise UserError(f"store at {path} holds {holds}, config asks {asks}: {remedy}")


def summarise(resid_bd: BFloat16[np.ndarray, "b d"], squares_b: Float64[np.ndarray, " b"]) -> Part:
    """Sums over rows that are in random order; `squares_b` holds their squared norms."""
    total_d = np.zeros(resid_bd.shape[1])
    for start in range(0, len(resid_bd), PIECE_ROWS):
        total_d += resid_bd[start : start + PIECE_ROWS].astype(np.float32).sum(axis=0, dtype=np.float64)
    norms = tuple(np.sqrt(squares_b[:SAMPLED_NORMS]).tolist())
    return Part(len(resid_bd), tuple(total_d.tolist()), float(squares_b.sum()), norms)


def squared_norms(resid_bd: BFloat16[np.ndarray, "b d"]) -> Float64[np.ndarray, " b"]:
    """Squared Euclidean norm of every row, in float64."""
    squares_b = np.empty(len(resid_bd))
    for start in range(0, len(resid_bd), PIECE_ROWS):
        piece_bd = resid_bd[start : start + PIECE_ROWS].astype(np.float32)
        squares_b[start : start + PIECE_ROWS] = np.einsum("bd,bd->b", piece_bd, piece_bd)
    return squares_b


def reduce_parts(parts: Sequence[tuple[str, Part]], d_model: int) -> SplitTotals:
    """Totals of a split from (path, part) of its shards. A sampled norm weighs as many rows as it stands for."""
    rows = sum(part.rows for _, part in parts)
    mean_d = sum((np.asarray(part.sum) for _, part in parts), np.zeros(d_model)) / max(rows, 1)
    norms = np.concatenate([[0.0] * (not rows), *(part.norms for _, part in parts)])
    weights = np.concatenate([[1.0] * (not rows), *(np.full(len(p.norms), p.rows / len(p.norms)) for _, p in parts)])
    quantiles = np.quantile(norms, QUANTILES, weights=weights, method="inverted_cdf")
    return SplitTotals(
        rows=rows,
        parts=tuple((path, part.rows) for path, part in parts),
        mean=tuple(mean_d.tolist()),
        mean_square=sum(part.sum_squares for _, part in parts) / max(rows, 1),
        norm_quantiles={str(q): float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
    )


def seal(value: Any) -> bytes:
    """A dataclass as JSON with its SHA-256."""
    body = to_plain(value)
    return json.dumps({"sha256": _digest(body), "body": body}, allow_nan=False, separators=(",", ":")).encode()


def unseal(kind: type[T], data: bytes, where: str) -> T:
    """What `seal` was given. Raises UserError when it is damaged or of a newer version."""
    remedy = "restore it, or delete it and run `fac harvest` again"
    try:
        sealed = json.loads(data)
        digest, body = sealed["sha256"], sealed["body"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} cannot be read ({type(error).__name__}: {error}): {remedy}") from None
    if isinstance(body, dict) and body.get("version", VERSION) > VERSION:
        raise UserError(
            f"{where} is of store version {body['version']}, this program reads up to {VERSION}: "
            "upgrade fac-jax, or harvest into another run.dir"
        )
    if digest != _digest(body):
        raise UserError(f"{where} is damaged (its SHA-256 does not match its content): {remedy}")
    return from_plain(kind, body, where)


def identity(manifest: Manifest) -> dict[str, Any]:
    """Every field but the totals."""
    return {f.name: getattr(manifest, f.name) for f in dataclasses.fields(manifest) if f.name != "totals"}


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
