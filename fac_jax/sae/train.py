"""Stage `train`: an activation store to a Top-K autoencoder.

Reads the store (training rows through `stream`, held-out rows in order), writes `checkpoints/`, `metrics.jsonl` (a line
of `Metrics` every `log_every` steps), and at the end `sae.safetensors` and `config.json`. The data of a step depend on
nothing but the step, so a run that is killed goes on from its last checkpoint and ends with the same bytes.

The loop never waits for the step it has just started: metrics are read one step late, and a loss or gradient that is
not finite stops the run with its step, rate and rows before any checkpoint can hold it.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float64

from fac_jax.activations.manifest import Manifest, check_holds
from fac_jax.activations.store import Rows, StoreReader
from fac_jax.activations.stream import batches
from fac_jax.config import Config
from fac_jax.errors import UserError
from fac_jax.mesh import DATA, make_mesh, sharding
from fac_jax.progress import progress
from fac_jax.runs import write_text
from fac_jax.sae.checkpoint import open_checkpoints, restore_state, save_sae, save_state
from fac_jax.sae.metrics import validate
from fac_jax.sae.step import Batch, Metrics, Problem, TrainState, init_state, make_train_step, pose, unscaled

VALIDATION_BLOCKS = 64  # read from the store at a time


@dataclass(frozen=True)
class Fitted:
    """The end of a training, and how fast this process got there."""

    state: TrainState
    seconds: float
    rows_per_second: float
    """Without the first step, which compiles."""


def train(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Train on `train.store` or on the run's own store; returns the summary.

    Raises UserError for a store of another model or layer, sizes that do not fit, a damaged checkpoint, and a loss
    that is not finite.
    """
    store = config.train.store or inputs["activations"]
    reader, held_out = StoreReader(store, "train"), StoreReader(store, "validation")
    check_holds(reader.manifest, store, model=config.backbone.model, layer=config.backbone.layer)
    mesh = make_mesh(config.mesh)
    problem = pose(config.sae, config.train, reader.d_model, reader.median_norm)
    hosts = jax.process_count()

    def rows_from(step: int) -> Iterator[tuple[int, Rows]]:
        return batches(reader, config.train.batch_rows, config.run.seed, step, hosts, jax.process_index(), hosts)

    fitted = fit(problem, reader.mean, rows_from, config.run.seed, mesh, out)
    sae = unscaled(fitted.state.params, problem)
    figures = validate(sae, config.sae.k, _in_order(held_out), config.train.batch_rows, mesh, problem.norm_limit)
    trained_on = {"steps": config.train.steps, "rows": config.train.steps * config.train.batch_rows}
    save_sae(out, sae, trained_on | _origin(reader.manifest) | {"k": config.sae.k, "metrics": asdict(figures)})
    return {
        **trained_on,
        "store_rows": reader.rows,
        "epochs": round(trained_on["rows"] / reader.rows, 2),
        "features": config.sae.features,
        "k": config.sae.k,
        **{f"validation_{name}" if name.startswith("rows") else name: value for name, value in asdict(figures).items()},
        "median_norm": reader.median_norm,
        "seconds": round(fitted.seconds, 2),
        "tokens_per_second": round(fitted.rows_per_second),
    }


