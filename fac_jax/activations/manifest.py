"""What a store says about itself: manifest, commit records, statistics. Plain dataclasses, no input or output.

A commit record carries sums over its shard, so that statistics of a store of any size are reductions over records and
no row is read again. Everything is kept as JSON beside its own SHA-256: a flipped bit in a row count must not pass.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Float, Float64

from fac_jax.activations.rows import PIECE_ROWS
from fac_jax.errors import UserError
from fac_jax.plain import from_plain, to_plain

T = TypeVar("T")
Split = Literal["train", "validation"]

SPLITS: tuple[Split, ...] = ("train", "validation")
VERSION = 2
SAMPLED_NORMS = 256  # per shard, for the quantiles
BLOCK_BYTES = 2**20  # about; single rows are 80 times slower to read
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True)
class SplitTotals:
    """What one split holds."""

    rows: int
    parts: tuple[tuple[str, int], ...]
    """Path of the split's part of each shard, below the store, and its rows; in a merged store the path begins with
    the number of the member and a colon."""
    mean: tuple[float, ...]
    """Mean residual [d_model]."""
    second_moment: tuple[float, ...]
    """Mean square of each of its elements [d_model]."""
    norm_quantiles: dict[str, float]
    """Quantiles ("0.5" is the median) of the residuals' Euclidean norms, from `SAMPLED_NORMS` rows of each shard."""
    outliers: int
    """Rows left out because of their norm (`norm_filter`)."""
    rounding: float
    """Mean squared error of a row through rounding to int8."""

    @property
    def mean_square(self) -> float:
        """Mean squared norm of a residual."""
        return float(sum(self.second_moment))

    @property
    def variance(self) -> float:
        """Mean squared distance of a residual from the mean: what FVU divides by."""
        return self.mean_square - float(np.square(self.mean).sum())


@dataclass(frozen=True)
class Totals:
    """What a complete store holds."""

    splits: dict[str, SplitTotals]
    counts: dict[str, int]
    """What the harvest counted over the corpus (documents, computed tokens, ...), summed over writers."""


