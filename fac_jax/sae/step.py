"""One optimizer step of the autoencoder: loss, auxiliary loss, update. Pure, jitted, donating.

    loss      = sum_b w_b mean_d (x - x_hat)^2 / mean_d x^2            w_b = 1 / rows   (arXiv 2602.10388, section 3)
    auxiliary = mean (e - e_hat)^2 / mean (e - mean_b e)^2             e = x - x_hat, detached; e_hat from dead features
                                                                       only and without b_dec (Gao et al. 2024, A.2)

Matryoshka minimises the mean of `loss` over its prefixes, JumpReLU adds (L0 / K - 1)^2, and BatchTopK follows the
smallest activation of each batch, which becomes the threshold of the finished SAE.

`compat: official` keeps what the published code does: W ~ N(0, 2 / d), zero biases, no scaling, no row filter, no
auxiliary loss, and gradients *summed* over sequences, each the mean over its tokens. (It reads whole sequences; of
shuffled rows, a sequence is what the batch holds of one document.)

Otherwise rows are scaled (`problem.py`), those of W start with unit norm, and b_dec with the mean of the data.
`unscaled` folds the scale into the biases: the finished SAE reads raw residuals, keeps the same features of them, and
its activations, and so every threshold on them, are in residual-stream units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float64, Int
from scipy.special import ndtri

from fac_jax.errors import UserError
from fac_jax.mesh import DATA, FEATURE, row_sharding, sharding
from fac_jax.sae.model import SAE
from fac_jax.sae.problem import Problem, k_at, k_widths, learning_rate_at, make_optimizer
from fac_jax.sae.reconstruct import Dead, reconstruct
from fac_jax.sae.select import HIGHEST

Params = dict[str, Array]
SILENT_MAX = 2**30  # counts of silent rows stop here instead of overflowing
# BatchTopK: weight of a batch in the running mean of its smallest activation. At .01, SAELens's, the mean was so far
# behind after 240 steps that held-out L0 was 57 where K was 64.
THRESHOLD_RATE = 0.05


class Batch(NamedTuple):
    """Rows of the residual stream."""

    x_bd: Float[Array, "b d"]
    weight_b: Float[Array, " b"]
    """1, or with compat official 1 / (rows of the same document in the batch)."""


class Metrics(NamedTuple):
    """Of one step, before its update; named as in metrics.jsonl."""

    loss: Array
    """Normalised loss, over the rows that count."""
    fvu: Array
    """Fraction of the batch's variance that is not reconstructed."""
    l0: Array
    """Mean number of active features."""
    k: Array
    dead_features: Array
    """Features silent for dead_after_rows."""
    dead_fraction: Array
    aux_loss: Array
    learning_rate: Array
    gradient_norm: Array
    rows_left_out: Array
    """By the norm filter."""
    rows_at_cap: Array
    """BatchTopK: rows that kept as many features as one row can."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "optimizer", "silent_f", "threshold"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """All that changes during a training."""

    step: Int[Array, ""]
    params: Params
    """Arrays of SAE by name, for scaled rows; of JumpReLU's thresholds the logarithm."""
    optimizer: optax.OptState
    silent_f: Int[Array, " f"]
    """Rows seen since each feature was last active."""
    threshold: Float[Array, ""]
    """BatchTopK: running mean of the smallest activation kept, since K is what it will be; else 0."""


