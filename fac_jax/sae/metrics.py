"""How good an SAE is on held-out rows.

    fvu               sum |x - x_hat|^2 / sum |x - mean|^2      over all rows, centred: 1 is what the mean achieves
    normalised_loss   mean_b( |x - x_hat|^2 / |x|^2 )           the published loss: not centred, so smaller than fvu
    l0                mean number of active features; can be below K, because ReLU comes after top-k
    cosine            mean_b( x . x_hat / (|x| |x_hat|) )
    dead_fraction     features that were active on none of the rows
    dense_fraction    features that were active on more than a tenth of them
    density           how many features are active on which share of the rows: a histogram in powers of ten

Two numbers, two names: the paper's "reconstruction" is `normalised_loss`. Rows beyond `norm_limit` count in none of
them and are reported as `rows_left_out`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from fac_jax.errors import UserError
from fac_jax.mesh import DATA, platform, sharding
from fac_jax.sae.model import SAE
from fac_jax.sae.reconstruct import Choice, reconstruct

DENSE = 0.1
"""Share of rows above which a feature is called dense."""
DENSITY_EDGES = tuple(10.0**power for power in range(-6, 0))
"""Edges of the density histogram, as shares of the rows: 7 bins, the last one up to every row. Dead features are in
none of them."""


@dataclass(frozen=True)
class Validation:
    """Figures on held-out rows, as defined above."""

    fvu: float
    normalised_loss: float
    l0: float
    cosine: float
    dead_fraction: float
    dense_fraction: float
    density: tuple[int, ...]
    """Features by the share of rows they are active on, in the bins that DENSITY_EDGES bound."""
    rows: int
    rows_left_out: int


class Sums(NamedTuple):
    """Over the rows that count. x is taken relative to b_dec, near the mean: no digits are lost in its variance."""

    rows: Array
    left_out: Array
    error: Array
    normalised: Array
    cosine: Array
    active: Array
    shifted_d: Array
    shifted_squares: Array
    active_f: Array


def validate(
    saes: Sequence[tuple[SAE, int | None]],
    blocks: Iterable[Float[np.ndarray, "b d"]],
    batch_rows: int,
    mesh: Mesh,
    norm_limit: float,
) -> list[Validation]:
    """Figures of each (SAE, k) over all rows of `blocks`, arrays of any length, in batches of `batch_rows`.

    The rows are read once. Sums are kept in float64. k is None for an SAE with a threshold.
    """
    totals: list[dict[str, np.ndarray]] = [{} for _ in saes]

    def settle(batch: Sequence[Sums]) -> None:
        for total, sums in zip(totals, batch, strict=True):
            for name, value in sums._asdict().items():
                total[name] = total.get(name, np.float64(0)) + np.asarray(value, np.float64)

    waiting: list[Sums] | None = None  # sums are read while the devices are at the next batch
    for rows_bd in _rebatch(blocks, batch_rows):
        x_bd = jax.make_array_from_callback(rows_bd.shape, sharding(mesh, DATA), rows_bd.__getitem__)
        started = [_sums(sae, x_bd, k=k, norm_limit=norm_limit, mesh=mesh) for sae, k in saes]
        if waiting is not None:
            settle(waiting)
        waiting = started
    if waiting is not None:
        settle(waiting)
    return [_figures(total, norm_limit) for total in totals]


def _figures(total: Mapping[str, np.ndarray], norm_limit: float) -> Validation:
    rows, left_out = (int(total[name]) if total else 0 for name in ("rows", "left_out"))
    if rows == 0:
        raise UserError(
            f"no held-out row can be validated on ({left_out} exceed norm {norm_limit:.4g}): raise train.norm_filter"
        )
    variance = total["shifted_squares"] - np.sum(total["shifted_d"] ** 2) / rows
    share_f = total["active_f"] / rows
    alive_f = share_f > 0
    density = np.bincount(np.searchsorted(DENSITY_EDGES, share_f[alive_f], side="right"), minlength=7)
    return Validation(
        fvu=float(total["error"] / variance),
        normalised_loss=float(total["normalised"] / rows),
        l0=float(total["active"] / rows),
        cosine=float(total["cosine"] / rows),
        dead_fraction=float(1 - alive_f.mean()),
        dense_fraction=float(np.mean(share_f > DENSE)),
        density=tuple(density.tolist()),
        rows=rows,
        rows_left_out=left_out,
    )


@partial(jax.jit, static_argnames=("k", "norm_limit", "mesh"))
def _sums(sae: SAE, x_bd: Array, *, k: int | None, norm_limit: float, mesh: Mesh) -> Sums:
    x_bd = x_bd.astype(jnp.float32)
    square_b = jnp.sum(x_bd**2, axis=1)
    counted_b = (square_b > 0) & (square_b <= norm_limit**2)  # padding has norm 0
    choice = Choice("topk" if k else "jumprelu", k or 0, platform=platform(mesh))
    found = reconstruct(sae, x_bd, counted_b, k or 0, choice=choice, mesh=mesh)
    x_hat_bd = found.x_hat_bpd[:, -1]
    error_b = jnp.sum((x_bd - x_hat_bd) ** 2, axis=1)
    lengths_b = jnp.sqrt(square_b * jnp.sum(x_hat_bd**2, axis=1))
    shifted_bd = jnp.where(counted_b[:, None], x_bd - sae.b_dec_d[...], 0)
    sums = Sums(
        rows=counted_b.sum(),
        left_out=jnp.sum(square_b > norm_limit**2),
        error=jnp.sum(error_b, where=counted_b),
        normalised=jnp.sum(error_b / jnp.where(counted_b, square_b, 1), where=counted_b),
        cosine=jnp.sum(jnp.sum(x_bd * x_hat_bd, axis=1) / jnp.where(lengths_b > 0, lengths_b, 1), where=counted_b),
        active=jnp.sum(found.l0_b, where=counted_b),
        shifted_d=shifted_bd.sum(axis=0),
        shifted_squares=jnp.sum(shifted_bd**2),
        active_f=found.active_f,
    )
    return jax.lax.with_sharding_constraint(sums, sharding(mesh))  # every host reads them


def _rebatch(blocks: Iterable[np.ndarray], batch_rows: int) -> Iterable[np.ndarray]:
    """The same rows in batches of one length, the last one filled up with zeros."""
    kept: list[np.ndarray] = []
    for block in blocks:
        kept.append(block)
        if sum(map(len, kept)) >= batch_rows:
            rows = np.concatenate(kept)
            whole = len(rows) // batch_rows * batch_rows
            yield from np.split(rows[:whole], whole // batch_rows)
            kept = [rows[whole:]]
    if rest := sum(map(len, kept)):
        rows = np.concatenate(kept)
        yield np.concatenate([rows, np.zeros((batch_rows - rest, rows.shape[1]), rows.dtype)])
