"""What is fixed during a training: settings made concrete for a store, schedules of K and of the rate, the optimizer.

    k_t       = int(max(K, k_start - (k_start - K) (t + 1) / T))       linear; or K (k_start / K)^(1 - (t + 1) / T)

Rows are scaled to a median mean-square of 1, so that a learning rate means the same for every backbone; `compat:
official` scales nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from fac_jax.config.sae import SaeConfig, TrainConfig
from fac_jax.errors import UserError
from fac_jax.mesh import FEATURE, matmul_dtype
from fac_jax.sae.dense import dense_pays, dense_share
from fac_jax.sae.reconstruct import Choice

OFFICIAL_ANNEAL = (200, 625)  # K that the published schedule starts from, and its steps


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
    platform: str
    """Of the devices that train it: cpu, gpu or tpu."""

    @property
    def official(self) -> bool:
        """Whether the published code's choices are asked for."""
        return self.train.compat == "official"

    @property
    def anneal(self) -> tuple[int, int]:
        """K that the schedule starts from, and its steps."""
        official = self.train.k_schedule == "official"
        return OFFICIAL_ANNEAL if official else (self.train.k_start, self.train.anneal_steps)

    @property
    def aux_k(self) -> int:
        """Dead features of a row that share in the auxiliary reconstruction; 0 without one."""
        on = self.train.aux_coefficient > 0 and not self.official
        return min(self.train.aux_k or max(1, self.d_model // 2), self.sae.features) if on else 0

    def choice(self, k_max: int) -> Choice:
        """How features are chosen while K is at most `k_max`."""
        sae = self.sae
        cap = min(sae.features, sae.row_cap * k_max)
        return Choice(sae.activation, k_max, cap, sae.prefixes, sae.jump_width, self.select_dtype, self.platform)


def pose(sae: SaeConfig, train: TrainConfig, d_model: int, median_norm: float, platform: str | None = None) -> Problem:
    """The problem of training on rows of width `d_model` whose Euclidean norms have this median.

    `platform` is that of the devices that will train, by default this process's own.
    """
    platform = platform or jax.default_backend()
    if not (math.isfinite(median_norm) and median_norm > 0):
        raise UserError(f"the median norm of the training rows is {median_norm}: the store holds no usable residuals")
    plain = train.compat == "official"
    if plain and (sae.activation != "topk" or not sae.tied or sae.matryoshka or sae.decoder_norm != "free"):
        raise UserError(
            "train.compat official is a tied Top-K SAE with a free decoder norm, and sae asks for another kind: "
            "set train.compat to none, or leave sae.activation, tied, matryoshka and decoder_norm out"
        )
    auto = "float32" if plain else matmul_dtype(platform)
    problem = Problem(
        sae=sae,
        train=train,
        d_model=d_model,
        scale=1.0 if plain else math.sqrt(d_model) / median_norm,
        norm_limit=math.inf if plain or train.norm_filter == 0 else train.norm_filter * median_norm,
        select_dtype=auto if train.select_dtype == "auto" else train.select_dtype,
        platform=platform,
    )
    if problem.anneal[0] > sae.features:
        raise UserError(f"train.k_start is {problem.anneal[0]}, more than sae.features {sae.features}: lower it")
    return problem


def k_at(step: Int[Array, ""] | int, problem: Problem) -> Int[Array, ""]:
    """K of a step. Linear is the published formula, in integers (which is what its rounding amounts to)."""
    k, (start, over) = problem.sae.k, problem.anneal
    drop = start - k
    if drop <= 0 or over == 0:
        return jnp.int32(k)
    done = jnp.minimum(jnp.asarray(step, jnp.int32) + 1, over)
    if problem.train.k_schedule == "exponential":
        left = 1 - np.arange(1, over + 1) / over
        return jnp.asarray(np.round(k * (start / k) ** left), jnp.int32)[done - 1]
    return jnp.int32(start) + (-drop * done) // over


def k_widths(problem: Problem) -> list[int]:
    """Static widths that the values of K fall into: K, 2K, 4K, ... up to the first K of the schedule.

    On a TPU only K and the first, because each is a branch of the program, and those take a minute to compile.
    """
    most = max(problem.sae.k, problem.anneal[0])
    if problem.sae.activation == "jumprelu":
        return [most]
    if problem.platform == "tpu":
        return list(dict.fromkeys((problem.sae.k, most)))
    return [width for i in range(32) if (width := problem.sae.k << i) < most] + [most]


def decoding_plan(problem: Problem, mesh: Mesh) -> list[str]:
    """A line for each width of K and for the dead features: how a shard decodes them, and why."""
    features = problem.sae.features // mesh.shape[FEATURE]
    lines = []
    for k in k_widths(problem):
        choice = problem.choice(k)
        if choice.kind == "jumprelu":
            lines.append("jumprelu: through all features, as rows keep no fixed number of them")
        else:
            dense = choice.dense(features, mesh.shape[FEATURE])
            lines.append(f"K up to {k}: {_path(dense, choice.candidates, features, problem.platform)}")
    if problem.aux_k:
        dense = dense_pays(problem.aux_k, features, problem.platform)
        how = _path(dense, problem.aux_k, features, problem.platform)
        lines.append(f"dead features, {problem.aux_k} a row: {how}")
    return lines


def _path(dense: bool, count: int, features: int, platform: str) -> str:
    how, share = "through all features" if dense else "by the selected rows", dense_share(platform)
    return f"{how} ({count} of {features} is {count / features:.2%}; all features pay above {share:.1%})"


def learning_rate_at(step: Int[Array, ""] | int, problem: Problem) -> Float[Array, ""]:
    """Rises linearly over the warm-up; then stays, or falls to 0 at the last step."""
    train = problem.train
    return train.learning_rate * rate_factor(step, train.steps, train.warmup_steps, train.learning_rate_schedule)


def rate_factor(
    step: Int[Array, ""] | int, steps: int, warmup_steps: float, schedule: Literal["constant", "linear", "cosine"]
) -> Float[Array, ""]:
    """The rate of a step as a share of the highest: rising from 0 over the warm-up, then constant or falling to 0."""
    at = jnp.asarray(step, jnp.float32)
    rise = jnp.minimum((at + 1) / max(1, warmup_steps), 1.0)
    done = jnp.clip((at - warmup_steps) / max(1, steps - warmup_steps), 0, 1)
    return rise * {"constant": jnp.ones(()), "linear": 1 - done, "cosine": (1 + jnp.cos(jnp.pi * done)) / 2}[schedule]


def make_optimizer(problem: Problem) -> optax.GradientTransformation:
    """Adam with the published code's constants, or Adafactor; either with decoupled weight decay of W and E."""
    train = problem.train
    if train.optimizer == "adam":
        rule = [optax.scale_by_adam(b1=0.9, b2=0.999, eps=6.25e-10)]
    else:
        rule = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    if train.weight_decay > 0:
        mask = lambda params: {name: name in ("w_fd", "w_enc_fd") for name in params}  # noqa: E731
        rule.append(optax.add_decayed_weights(train.weight_decay, mask))
    return optax.chain(*rule, optax.scale_by_learning_rate(partial(learning_rate_at, problem=problem)))
