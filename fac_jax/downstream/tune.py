"""The training loop of adapters and a head, whatever they learn: a classifier, a reward, completions.

A step takes `batch` groups of texts, in an order that the seed and the epoch fix; they are packed into pieces of one
shape, whose gradients add up to the batch's, so a batch of any size fits the memory of a piece. AdamW with the
constants of transformers' trainer. The backbone's own parameters never change.

Writes `metrics.jsonl` (a line a step: loss, gradient norm, learning rate) and `checkpoints/` in the folder given; a run
that is killed goes on from its last checkpoint and ends with the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from fac_jax.backbone.model import Tree
from fac_jax.backbone.weights import Loaded
from fac_jax.config.activations import BackboneConfig
from fac_jax.config.downstream import FinetuneConfig
from fac_jax.distributed import heeding_sigterm
from fac_jax.downstream.head import INIT_STD, minibatches
from fac_jax.downstream.lora import adapters, init_lora
from fac_jax.downstream.objectives import Objective, Piece, loss_sum, scores
from fac_jax.downstream.pieces import Group, pack_batch, rows_for
from fac_jax.errors import Stopped, UserError
from fac_jax.mesh import DATA, sharding
from fac_jax.progress import progress
from fac_jax.sae.checkpoint import open_checkpoints, restore_state, save_state
from fac_jax.sae.fit import MetricsLog
from fac_jax.sae.problem import rate_factor


class Learned(NamedTuple):
    """What is trained."""

    adapters: Tree
    head_d: Float[Array, " d"]
    """Unused where completions are learned."""


class State(NamedTuple):
    """All that a checkpoint holds."""

    learned: Learned
    moments: Any


@dataclass(frozen=True)
class Tuner:
    """A backbone ready to be tuned: its programs are compiled once for all seeds and data sets."""

    loaded: Loaded
    objective: Objective
    settings: FinetuneConfig
    geometry: BackboneConfig
    gradient: Callable[[Learned, Learned, Piece, Array], tuple[Learned, Array]]
    """(learned, gradient so far, piece, key) -> the gradient with the piece's, and its loss."""
    start: Callable[[Learned], State]
    update: Callable[[State, Learned, Array, Array], tuple[State, Array]]
    """(state, gradient, what it is divided by, learning rate) -> the next state, and the gradient's norm. Donates the
    state."""
    score: Callable[[Learned, Piece], Array]

    def pieces(self, batch: Sequence[Group]) -> list[Piece]:
        """A batch on its devices."""
        rows = sharding(self.loaded.mesh, DATA)
        row_tokens, least = self.geometry.row_tokens, self.loaded.mesh.shape[DATA]
        needed = rows_for(batch, least, self.geometry.rows_per_batch, row_tokens)
        packed = pack_batch(batch, needed, row_tokens, self.settings.batch)
        return [
            Piece(*(jax.device_put(leaf, rows if leaf.ndim == 2 else sharding(self.loaded.mesh)) for leaf in piece))
            for piece in packed
        ]


def make_tuner(loaded: Loaded, objective: Objective, settings: FinetuneConfig, geometry: BackboneConfig) -> Tuner:
    """Compiled functions over a whole backbone."""
    graph, state = nnx.split(loaded.model)

    def loss(learned: Learned, state: Any, piece: Piece, key: Array | None) -> Array:
        added = adapters(learned.adapters, settings.lora, key)
        return loss_sum(nnx.merge(graph, state), learned.head_d, added, piece, objective)

    def gradient(learned: Learned, before: Learned, state: Any, piece: Piece, key: Array) -> tuple[Learned, Array]:
        value, found = jax.value_and_grad(loss)(learned, state, piece, key)
        return jax.tree.map(jnp.add, before, found), value

    def score(learned: Learned, state: Any, piece: Piece) -> Array:
        added = adapters(learned.adapters, settings.lora, None)
        return scores(nnx.merge(graph, state), learned.head_d, added, piece)

    optimizer = make_optimizer(settings)

    def start(learned: Learned) -> State:
        return State(learned, optimizer.init(learned))

    def update(state: State, gradient: Learned, total: Array, rate: Array) -> tuple[State, Array]:
        gradient = jax.tree.map(lambda leaf: leaf / total, gradient)
        found, moments = optimizer.update(gradient, state.moments, state.learned)
        learned = jax.tree.map(lambda value, step: value - rate * step, state.learned, found)
        return State(learned, moments), optax.global_norm(gradient)

    summed, scored = jax.jit(gradient, donate_argnums=1), jax.jit(score)
    return Tuner(
        loaded, objective, settings, geometry, start=jax.jit(start), update=jax.jit(update, donate_argnums=0),
        gradient=lambda learned, before, piece, key: summed(learned, before, state, piece, key),
        score=lambda learned, piece: scored(learned, state, piece),
    )  # fmt: skip


