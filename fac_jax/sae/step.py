"""One optimizer step of the autoencoder: schedule of K, loss, auxiliary loss, Adam. Pure, jitted, donating.

    loss      = sum_b w_b mean_d (x - x_hat)^2 / mean_d x^2            w_b = 1 / rows   (arXiv 2602.10388, section 3)
    auxiliary = mean (e - e_hat)^2 / mean (e - mean_b e)^2             e = x - x_hat, detached; e_hat from dead features
                                                                       only and without b_dec (Gao et al. 2024, A.2)
    k_t       = int(max(K, k_start - (k_start - K) (t + 1) / T))       (official code)

`compat: official` keeps what the published code does: W ~ N(0, 2 / d), zero biases, no scaling, no row filter, no
auxiliary loss, and gradients *summed* over sequences, each the mean over its tokens. (It reads whole sequences; of
shuffled rows, a sequence is what the batch holds of one document.)

Otherwise rows are scaled to a median mean-square of 1, so that a learning rate means the same for every backbone; rows
of W start with unit norm and b_dec with the mean of the data. `unscaled` folds the scale into the biases: the finished
SAE reads raw residuals, keeps the same features of them, and its activations, and so every threshold on them, are in
residual-stream units.
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
from jaxtyping import Array, Float, Float64, Int

from fac_jax.config import SaeConfig, TrainConfig
from fac_jax.errors import UserError
from fac_jax.mesh import FEATURE, sharding
from fac_jax.sae.model import Dead, TopKSAE, reconstruct
from fac_jax.sae.sparse import selecting_dtype

Params = dict[str, Array]
SILENT_MAX = 2**30  # counts of silent rows stop here instead of overflowing


@dataclass(frozen=True)
class Problem:
    """What is fixed during a training."""

    sae: SaeConfig
    train: TrainConfig
    d_model: int
    scale: float
    """Rows are multiplied by it before anything else."""
    norm_limit: float
    """Raw rows with a larger Euclidean norm are left out; infinite to keep all."""
    select_dtype: str
    """Input type of the matmul that selects features."""

    @property
    def official(self) -> bool:
        """Whether the published code's choices are asked for."""
        return self.train.compat == "official"


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
    aux_loss: Array
    learning_rate: Array
    gradient_norm: Array
    rows_left_out: Array
    """By the norm filter."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "optimizer", "silent_f"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """All that changes during a training."""

    step: Int[Array, ""]
    params: Params
    """Arrays of TopKSAE by name, for scaled rows."""
    optimizer: optax.OptState
    silent_f: Int[Array, " f"]
    """Rows seen since each feature was last active."""


def pose(sae: SaeConfig, train: TrainConfig, d_model: int, median_norm: float) -> Problem:
    """The problem of training on rows of width `d_model` whose Euclidean norms have this median."""
    if not (math.isfinite(median_norm) and median_norm > 0):
        raise UserError(f"the median norm of the training rows is {median_norm}: the store holds no usable residuals")
    if train.k_start > sae.features:
        raise UserError(f"train.k_start is {train.k_start}, more than sae.features {sae.features}: lower it")
    plain = train.compat == "official"
    auto = "float32" if plain else selecting_dtype()
    return Problem(
        sae=sae,
        train=train,
        d_model=d_model,
        scale=1.0 if plain else math.sqrt(d_model) / median_norm,
        norm_limit=math.inf if plain or train.norm_filter == 0 else train.norm_filter * median_norm,
        select_dtype=auto if train.select_dtype == "auto" else train.select_dtype,
    )


def k_at(step: Int[Array, ""] | int, problem: Problem) -> Int[Array, ""]:
    """K of a step; the official sequence, in integers (which is what its rounding amounts to)."""
    k, drop, over = problem.sae.k, problem.train.k_start - problem.sae.k, problem.train.anneal_steps
    if drop <= 0 or over == 0:
        return jnp.int32(k)
    done = jnp.minimum(jnp.asarray(step, jnp.int32) + 1, over)
    return jnp.int32(problem.train.k_start) + (-drop * done) // over


def init_state(problem: Problem, mean_d: Float64[np.ndarray, " d"], seed: int, mesh: Mesh) -> TrainState:
    """The state before step 0, made where it will live: no leaf is ever whole on one device if it is sharded."""
    features, d = problem.sae.features, problem.d_model
    shards = mesh.shape[FEATURE]
    if features % shards:
        raise UserError(f"sae.features {features} cannot be shared equally by {shards} shards: change mesh.feature")

    def build(mean_d: Array) -> TrainState:
        w_fd = jax.random.normal(jax.random.key(seed), (features, d))
        if problem.official:
            w_fd, b_dec_d = w_fd * math.sqrt(2 / d), jnp.zeros(d)
        else:
            w_fd, b_dec_d = w_fd / jnp.linalg.norm(w_fd, axis=1, keepdims=True), mean_d * problem.scale
        params = {"w_fd": w_fd, "b_enc_f": jnp.zeros(features), "b_dec_d": b_dec_d}
        return TrainState(jnp.int32(0), params, make_optimizer(problem).init(params), jnp.zeros(features, jnp.int32))

    mean_d = jnp.asarray(mean_d, jnp.float32)
    return jax.jit(build, out_shardings=state_shardings(jax.eval_shape(build, mean_d), mesh))(mean_d)


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Sharding of every leaf: parameters and their Adam moments over features, counters replicated."""
    specs = TopKSAE.SPECS | {"silent_f": P(FEATURE)}

    def of(path: tuple[object, ...], leaf: Array) -> NamedSharding:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return sharding(mesh, *specs.get(name, P()))

    return jax.tree.map_with_path(of, state)


