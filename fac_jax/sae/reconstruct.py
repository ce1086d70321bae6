"""The forward pass that training differentiates, one for all kinds of SAE, over a mesh.

Features are chosen without a gradient (`select.py`), and all else is made from the few rows of W that were chosen
(`sparse.py`) or, where those are many, through all of them (`dense.py`). Rows of the batch are split over the mesh's
`data` axis and features over its `feature` axis; what crosses feature shards is kept values and partial sums. These are
scattered: a feature shard gets its share of the rows' reconstructions, so that what is done with them is split as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from fac_jax.mesh import DATA, FEATURE, row_sharding
from fac_jax.sae.decode import Way, decode_selected
from fac_jax.sae.dense import decode_jump, dense_pays
from fac_jax.sae.model import SAE
from fac_jax.sae.select import Among, Best, batch_threshold, select
from fac_jax.sae.sparse import Decoded, Selected, Weights
from fac_jax.sae.topk import winners


class Reconstruction(NamedTuple):
    """What `reconstruct` returns."""

    x_hat_bpd: Float[Array, "b p d"]
    """Made from the first p groups of features; the last is the whole reconstruction."""
    dead_hat_bd: Float[Array, "b d"]
    """Sum over the best dead features, without b_dec: what they make of the residual (zero when none is dead)."""
    active_f: Int[Array, " f"]
    """Rows on which each feature is active."""
    l0_b: Float[Array, " b"]
    """Active features of each row; differentiable in the thresholds of JumpReLU."""
    threshold: Float[Array, ""]
    """BatchTopK: the smallest activation that this batch kept; else 0."""
    at_cap: Int[Array, ""]
    """BatchTopK: rows that kept as many features as a row can, and may have wanted more; else 0."""


@dataclass(frozen=True)
class Choice:
    """How the features of a row are chosen, and how they are decoded: all that is static about it."""

    kind: Literal["topk", "batchtopk", "jumprelu"]
    k_max: int = 0
    """Bound of K."""
    row_cap: int = 0
    """BatchTopK: features that one row can keep, at most."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka: the first so many features must reconstruct alone; the last is all. Empty: no nesting."""
    width: float = 1.0
    """JumpReLU: of the rectangle that stands for the gradient of a step."""
    dtype: str = "float32"
    """Input type of the matmul that selects, and of all matmuls where decoding is dense; they accumulate in float32."""
    platform: str = "cpu"
    """Of the devices that run it: cpu, gpu or tpu. It decides between dense and sparse decoding."""

    @property
    def candidates(self) -> int:
        """Features that a row selects before anything else is asked of them."""
        return self.row_cap if self.kind == "batchtopk" else self.k_max

    def dense(self, features: int, shards: int = 1) -> bool:
        """Whether each of `shards` shards of this many features decodes through all of them.

        Nested groups are decoded sparsely. Of 4 shards or more, one keeps at most half of what it selected in any row
        (`decode.py` takes no more columns than that), if features are spread evenly.
        """
        columns = -(-self.candidates // 2) if shards >= 4 else self.candidates
        return self.kind == "jumprelu" or (not self.prefixes and dense_pays(columns, features, self.platform))


class Dead(NamedTuple):
    """Which features are dead, and how many of them share in the auxiliary reconstruction."""

    dead_f: Array
    k: int


def reconstruct(
    sae: SAE,
    x_bd: Float[Array, "b d"],
    counted_b: Array,
    k: Int[Array, ""] | int,
    *,
    choice: Choice,
    mesh: Mesh,
    dead: Dead | None = None,
) -> Reconstruction:
    """Reconstruct the rows from the features that `choice` keeps of them; differentiable in the parameters.

    `k` may be traced, k <= choice.k_max; JumpReLU ignores it. Rows are split over `data`, features over `feature`.
    `active_f` counts the rows where the bool `counted_b` holds, and BatchTopK chooses among those only.
    """
    core = partial(_reconstruct_shard, choice=choice, dead_k=dead.k if dead else None, mesh=mesh)
    dead_f = dead.dead_f if dead else jnp.zeros(sae.w_fd.shape[0], bool)
    # An axis of one device is not named: a sum over it would still copy what it sums, the gradient of W among it.
    rows, features = (P(axis) if mesh.shape[axis] > 1 else P() for axis in (DATA, FEATURE))
    scattered = row_sharding(mesh, len(x_bd)).spec if mesh.shape[FEATURE] > 1 else rows
    optional = (sae.w_enc_fd, sae.threshold_f)
    w_enc_fd, threshold_f = (None if parameter is None else parameter[...] for parameter in optional)
    weights = Weights(sae.w_fd[...], w_enc_fd, sae.b_enc_f[...], sae.b_dec_d[...])
    spread = Weights(features, None if w_enc_fd is None else features, features, P())
    sharded = jax.shard_map(
        core,
        mesh=mesh,
        in_specs=(spread, None if threshold_f is None else features, rows, rows, P(), features, P()),
        out_specs=Reconstruction(scattered, scattered, features, rows, P(), P()),
    )
    return sharded(weights, threshold_f, x_bd, counted_b, jnp.asarray(k, jnp.int32), dead_f, dead_f.any())


class Chosen(NamedTuple):
    """What one shard decodes."""

    live: Selected | None
    """None for JumpReLU, which chooses while it decodes."""
    dead: Selected | None
    threshold: Array
    at_cap: Array


class PartialSum(NamedTuple):
    """What the features of one shard add to the reconstruction of its rows."""

    sum_bpd: Array
    """By nested group."""
    l0_b: Array
    active_f: Array


def _reconstruct_shard(
    weights: Weights,
    threshold_f: Array | None,
    x_bd: Array,
    counted_b: Array,
    k: Array,
    dead_f: Array,
    any_dead: Array,
    *,
    choice: Choice,
    dead_k: int | None,
    mesh: Mesh,
) -> Reconstruction:
    """One shard's rows and features; only kept values and partial reconstructions cross shards."""
    over_data, over_features = _axes(mesh)
    vary = partial(jax.lax.pcast, to="varying")  # the gradient of what devices share is summed over them
    b_dec_d = weights.b_dec_d
    w_fd, w_enc_fd, b_enc_f, threshold_f = vary(
        (weights.w_fd, weights.w_enc_fd, weights.b_enc_f, threshold_f), over_data
    )
    weights = Weights(w_fd, w_enc_fd, b_enc_f, vary(b_dec_d, over_data + over_features))
    x_bd = vary(x_bd, over_features)

    dead = None if dead_k is None else Dead(dead_f, dead_k)
    chosen = _choose(weights, x_bd, counted_b, k, dead, any_dead, choice, mesh)
    partial_sum, revived = _decode(weights, threshold_f, x_bd, counted_b, chosen, any_dead, dead_k, choice, mesh)

    def total(sum_b: Array) -> Array:
        """Over all features; of this shard's share of the rows where they can be shared."""
        if not over_features or len(sum_b) % mesh.shape[FEATURE]:
            return jax.lax.psum(sum_b, over_features)
        return jax.lax.psum_scatter(sum_b, FEATURE, scatter_dimension=0, tiled=True)

    x_hat_bpd = jnp.cumsum(total(partial_sum.sum_bpd), axis=1) + b_dec_d
    dead_hat_bd = nothing_bd = jnp.zeros_like(x_hat_bpd[:, 0])
    if revived is not None:  # nothing crosses shards where nobody is dead
        dead_hat_bd = jax.lax.cond(any_dead, total, lambda _: nothing_bd, revived.sum_bpd[:, 0])
    return Reconstruction(
        x_hat_bpd=x_hat_bpd,
        dead_hat_bd=dead_hat_bd,
        active_f=jax.lax.psum(partial_sum.active_f, over_data),
        l0_b=jax.lax.psum(partial_sum.l0_b, over_features),
        threshold=chosen.threshold,
        at_cap=chosen.at_cap,
    )


def _decode(
    weights: Weights,
    threshold_f: Array | None,
    x_bd: Array,
    counted_b: Array,
    chosen: Chosen,
    any_dead: Array,
    dead_k: int | None,
    choice: Choice,
    mesh: Mesh,
) -> tuple[PartialSum, Decoded | None]:
    """What this shard's live features add, and what its dead ones would, each sparsely or densely as it costs less."""
    features, shards = len(weights.b_enc_f), mesh.shape[FEATURE]
    rivals = choice.row_cap // choice.k_max * shards if choice.kind == "batchtopk" else shards
    groups = max(1, len(choice.prefixes))
    live_way = Way(choice.dense(features, shards), choice.dtype, groups, choice.platform, rivals)
    dead_dense = dead_k is not None and dense_pays(min(dead_k, features), features, choice.platform)
    dead_way = Way(dead_dense, choice.dtype, platform=choice.platform, shards=shards)
    found, revived = decode_selected(live_way, dead_way, weights, x_bd, chosen.live, chosen.dead, any_dead)
    if chosen.live is None:
        assert threshold_f is not None
        jumped = decode_jump(choice.dtype, choice.width, weights, threshold_f, x_bd)
        active_f = jnp.sum(jumped.on_bf & counted_b[:, None], axis=0, dtype=jnp.int32)
        return PartialSum(jumped.sum_bd[:, None], jumped.l0_b, active_f), revived
    assert found is not None
    l0_b = (found.acts_bk > 0).sum(axis=1).astype(jnp.float32)
    return PartialSum(found.sum_bpd, l0_b, _count(found, chosen.live, counted_b, features, mesh)), revived


def _choose(
    weights: Weights,
    x_bd: Array,
    counted_b: Array,
    k: Array,
    dead: Dead | None,
    any_dead: Array,
    choice: Choice,
    mesh: Mesh,
) -> Chosen:
    """Which features of this shard each row is decoded from."""
    over_data, over_features = _axes(mesh)
    features = len(weights.b_enc_f)
    encoder_fd, centred_bd = weights.encoder_fd, x_bd - weights.b_dec_d
    best = partial(select, encoder_fd, weights.b_enc_f, centred_bd, choice.dtype, platform=choice.platform)

    def of_all_shards(found: Best, k: Array | int, k_max: int) -> Selected:
        wins_b = winners(found.val_bk, k, k_max, over_features)
        places_k = jnp.arange(found.val_bk.shape[1])
        return Selected(found.idx_bk, (places_k < wins_b[:, None]) & (found.val_bk > -jnp.inf), found.val_bk)

    live = [] if choice.kind == "jumprelu" else [Among(choice.candidates)]
    if dead is None:
        found, revived = (best(live) if live else ()), None
    else:
        asked = Among(dead.k, dead.dead_f)

        def with_dead() -> tuple[tuple[Best, ...], Selected]:
            *found, revived = best([*live, asked])
            return tuple(found), of_all_shards(revived, dead.k, dead.k)

        nobody = _zeros(jax.eval_shape(lambda: with_dead()[1]), mesh)
        found, revived = jax.lax.cond(any_dead, with_dead, lambda: (best(live) if live else (), nobody))

    nothing = jnp.float32(0), jnp.int32(0)
    if choice.kind == "jumprelu":
        return Chosen(None, revived, *nothing)
    if choice.kind == "topk":
        kept, aside = of_all_shards(found[0], k, choice.k_max), nothing
    else:
        allowed = of_all_shards(found[0], choice.row_cap, choice.row_cap)  # the same rows reach the cap on any mesh
        val_bk = jnp.where(allowed.kept_bk, allowed.val_bk, -jnp.inf)
        threshold = batch_threshold(val_bk, counted_b, k, over_data + over_features)
        kept = allowed._replace(kept_bk=val_bk >= threshold)
        full_b = jax.lax.psum(kept.kept_bk.sum(axis=1), over_features) == choice.row_cap
        aside = threshold, jax.lax.psum(jnp.sum(full_b & counted_b, dtype=jnp.int32), over_data)
    if choice.prefixes:
        first = jax.lax.axis_index(FEATURE) * features if over_features else 0
        ends_p = jnp.asarray(choice.prefixes, jnp.int32)
        kept = kept._replace(group_bk=jnp.searchsorted(ends_p, kept.idx_bk + first, side="right").astype(jnp.int32))
    return Chosen(kept, revived, *aside)


def _count(found: Decoded, chosen: Selected, counted_b: Array, features: int, mesh: Mesh) -> Array:
    """Counted rows of this shard on which each of its features is active."""
    counted_bk = ((found.acts_bk > 0) & counted_b[:, None]).astype(jnp.int32)
    none_f = _zeros(jax.ShapeDtypeStruct((features,), jnp.int32), mesh)
    return none_f.at[chosen.idx_bk].add(counted_bk)


def _axes(mesh: Mesh) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mesh axes over rows and over features that have more than one device."""
    over_data, over_features = ((axis,) if mesh.shape[axis] > 1 else () for axis in (DATA, FEATURE))
    return over_data, over_features


def _zeros(like: Any, mesh: Mesh) -> Any:
    """Zeros in the form of `like` that differ from device to device, as the checker of shard_map sees it."""
    axes = sum(_axes(mesh), ())
    return jax.tree.map(lambda leaf: jax.lax.pcast(jnp.zeros(leaf.shape, leaf.dtype), axes, to="varying"), like)