def tune(tuner: Tuner, groups: Sequence[Group], seed: int, out: Path) -> Learned:
    """Train on `groups` for `finetune.epochs`, from the last checkpoint in `out` if there is one.

    Raises UserError for a loss that is not finite, and Stopped after SIGTERM, with everything saved.
    """
    settings = tuner.settings
    order_ib = minibatches(len(groups), settings.batch, settings.epochs, seed)
    state = tuner.start(init_learned(tuner, seed))
    out.mkdir(parents=True, exist_ok=True)
    key = jax.random.fold_in(jax.random.key(seed), 1)
    with open_checkpoints(out / "checkpoints", 1) as checkpoints, heeding_sigterm() as stop:
        first, state = restore_state(checkpoints, state) or (0, state)
        log = MetricsLog(out / "metrics.jsonl", first)
        with progress("finetune", len(order_ib) - first, "steps") as bar:
            for step in range(first, len(order_ib)):
                batch = [groups[row] for row in order_ib[step] if row >= 0]
                total, loss = total_weight(batch, tuner.objective), 0.0
                gradient = jax.tree.map(jnp.zeros_like, state.learned)
                for place, piece in enumerate(tuner.pieces(batch)):
                    drop = jax.random.fold_in(jax.random.fold_in(key, step), place)
                    gradient, value = tuner.gradient(state.learned, gradient, piece, drop)
                    loss += float(value) / total
                rate = float(rate_at(step, settings, len(order_ib)))
                state, norm = tuner.update(state, gradient, jnp.float32(total), jnp.float32(rate))
                if not math.isfinite(loss + float(norm)):
                    raise UserError(
                        f"loss {loss} and gradient norm {float(norm)} at step {step} of {len(order_ib)}, learning rate "
                        f"{rate:.3g}: training diverged; lower finetune.learning_rate. No checkpoint holds it."
                    )
                log.add(step, {"loss": loss, "gradient_norm": float(norm), "learning_rate": rate})
                bar.advance(1, f"loss {loss:.4f}")
                stopping, last = stop.at(step), step + 1 == len(order_ib)
                if stopping or last or (step + 1) % settings.checkpoint_every == 0:
                    save_state(checkpoints, step + 1, state)
                if stopping and not last:
                    raise Stopped(f"SIGTERM: saved after step {step} of {len(order_ib)}")
    return state.learned


def score_texts(tuner: Tuner, learned: Learned, groups: Sequence[Group]) -> Float[np.ndarray, "n g"]:
    """Scores of every text, a row a group."""
    return of_texts(tuner, groups, lambda piece: tuner.score(learned, piece)).reshape(len(groups), -1)


def of_texts(tuner: Tuner, groups: Sequence[Group], compute: Callable[[Piece], Array]) -> Float[np.ndarray, "m ..."]:
    """What `compute` says of every text, in the order of the groups and of the texts in them."""
    found = []
    for start in range(0, len(groups), tuner.settings.batch):
        batch = groups[start : start + tuner.settings.batch]
        of_pieces = [(np.asarray(compute(piece)), np.asarray(piece.there_n)) for piece in tuner.pieces(batch)]
        found += [value_n[there_n] for value_n, there_n in of_pieces]
    return np.concatenate(found)


def init_learned(tuner: Tuner, seed: int) -> Learned:
    """Adapters that add nothing yet, and a head of small random weights."""
    head_d = INIT_STD * jax.random.normal(jax.random.key(seed), (tuner.loaded.config.d_model,))
    return Learned(
        init_lora(tuner.loaded.config, tuner.settings.lora, seed, tuner.loaded.mesh),
        jax.device_put(head_d, sharding(tuner.loaded.mesh)),
    )


def total_weight(batch: Sequence[Group], objective: Objective) -> float:
    """What the losses of a batch are divided by: tokens that are learned, or the weight of its texts or pairs."""
    if objective == "completion":
        return float(sum(text.learned_t[1:].sum() for group in batch for text in group))
    return float(sum(group[0].weight for group in batch))


def rate_at(step: Array | int, settings: FinetuneConfig, steps: int) -> Float[Array, ""]:
    """Rises linearly over the warm-up; then stays, or falls to 0 at the last step."""
    factor = rate_factor(step, steps, settings.warmup * steps, settings.learning_rate_schedule)
    return settings.learning_rate * factor


def make_optimizer(settings: FinetuneConfig) -> optax.GradientTransformation:
    """AdamW as transformers' trainer sets it up, of a gradient that is cut to a norm; a step is what it says, times the
    rate, taken off."""
    return optax.chain(
        optax.clip_by_global_norm(settings.gradient_clip),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        optax.add_decayed_weights(settings.weight_decay),
    )