def make_train_step(problem: Problem, mesh: Mesh) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted (state, batch) -> (state, metrics) that donates the state and compiles once for all values of K.

    Inside, one branch per doubling of K: the work of a step follows K while K stays a traced value.
    """
    optimizer, train = make_optimizer(problem), problem.train
    widths = k_widths(problem)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        k = k_at(state.step, problem)
        dead_f = state.silent_f >= train.dead_after_rows

        def at_most(k_max: int) -> Callable[[Params], tuple[tuple[Array, tuple[Metrics, Array]], Params]]:
            loss = partial(loss_and_metrics, batch=batch, k=k, dead_f=dead_f, k_max=k_max, problem=problem, mesh=mesh)
            return jax.value_and_grad(loss, has_aux=True)

        branch = sum((k > width).astype(jnp.int32) for width in widths[:-1])
        (_, (metrics, active_f)), gradient = jax.lax.switch(branch, [at_most(width) for width in widths], state.params)
        update, moments = optimizer.update(gradient, state.optimizer, state.params)
        silent_f = jnp.where(active_f > 0, 0, jnp.minimum(state.silent_f, SILENT_MAX) + len(batch.x_bd))
        # The barrier keeps the norm's squares apart from Adam's; shared, they would be written out and read again.
        metrics = metrics._replace(
            learning_rate=learning_rate_at(state.step, problem),
            gradient_norm=optax.tree.norm(jax.lax.optimization_barrier(gradient)),
        )
        return TrainState(state.step + 1, optax.apply_updates(state.params, update), moments, silent_f), metrics

    abstract = jax.eval_shape(lambda: init_state(problem, np.zeros(problem.d_model), 0, mesh))
    out = (state_shardings(abstract, mesh), sharding(mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def k_widths(problem: Problem) -> list[int]:
    """Static widths that the values of K fall into: K, 2K, 4K, ... up to the first K of the schedule."""
    most = max(problem.sae.k, problem.train.k_start)
    return [width for i in range(32) if (width := problem.sae.k << i) < most] + [most]


def loss_and_metrics(
    params: Params,
    batch: Batch,
    k: Int[Array, ""],
    dead_f: Array,
    *,
    k_max: int,
    problem: Problem,
    mesh: Mesh,
) -> tuple[Float[Array, ""], tuple[Metrics, Int[Array, " f"]]]:
    """What is minimised, and beside it the metrics and how often each feature was active."""
    x_bd = batch.x_bd.astype(jnp.float32) * problem.scale
    square_b = jnp.mean(x_bd**2, axis=1)
    limit = (problem.norm_limit * problem.scale) ** 2 / problem.d_model
    counted_b = (square_b > 0) & (square_b <= limit) & (batch.weight_b > 0)
    weight_b = jnp.where(counted_b, batch.weight_b, 0)
    total = jnp.maximum(weight_b.sum(), jnp.finfo(jnp.float32).tiny)
    share_b = weight_b / total

    aux_on = problem.train.aux_coefficient > 0 and not problem.official
    found = reconstruct(
        TopKSAE(**params), x_bd, counted_b, k, k_max=k_max, mesh=mesh,
        dead=Dead(dead_f, problem.train.aux_k) if aux_on else None, select_dtype=problem.select_dtype,
    )  # fmt: skip
    error_bd = x_bd - found.x_hat_bd
    error_b = jnp.mean(error_bd**2, axis=1)
    loss = jnp.sum(share_b * error_b / jnp.where(counted_b, square_b, 1))
    residual_bd = jax.lax.stop_gradient(error_bd)
    aux_loss = jnp.where(
        dead_f.any(), _unexplained(residual_bd, residual_bd - found.dead_hat_bd, share_b), 0.0
    ) if aux_on else jnp.float32(0)  # fmt: skip
    metrics = Metrics(
        loss=loss,
        fvu=_unexplained(x_bd, error_bd, share_b),
        l0=jnp.sum(share_b * found.l0_b),
        k=k,
        dead_features=dead_f.sum(),
        aux_loss=aux_loss,
        learning_rate=jnp.float32(0),
        gradient_norm=jnp.float32(0),
        rows_left_out=jnp.sum((batch.weight_b > 0) & ~counted_b),
    )
    minimised = loss * total if problem.official else loss + problem.train.aux_coefficient * aux_loss
    return minimised, (metrics, found.active_f)


def learning_rate_at(step: Int[Array, ""] | int, problem: Problem) -> Float[Array, ""]:
    """Rises linearly over the warm-up, then stays."""
    rise = (jnp.asarray(step, jnp.float32) + 1) / max(1, problem.train.warmup_steps)
    return problem.train.learning_rate * jnp.minimum(rise, 1.0)


def unscaled(params: Params, problem: Problem) -> TopKSAE:
    """The SAE for raw rows: with x' = s x, (x' - b_dec') W^T + b_enc' = s ((x - b_dec'/s) W^T + b_enc'/s)."""
    return TopKSAE(params["w_fd"], params["b_enc_f"] / problem.scale, params["b_dec_d"] / problem.scale)


def make_optimizer(problem: Problem) -> optax.GradientTransformation:
    """Adam with the published code's constants."""
    return optax.adam(partial(learning_rate_at, problem=problem), b1=0.9, b2=0.999, eps=6.25e-10)


def _unexplained(x_bd: Array, error_bd: Array, share_b: Array) -> Array:
    """Weighted mean square of the error over the weighted variance of x; 0 where x does not vary."""
    mean_d = share_b @ x_bd
    variance = jnp.sum(share_b * jnp.sum((x_bd - mean_d) ** 2, axis=1))
    explained = jnp.sum(share_b * jnp.sum(error_bd**2, axis=1))
    return jnp.where(variance > 0, explained / jnp.where(variance > 0, variance, 1), 0.0)
