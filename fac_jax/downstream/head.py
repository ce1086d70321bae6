"""One linear head on fixed features, all training seeds in one compiled scan: logistic regression by Adam.

A reward is the same regression without a bias, on what the better answer's features have more than the worse one's
(Bradley-Terry): the pair is always positive.

Classes may be unbalanced (the paper trains on 1,000 safe and 200 toxic documents): every class has the same total
weight in the loss, n / (2 n_class) per document, so adding positives changes what is learned and not how often
the head says yes. A seed fixes the first weights and the order of the documents, nothing else.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from fac_jax.config.downstream import FinetuneConfig

INIT_STD = 0.02
"""Standard deviation of the head's first weights, as transformers initialises a classification head."""


def fit(
    x_nd: Float[np.ndarray, "n d"], positive_n: Bool[np.ndarray, " n"], config: FinetuneConfig
) -> tuple[Float[np.ndarray, "s d"], Float[np.ndarray, " s"]]:
    """Weights and biases of one head per seed of `config`, trained on standardised features of both classes."""
    order_sib = np.stack([minibatches(len(x_nd), config.batch, config.epochs, seed) for seed in config.seeds])
    first_sd = np.stack([np.random.default_rng(seed).normal(0, INIT_STD, x_nd.shape[1]) for seed in config.seeds])
    head_sd, bias_s = train_heads(
        jnp.asarray(x_nd, jnp.float32),
        jnp.asarray(positive_n, jnp.float32),
        jnp.asarray(balanced(positive_n), jnp.float32),
        jnp.asarray(order_sib),
        jnp.asarray(first_sd, jnp.float32),
        config.learning_rate,
    )
    return np.asarray(head_sd), np.asarray(bias_s)


def fit_pairs(difference_nd: Float[np.ndarray, "n d"], config: FinetuneConfig) -> Float[np.ndarray, "s d"]:
    """Weights of one reward per seed; a row is the better answer's standardised features less the worse one's."""
    order_sib = np.stack([minibatches(len(difference_nd), config.batch, config.epochs, seed) for seed in config.seeds])
    width = difference_nd.shape[1]
    first_sd = np.stack([np.random.default_rng(seed).normal(0, INIT_STD, width) for seed in config.seeds])
    ones = jnp.ones(len(difference_nd))
    x_nd, first = jnp.asarray(difference_nd, jnp.float32), jnp.asarray(first_sd, jnp.float32)
    return np.asarray(train_heads(x_nd, ones, ones, jnp.asarray(order_sib), first, config.learning_rate, bias=False)[0])


def balanced(positive_n: Bool[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Weights with which both classes have the same total."""
    return 0.5 / np.where(positive_n, positive_n.mean(), 1 - positive_n.mean())


def minibatches(n: int, batch: int, epochs: int, seed: int) -> Int[np.ndarray, "i b"]:
    """Row numbers of every step: a fresh permutation per epoch, the last batch of an epoch padded with -1."""
    generator = np.random.default_rng([seed, 1])
    per_epoch = -(-n // batch)
    order = np.full((epochs, per_epoch * batch), -1, np.int32)
    for epoch in range(epochs):
        order[epoch, :n] = generator.permutation(n)
    return order.reshape(epochs * per_epoch, batch)


@partial(jax.jit, static_argnames="bias")
def train_heads(
    x_nd: Float[Array, "n d"],
    y_n: Float[Array, " n"],
    weight_n: Float[Array, " n"],
    order_sib: Int[Array, "s i b"],
    first_sd: Float[Array, "s d"],
    rate: float,
    bias: bool = True,
) -> tuple[Float[Array, "s d"], Float[Array, " s"]]:
    """Logistic regression by Adam, one scan over minibatches, all seeds at once; returns weights and biases, which stay
    0 without `bias`."""
    optimizer = optax.adam(rate)

    def loss(head: tuple[jax.Array, jax.Array], rows: jax.Array) -> jax.Array:
        real = rows >= 0
        logit = x_nd[rows] @ head[0] + head[1] * bias
        each = optax.sigmoid_binary_cross_entropy(logit, y_n[rows]) * weight_n[rows]
        return jnp.sum(jnp.where(real, each, 0)) / jnp.sum(real)

    def step(state: Any, rows: jax.Array) -> tuple[Any, None]:
        head, moments = state
        updates, moments = optimizer.update(jax.grad(loss)(head, rows), moments, head)
        return (optax.apply_updates(head, updates), moments), None

    def one_seed(first_d: jax.Array, order_ib: jax.Array) -> tuple[jax.Array, jax.Array]:
        head = (first_d, jnp.zeros(()))
        (head, _), _ = jax.lax.scan(step, (head, optimizer.init(head)), order_ib)
        return head

    return jax.vmap(one_seed)(first_sd, order_sib)