@dataclass(frozen=True)
class Form:
    """How the rows of an array are laid out and stored."""

    block_rows: int
    """Rows of a block."""
    compression: str = "none"
    """none, or bitshuffle (blosc with zstd)."""

    def padded(self, rows: int) -> int:
        """Rows of an array that holds so many: whole blocks."""
        return -(-rows // self.block_rows) * self.block_rows


def rows_per_block(d_model: int, dtype: str) -> int:
    """Rows that make a block of a store: the power of two nearest to `BLOCK_BYTES`, and 32 to 1,024 rows.

    Each block costs its reader a request, so that small ones are slow: of width 576 the stream came at .73 of the rate
    of its blocks alone when they had 512 rows, with 1,024 at .78 and .86 (fac bench activations, 2 cores, 2026-11-26).
    """
    wanted = BLOCK_BYTES / (d_model * (1 if dtype == "int8" else 2))
    return 2 ** min(10, max(5, round(math.log2(wanted))))


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
    """Of the stored rows: bfloat16, float16 or int8."""
    compression: str = "none"
    """none, or bitshuffle (blosc with zstd)."""
    block_rows: int = 128
    """Rows that are read together."""
    norm_filter: float = 0.0
    """Rows whose norm exceeds this many times the median of their shard are left out; 0: none."""
    version: int = VERSION
    totals: Totals | None = None
    """Present when the store is complete."""
    members: tuple[str, ...] = ()
    """Of a merged store: the stores whose shards it names; it holds none itself."""
    files_digest: str = ""
    """Of the corpus's files; empty in stores from before it was noted."""

    @property
    def form(self) -> Form:
        """How its arrays are stored."""
        return Form(self.block_rows, self.compression)


@dataclass(frozen=True)
class Layers:
    """What `layers.json` beside the stores of several layers holds."""

    layers: tuple[int, ...]


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
    squares: tuple[float, ...]
    """Sum of the squares of their elements [d_model]."""
    norms: tuple[float, ...]
    """Norms of up to `SAMPLED_NORMS` random rows."""
    outliers: int = 0
    """Rows left out because of their norm."""
    rounding: float = 0.0
    """Sum of squared errors through rounding to int8."""


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


@dataclass(frozen=True)
class Quarantine:
    """Blocks that `fac store verify` found damaged, by the path of their part."""

    blocks: dict[str, tuple[int, ...]]


def check_holds(
    manifest: Manifest, path: str | Path, remedy: str = "run `fac harvest` again or set train.store", **asked: Any
) -> None:
    """Raise UserError unless every named field of the manifest has the value asked for, such as `layer=16`."""
    other = {name: value for name, value in asked.items() if getattr(manifest, name) != value}
    if other:
        holds = ", ".join(f"{name} {getattr(manifest, name)}" for name in other)
        asks = ", ".join(str(value) if len(other) == 1 else f"{name} {value}" for name, value in other.items())
        raise UserError(f"store at {path} holds {holds}, config asks {asks}: {remedy}")


@dataclass(frozen=True)
class Sums:
    """Sums over rows, and the squared norm of each."""

    sum_d: Float64[np.ndarray, " d"]
    squares_d: Float64[np.ndarray, " d"]
    squares_b: Float64[np.ndarray, " b"]


def sums_of(resid_bd: Float[np.ndarray, "b d"]) -> Sums:
    """One pass over the rows, in pieces that the caches hold."""
    rows, d_model = resid_bd.shape
    found = Sums(np.zeros(d_model), np.zeros(d_model), np.empty(rows))
    for start in range(0, rows, PIECE_ROWS):
        piece_bd = resid_bd[start : start + PIECE_ROWS].astype(np.float32)
        found.sum_d[:] += piece_bd.sum(axis=0)
        np.multiply(piece_bd, piece_bd, out=piece_bd)
        found.squares_d[:] += piece_bd.sum(axis=0)
        found.squares_b[start : start + PIECE_ROWS] = piece_bd.sum(axis=1)
    return found


def part_of(sums: Sums, outliers: int, rounding: float) -> Part:
    """What a commit record says of rows that are in random order."""
    norms = tuple(np.sqrt(sums.squares_b[:SAMPLED_NORMS]).tolist())
    described = tuple(sums.sum_d.tolist()), tuple(sums.squares_d.tolist())
    return Part(len(sums.squares_b), *described, norms, outliers, rounding)


class Reduction:
    """Totals of a split, from its parts one by one: of each only path, rows and sampled norms are kept."""

    def __init__(self, d_model: int) -> None:
        self._sum_d, self._squares_d = np.zeros(d_model), np.zeros(d_model)
        self._parts: list[tuple[str, int]] = []
        self._norms = [np.empty(0, np.float32)]
        self._outliers, self._rounding = 0, 0.0

    def add(self, path: str, part: Part) -> None:
        """One more part."""
        self._outliers += part.outliers
        if part.rows:
            self._sum_d += part.sum
            self._squares_d += part.squares
            self._parts.append((path, part.rows))
            self._norms.append(np.asarray(part.norms, np.float32))
            self._rounding += part.rounding

    def totals(self) -> SplitTotals:
        """Of the parts so far. A sampled norm weighs as many rows as it stands for."""
        rows = sum(count for _, count in self._parts)
        sampled = zip(self._parts, self._norms[1:], strict=True)
        weights = [np.full(len(norms), count / len(norms), np.float32) for (_, count), norms in sampled]
        quantiles = np.zeros(len(QUANTILES))
        if rows:
            norms, weight = np.concatenate(self._norms), np.concatenate(weights)
            quantiles = np.quantile(norms, QUANTILES, weights=weight, method="inverted_cdf")
        return SplitTotals(
            rows=rows,
            parts=tuple(self._parts),
            mean=tuple((self._sum_d / max(rows, 1)).tolist()),
            second_moment=tuple((self._squares_d / max(rows, 1)).tolist()),
            norm_quantiles={str(q): float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
            outliers=self._outliers,
            rounding=self._rounding / max(rows, 1),
        )


def seal(value: Any) -> bytes:
    """A dataclass as JSON with its SHA-256."""
    body = to_plain(value)
    return json.dumps({"sha256": _digest(body), "body": body}, allow_nan=False, separators=(",", ":")).encode()


def unseal(kind: type[T], data: bytes, where: str) -> T:
    """What `seal` was given. Raises UserError when it is damaged or of another version."""
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
    if isinstance(body, dict) and body.get("version", VERSION) < VERSION:
        raise UserError(
            f"{where} is of store version {body['version']}, this program reads version {VERSION}: harvest again"
        )
    return from_plain(kind, body, where)


def identity(manifest: Manifest) -> dict[str, Any]:
    """Every field but the totals."""
    return {f.name: getattr(manifest, f.name) for f in dataclasses.fields(manifest) if f.name != "totals"}


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
