"""fac_jax's own training step in a process of its own, as `fac bench sae` times it beside the torch ones.

    python -m fac_jax.scale.sae_contender '{"d_model": 768, "features": 16384, "batch": 1024, "k": 32,
        "dtype": "bfloat16", "warm_up": 4, "steps": 4, "parts": true}'

The last line it prints is JSON: seconds of each step, peak memory in bytes, the last loss, and where the time goes.
It is the step that `fac train` runs, metrics and auxiliary loss included. `parts` times the selection, the loss and
the optimizer alone; the gradient is what they leave of a whole step.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from fac_jax.config.machine import MeshConfig
from fac_jax.config.sae import SaeConfig, TrainConfig
from fac_jax.mesh import make_mesh
from fac_jax.runs import versions
from fac_jax.sae.problem import Problem, make_optimizer, pose
from fac_jax.sae.select import Among, select
from fac_jax.sae.step import Batch, Params, TrainState, init_state, loss_and_metrics, make_train_step


def main() -> None:
    """Time the step that the argument describes."""
    asked = json.loads(sys.argv[1])
    batch_rows, d = asked["batch"], asked["d_model"]
    mesh = make_mesh(MeshConfig())
    train = TrainConfig(batch_rows=batch_rows, k_start=asked["k"], anneal_steps=0, select_dtype=asked["dtype"])
    problem = pose(SaeConfig(asked["features"], asked["k"]), train, d, float(np.sqrt(d)))
    x_nbd = jax.random.normal(jax.random.key(0), (2, batch_rows, d))
    batches = [Batch(x_bd, jnp.ones(batch_rows)) for x_bd in x_nbd]
    state, step = init_state(problem, np.zeros(d), 0, mesh), make_train_step(problem, mesh)
    seconds: list[float] = []
    for i in range(asked["warm_up"] + asked["steps"]):
        started = time.perf_counter()
        state, metrics = step(state, batches[i % 2])
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - started)
    found: dict[str, Any] = {
        "seconds": seconds[asked["warm_up"] :],
        "peak_bytes": peak_bytes(),
        "loss": float(metrics.loss),
    }
    if asked.get("parts"):
        found["parts"] = parts(problem, state, batches[0], mesh, asked["steps"], min(seconds[asked["warm_up"] :]))
    print(json.dumps({**found, "version": f"jax {versions()['jax']}"}))


def peak_bytes() -> int:
    """Most memory that was taken so far: of the device where it has its own, else of this process."""
    of_device = jax.local_devices()[0].memory_stats()
    return of_device["peak_bytes_in_use"] if of_device else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parts(
    problem: Problem, state: TrainState, batch: Batch, mesh: Mesh, repeats: int, whole_s: float
) -> dict[str, float]:
    """Seconds of each part of a step: select (matmul and top-k), decode, gradient, optimizer. Consumes the state."""
    k, dead_f = problem.sae.k, jnp.zeros(problem.sae.features, bool)
    w_fd, b_enc_f, b_dec_d = (state.params[name] for name in ("w_fd", "b_enc_f", "b_dec_d"))
    loss = partial(loss_and_metrics, k_max=k, problem=problem, mesh=mesh)

    @jax.jit
    def selection(w_fd: jax.Array, b_enc_f: jax.Array, b_dec_d: jax.Array, x_bd: jax.Array) -> Any:
        return select(w_fd, b_enc_f, x_bd - b_dec_d, problem.select_dtype, [Among(k)], problem.platform)

    select_s = fastest(lambda: selection(w_fd, b_enc_f, b_dec_d, batch.x_bd), repeats)
    without_gradient = jax.jit(loss)
    loss_s = fastest(lambda: without_gradient(state.params, batch, k, dead_f), repeats)
    optimizer_s = fastest(optimizer_update(problem, state), repeats)
    return {
        "select": select_s,
        "decode": loss_s - select_s,
        "gradient": whole_s - loss_s - optimizer_s,
        "optimizer": optimizer_s,
    }


def optimizer_update(problem: Problem, state: TrainState) -> Callable[[], Any]:
    """A call that updates a state in place, as the step does, with a gradient as large as the parameters."""
    optimizer = make_optimizer(problem)
    gradient = jax.tree.map(jnp.copy, state.params)
    held = (state.params, state.optimizer)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Params, moments: optax.OptState, gradient: Params) -> tuple[Params, optax.OptState]:
        change, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, change), moments

    def call() -> Any:
        nonlocal held
        held = update(*held, gradient)
        return held

    return call


def fastest(run: Callable[[], Any], repeats: int) -> float:
    """Least seconds of `repeats` calls after one that compiles."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