def init_state(
    problem: Problem, mean_d: Float64[np.ndarray, " d"], seed: int, mesh: Mesh, start: SAE | None = None
) -> TrainState:
    """The state before step 0, made where it will live: no leaf is ever whole on one device if it is sharded.

    `start` is an SAE for raw rows to begin with, instead of a random one. Raises UserError where it does not fit.
    """
    train, features, d = problem.train, problem.sae.features, problem.d_model
    shards = mesh.shape[FEATURE]
    if features % shards:
        raise UserError(f"sae.features {features} cannot be shared equally by {shards} shards: change mesh.feature")
    if train.shard_optimizer and features % mesh.size:
        raise UserError(
            f"sae.features {features} cannot be shared equally by {mesh.size} devices: set train.shard_optimizer to "
            "no, or change mesh.data"
        )

    quantile = max(0.01, float(ndtri(1 - max(problem.sae.k, problem.anneal[0]) / features)))

    def build(mean_d: Array, start: SAE | None) -> TrainState:
        params = random_params(mean_d) if start is None else scaled(start, problem)
        optimizer = make_optimizer(problem).init(params)
        return TrainState(jnp.int32(0), params, optimizer, jnp.zeros(features, jnp.int32), jnp.float32(0))

    def random_params(mean_d: Array) -> Params:
        w_fd = jax.random.normal(jax.random.key(seed), (features, d))
        if problem.official:
            w_fd, b_dec_d = w_fd * math.sqrt(2 / d), jnp.zeros(d)
        else:
            w_fd, b_dec_d = unit_rows(w_fd), mean_d * problem.scale
        params = {"w_fd": w_fd, "b_enc_f": jnp.zeros(features), "b_dec_d": b_dec_d}
        if not problem.sae.tied:
            params["w_enc_fd"] = w_fd
        if problem.sae.activation == "jumprelu":
            # Random directions see about a normal distribution: as many features start active as K is at first.
            variance = jnp.maximum(1 - jnp.mean(b_dec_d**2), 0.01)
            params["log_threshold_f"] = jnp.full(features, jnp.log(jnp.sqrt(variance) * quantile))
        return params

    mean_d = np.asarray(mean_d, np.float32)  # on the host: every process holds the same
    shardings = state_shardings(jax.eval_shape(build, mean_d, start), mesh, train.shard_optimizer)
    return jax.jit(build, out_shardings=shardings)(mean_d, start)


def state_shardings(state: TrainState, mesh: Mesh, shard_optimizer: bool = False) -> TrainState:
    """Sharding of every leaf: whatever has one number or row a feature is split over features, the rest replicated.

    With `shard_optimizer` a feature shard's part of the optimizer is split over the data axis as well.
    """
    specs = SAE.SPECS | {"silent_f": P(FEATURE), "log_threshold_f": P(FEATURE)}
    features = len(state.silent_f)

    def of(path: tuple[object, ...], leaf: Array) -> NamedSharding:
        spec = specs.get(jax.tree_util.keystr(path[-1:], simple=True), P())
        # Not every leaf with a parameter's name has its shape: Adafactor keeps one number a row and one a column.
        if leaf.shape[:1] != (features,) or not spec:
            return sharding(mesh)
        if shard_optimizer and jax.tree_util.keystr(path[:1], simple=True) == "optimizer":
            return sharding(mesh, (FEATURE, DATA), *spec[1 : leaf.ndim])
        return sharding(mesh, *spec[: leaf.ndim])

    return jax.tree.map_with_path(of, state)