def fit(
    problem: Problem,
    mean_d: Float64[np.ndarray, " d"],
    rows_from: Callable[[int], Iterator[tuple[int, Rows]]],
    seed: int,
    mesh: Mesh,
    out: Path,
) -> Fitted:
    """Train for `problem.train.steps`, from the last checkpoint in `out` if there is one.

    `rows_from(step)` yields (step, this process's rows), endlessly and always the same.
    """
    settings, data_shards = problem.train, mesh.shape[DATA]
    if settings.batch_rows % data_shards:
        raise UserError(
            f"train.batch_rows {settings.batch_rows} cannot be shared equally by mesh.data {data_shards}: change one"
        )
    started = time.monotonic()
    with open_checkpoints(out / "checkpoints") as checkpoints:
        state = init_state(problem, mean_d, seed, mesh)
        first, state = restore_state(checkpoints, state) or (0, state)
        log = MetricsLog(out / "metrics.jsonl", before=first) if jax.process_index() == 0 else None
        train_step = make_train_step(problem, mesh)
        compiled: float | None = None
        waiting: deque[tuple[int, Metrics, Rows]] = deque()
        with progress("train", (settings.steps - first) * settings.batch_rows, "tokens") as bar:
            for step, rows in _until(settings.steps, first, rows_from):
                state, metrics = train_step(state, to_device(rows, problem, mesh))
                waiting.append((step, metrics, rows))
                save = (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps
                while len(waiting) > (0 if save else 1):
                    bar.advance(settings.batch_rows, _settle(*waiting.popleft(), log, problem))
                    compiled = compiled or time.monotonic()
                if save:
                    save_state(checkpoints, step + 1, state)
        ended = time.monotonic()
    done = max(0, settings.steps - first - 1) * settings.batch_rows
    return Fitted(state, ended - started, done / max(ended - compiled, 1e-9) if compiled else 0.0)


def to_device(rows: Rows, problem: Problem, mesh: Mesh) -> Batch:
    """This process's rows as its part of the global batch, in the type they are stored in."""
    weight_b = np.ones(len(rows), np.float32)
    if problem.official:
        _, sequence_b, counts = np.unique(rows.doc, return_inverse=True, return_counts=True)
        weight_b = (1 / counts[sequence_b]).astype(np.float32)
    put = partial(jax.make_array_from_process_local_data, sharding(mesh, DATA))
    return Batch(put(rows.resid), put(weight_b))


class MetricsLog:
    """metrics.jsonl, one JSON object a line; opening it drops what a killed run wrote after its last checkpoint."""

    def __init__(self, path: Path, before: int) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        write_text(path, "".join(line for line in whole if json.loads(line)["step"] < before))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")


def _until(
    steps: int, first: int, rows_from: Callable[[int], Iterator[tuple[int, Rows]]]
) -> Iterator[tuple[int, Rows]]:
    """Batches first ... steps - 1; nothing is read when there are none."""
    if first < steps:
        for step, rows in rows_from(first):
            yield step, rows
            if step + 1 == steps:
                return


def _settle(step: int, metrics: Metrics, rows: Rows, log: MetricsLog | None, problem: Problem) -> str:
    """Wait for a step's metrics, check and log them; returns a note for the progress bar."""
    values = {name: value.item() for name, value in jax.device_get(metrics)._asdict().items()}
    if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
        raise UserError(_not_finite(step, values, rows))
    if log is not None and (step % problem.train.log_every == 0 or step + 1 == problem.train.steps):
        log.add(step, values)
    return f"loss {values['loss']:.4f}  fvu {values['fvu']:.4f}  k {values['k']}  dead {values['dead_features']}"


def _not_finite(step: int, values: Mapping[str, float], rows: Rows) -> str:
    documents = [f"{doc:016x}" for doc in np.unique(rows.doc)]
    bad = np.flatnonzero(~np.isfinite(rows.resid.astype(np.float32)).all(axis=1))
    if len(bad):
        named = ", ".join(f"{rows.doc[i]:016x} at token {rows.position[i]}" for i in bad[:3])
        cause = f"{len(bad)} of its rows are not finite (documents {named}): harvest again with backbone.dtype float32"
    else:
        cause = (
            "its rows are finite, so training diverged: lower train.learning_rate or set train.warmup_steps, and "
            "delete the product to start afresh"
        )
    return (
        f"loss {values['loss']} and gradient norm {values['gradient_norm']} at step {step}, learning rate "
        f"{values['learning_rate']:.3g}, k {values['k']}, batch {step} of {len(rows)} rows from {len(documents)} "
        f"documents ({', '.join(documents[:3])}, ...); {cause}. The last checkpoint is from before it."
    )


def _in_order(reader: StoreReader) -> Iterable[np.ndarray]:
    blocks = np.arange(len(reader.block_rows))
    for start in range(0, len(blocks), VALIDATION_BLOCKS):
        yield reader.read_blocks(blocks[start : start + VALIDATION_BLOCKS]).resid


def _origin(manifest: Manifest) -> dict[str, Any]:
    return {"layer": manifest.layer, "model": manifest.model, "model_digest": manifest.model_digest}