def make_train_step(problem: Problem, mesh: Mesh) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted (state, batch) -> (state, metrics) that donates the state and compiles once for all values of K.

    Inside, one branch per doubling of K: the work of a step follows K while K stays a traced value.
    """
    optimizer, train = make_optimizer(problem), problem.train
    widths, unit_norm = k_widths(problem), problem.sae.decoder_norm == "unit"

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        k = k_at(state.step, problem)
        dead_f = state.silent_f >= train.dead_after_rows

        def at_most(k_max: int) -> Callable[[Params], tuple[tuple[Array, tuple[Metrics, Array, Array]], Params]]:
            loss = partial(loss_and_metrics, batch=batch, k=k, dead_f=dead_f, k_max=k_max, problem=problem, mesh=mesh)
            return jax.value_and_grad(loss, has_aux=True)

        branch = sum((k > width).astype(jnp.int32) for width in widths[:-1])
        (_, (metrics, active_f, smallest)), gradient = jax.lax.switch(
            branch, [at_most(width) for width in widths], state.params
        )
        if unit_norm:  # what lies along a row would only be scaled away again
            along_f = jnp.einsum("fd,fd->f", gradient["w_fd"], state.params["w_fd"], precision=HIGHEST)
            gradient["w_fd"] = gradient["w_fd"] - along_f[:, None] * state.params["w_fd"]
        update, moments = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, update)
        if unit_norm:
            params["w_fd"] = unit_rows(params["w_fd"])
        annealing = (k > problem.sae.k) | (state.threshold == 0)  # thresholds of a larger K say nothing of the last one
        threshold = state.threshold + jnp.where(annealing, 1, THRESHOLD_RATE) * (smallest - state.threshold)
        silent_f = jnp.where(active_f > 0, 0, jnp.minimum(state.silent_f, SILENT_MAX) + len(batch.x_bd))
        # The barrier keeps the norm's squares apart from Adam's; shared, they would be written out and read again.
        metrics = metrics._replace(
            learning_rate=learning_rate_at(state.step, problem),
            gradient_norm=optax.tree.norm(jax.lax.optimization_barrier(gradient)),
        )
        return TrainState(state.step + 1, params, moments, silent_f, threshold), metrics

    abstract = jax.eval_shape(lambda: init_state(problem, np.zeros(problem.d_model), 0, mesh))
    out = (state_shardings(abstract, mesh, train.shard_optimizer), sharding(mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def loss_and_metrics(
    params: Params,
    batch: Batch,
    k: Int[Array, ""],
    dead_f: Array,
    *,
    k_max: int,
    problem: Problem,
    mesh: Mesh,
) -> tuple[Float[Array, ""], tuple[Metrics, Int[Array, " f"], Float[Array, ""]]]:
    """What is minimised; beside it the metrics, how often each feature was active, and the smallest activation kept
    (BatchTopK)."""

    rows = weighted_rows(batch, problem, mesh)
    x_bd, counted_b, share_b = rows.x_bd, rows.counted_b, rows.share_b
    aux_on = problem.aux_k > 0
    found = reconstruct(
        trained(params), rows.gathered_bd, counted_b, k, choice=problem.choice(k_max), mesh=mesh,
        dead=Dead(dead_f, problem.aux_k) if aux_on else None,
    )  # fmt: skip
    error_bpd = x_bd[:, None] - found.x_hat_bpd
    error_bd = error_bpd[:, -1]
    error_bp = jnp.mean(error_bpd**2, axis=2) / jnp.where(counted_b, jnp.mean(x_bd**2, axis=1), 1)[:, None]
    loss_p = share_b @ error_bp
    loss = loss_p[-1]
    residual_bd = jax.lax.stop_gradient(error_bd)
    aux_loss = jnp.where(
        dead_f.any(), _unexplained(residual_bd, residual_bd - found.dead_hat_bd, share_b), 0.0
    ) if aux_on else jnp.float32(0)  # fmt: skip
    l0 = jnp.sum(share_b * found.l0_b)
    metrics = Metrics(
        loss=loss,
        fvu=_unexplained(x_bd, error_bd, share_b),
        l0=l0,
        k=k,
        dead_features=dead_f.sum(),
        dead_fraction=dead_f.mean(),
        aux_loss=aux_loss,
        learning_rate=jnp.float32(0),
        gradient_norm=jnp.float32(0),
        rows_left_out=jnp.sum((batch.weight_b > 0) & ~counted_b),
        rows_at_cap=found.at_cap,
    )
    aside = metrics, found.active_f, found.threshold
    if problem.official:
        return loss * rows.weight, aside
    minimised = loss_p.mean() + problem.train.aux_coefficient * aux_loss
    if problem.sae.activation == "jumprelu":
        minimised += problem.sae.sparsity_coefficient * (l0 / k - 1) ** 2
    return minimised, aside


class WeightedRows(NamedTuple):
    """Scaled rows, and how much each counts."""

    x_bd: Float[Array, "b d"]
    """Shared out over all devices, as far as they can be."""
    gathered_bd: Float[Array, "b d"]
    """The same: all rows of a data shard in each of its feature shards."""
    counted_b: Bool[Array, " b"]
    """False for rows of zeros, of an outlying norm, and of weight 0."""
    share_b: Float[Array, " b"]
    """Of the sum of weights; 0 where a row does not count."""
    weight: Float[Array, ""]
    """That sum."""


def weighted_rows(batch: Batch, problem: Problem, mesh: Mesh) -> WeightedRows:
    """The rows of a batch as the loss reads them."""

    def scaled_rows(placement: NamedSharding) -> Array:
        return jax.lax.with_sharding_constraint(batch.x_bd, placement).astype(jnp.float32) * problem.scale

    # The loss is computed on rows that are shared out, but a feature shard reconstructs all rows of its data shard,
    # which are gathered before they become float32.
    x_bd, gathered_bd = scaled_rows(row_sharding(mesh, len(batch.x_bd))), scaled_rows(sharding(mesh, DATA))
    square_b = jnp.mean(x_bd**2, axis=1)
    limit = (problem.norm_limit * problem.scale) ** 2 / problem.d_model
    counted_b = (square_b > 0) & (square_b <= limit) & (batch.weight_b > 0)
    weight_b = jnp.where(counted_b, batch.weight_b, 0)
    weight = jnp.maximum(weight_b.sum(), jnp.finfo(jnp.float32).tiny)
    return WeightedRows(x_bd, gathered_bd, counted_b, weight_b / weight, weight)


def trained(params: Params) -> SAE:
    """Parameters as an SAE for scaled rows."""
    arrays = {name: array for name, array in params.items() if name != "log_threshold_f"}
    log_threshold_f = params.get("log_threshold_f")
    return SAE(**arrays, threshold_f=None if log_threshold_f is None else jnp.exp(log_threshold_f))


def scaled(sae: SAE, problem: Problem) -> Params:
    """Parameters for scaled rows of an SAE for raw rows. Raises UserError where it is not of the kind asked for."""
    asked, shape = problem.sae, (problem.sae.features, problem.d_model)
    for name, there, here in (
        ("shape [features, d_model]", sae.w_fd.shape, shape),
        ("encoder", "tied" if sae.w_enc_fd is None else "untied", "tied" if asked.tied else "untied"),
        ("activation", "top-k" if sae.threshold_f is None else "threshold", asked.activation),
    ):
        fits = there == here if name != "activation" else (here == "jumprelu") == (there == "threshold")
        if not fits:
            raise UserError(
                f"train.init has {name} {there}, this training asks for {here}: set the sae settings to what it is"
            )
    params = {"w_fd": sae.w_fd[...], "b_enc_f": sae.b_enc_f[...] * problem.scale}
    params["b_dec_d"] = sae.b_dec_d[...] * problem.scale
    if sae.w_enc_fd is not None:
        params["w_enc_fd"] = sae.w_enc_fd[...]
    if sae.threshold_f is not None:
        tiny = jnp.finfo(jnp.float32).tiny  # a threshold of 0, that of a plain ReLU, has no logarithm
        params["log_threshold_f"] = jnp.log(jnp.maximum(sae.threshold_f[...] * problem.scale, tiny))
    return params


def unscaled(state: TrainState, problem: Problem) -> SAE:
    """The SAE for raw rows: with x' = s x, (x' - b_dec') E^T + b_enc' = s ((x - b_dec'/s) E^T + b_enc'/s)."""
    sae, scale = trained(state.params), problem.scale
    threshold_f = None if sae.threshold_f is None else sae.threshold_f[...] / scale
    if problem.sae.activation == "batchtopk":
        threshold_f = jnp.full_like(state.params["b_enc_f"], state.threshold / scale)
    w_enc_fd = state.params.get("w_enc_fd")
    return SAE(sae.w_fd[...], sae.b_enc_f[...] / scale, sae.b_dec_d[...] / scale, w_enc_fd, threshold_f)


def unit_rows(w_fd: Float[Array, "f d"]) -> Float[Array, "f d"]:
    """Rows with norm 1; a row of zeros stays one."""
    return w_fd / jnp.maximum(jnp.linalg.norm(w_fd, axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def _unexplained(x_bd: Array, error_bd: Array, share_b: Array) -> Array:
    """Weighted mean square of the error over the weighted variance of x; 0 where x does not vary."""
    mean_d = share_b @ x_bd
    variance = jnp.sum(share_b * jnp.sum((x_bd - mean_d) ** 2, axis=1))
    explained = jnp.sum(share_b * jnp.sum(error_bd**2, axis=1))
    return jnp.where(variance > 0, explained / jnp.where(variance > 0, variance, 1), 0.0)
