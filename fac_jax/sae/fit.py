"""The training loop: any number of SAEs, step by step, over the same rows.

Writes `checkpoints/` (all of them together), and each one's `metrics.jsonl` (a line of `Metrics` every `log_every`
steps) and `validation.jsonl` (a line at every checkpoint: figures on some held-out rows). The data of a step depend on
nothing but the step, so a run that is killed goes on from its last checkpoint and ends with the same bytes. Durations,
which never repeat, are kept apart: `timings.jsonl` has rows a second and the share of the time waited for rows.

A thread moves the next batches to the devices, and the loop never waits for the step it has just started: metrics are
read one step late, and a loss or gradient that is not finite stops the run with its step, rate and rows before any
checkpoint can hold it.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import BFloat16, Float64

from fac_jax.activations.rows import Rows
from fac_jax.config.sae import TrainConfig
from fac_jax.distributed import beat, heeding_sigterm, is_first
from fac_jax.errors import Stopped, UserError
from fac_jax.mesh import DATA, place_rows, starting
from fac_jax.progress import progress
from fac_jax.runs import write_text
from fac_jax.sae.checkpoint import open_checkpoints, restore_state, save_state
from fac_jax.sae.metrics import validate
from fac_jax.sae.model import SAE
from fac_jax.sae.prefetch import moving_ahead
from fac_jax.sae.problem import Problem, k_at
from fac_jax.sae.step import Batch, Metrics, TrainState, init_state, make_train_step, unscaled

logger = logging.getLogger(__name__)
SLOW_S = 1800.0
"""Seconds that a compilation, a checkpoint or a validation may take before a run of several processes is given up."""
RowsFrom = Callable[[int, bool], Iterator[tuple[int, Rows]]]
"""(step, this process's rows) from a step on, endlessly and always the same; their origin may be missing if False."""


@dataclass(frozen=True)
class Member:
    """One of the SAEs that are trained together."""

    name: str
    problem: Problem
    seed: int
    """Of its initialisation."""
    folder: Path
    """Where its metrics.jsonl, and in the end it, is written."""
    start: SAE | None = None
    """SAE that it goes on from, instead of a random one."""


@dataclass(frozen=True)
class Fitted:
    """The end of a training, and how fast this process got there."""

    states: tuple[TrainState, ...]
    """One a member."""
    seconds: float
    rows_per_second: float
    """Without the first step, which compiles."""
    data_wait: float
    """Share of the time, again without the first step, that the loop waited for rows."""


def fit(
    members: Sequence[Member],
    mean_d: Float64[np.ndarray, " d"],
    rows_from: RowsFrom,
    mesh: Mesh,
    out: Path,
    held_out_bd: BFloat16[np.ndarray, "b d"] | None = None,
) -> Fitted:
    """Train for `train.steps`, from the last checkpoint in `out` if there is one.

    A thread reads the rows. The members, which share their train settings, see the same ones: each batch is read and
    moved to the devices once.
    `held_out_bd` are rows that every checkpoint is measured on; without them none is better than another.

    Raises Stopped after SIGTERM, with a checkpoint of a step that is the same in every process.
    """
    settings, data_shards = members[0].problem.train, mesh.shape[DATA]
    if settings.batch_rows % data_shards:
        raise UserError(
            f"train.batch_rows {settings.batch_rows} cannot be shared equally by mesh.data {data_shards}: change one"
        )
    started = time.monotonic()
    beat("the beginning of training", SLOW_S)
    folder, keep_best = out / "checkpoints", settings.keep_best if held_out_bd is not None else 0
    with open_checkpoints(folder, settings.keep_checkpoints, keep_best) as checkpoints, heeding_sigterm() as stop:
        states = {one.name: init_state(one.problem, mean_d, one.seed, mesh, one.start) for one in members}
        first, states = restore_state(checkpoints, states) or (0, states)
        logs, checks = _open_logs(members, "metrics", first), _open_logs(members, "validation", first + 1)
        steps, timings = [make_train_step(one.problem, mesh) for one in members], _Timings(out, first)
        waiting: deque[tuple[int, list[Metrics], Rows]] = deque()
        beat(f"the restoring of step {first}; the next one compiles", SLOW_S)
        # Only the published weights need to know which rows are of one document; an error message reads a batch again.
        read = _until(settings.steps, first, rows_from, members[0].problem.official)
        with (
            moving_ahead(read, partial(_moved, members[0].problem, mesh)) as ahead,
            progress("train", (settings.steps - first) * settings.batch_rows, "tokens") as bar,
        ):
            for step, rows, batch in ahead:
                metrics = []
                for member, take in zip(members, steps, strict=True):
                    with starting(mesh):
                        states[member.name], found = take(states[member.name], batch)
                    metrics.append(found)
                waiting.append((step, metrics, rows))
                stopping = stop.at(step)
                due = (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps
                save = due or stopping
                while len(waiting) > (0 if save else 1):
                    settled = waiting.popleft()
                    bar.advance(settings.batch_rows, _settle(*settled, members, logs, rows_from))
                    timings.settled(settled[0], ahead.waited_s, settings)
                    beat(f"step {step}")
                if save:
                    beat(f"step {step}, at a checkpoint", SLOW_S)
                    quality = _check(members, states, held_out_bd, step + 1, mesh, checks) if due else {}
                    save_state(checkpoints, step + 1, states, **quality)
                    beat(f"the checkpoint after step {step}")
                if stopping and step + 1 < settings.steps:
                    raise Stopped(f"SIGTERM: saved after step {step} of {settings.steps}")
        ended, rates = time.monotonic(), timings.overall(settings)
        beat("the last step", SLOW_S)
        if settings.finish == "best" and keep_best:
            checkpoints.wait_until_finished()
            best = restore_state(checkpoints, states, best=True)
            assert best is not None
            logger.info("the best checkpoint is that of step %d of %d", best[0], settings.steps)
            states = best[1]
    return Fitted(tuple(states[one.name] for one in members), ended - started, **rates)


def to_device(rows: Rows, problem: Problem, mesh: Mesh) -> Batch:
    """This process's rows (or all) as its part of the global batch, in the type they are stored in."""
    weight_b, total = np.ones(len(rows), np.float32), problem.train.batch_rows
    if problem.official:
        if len(rows) != total:
            raise ValueError(f"{len(rows)} of {total} rows do not tell how many of them each document has")
        _, sequence_b, counts = np.unique(rows.doc, return_inverse=True, return_counts=True)
        weight_b = (1 / counts[sequence_b]).astype(np.float32)
    return Batch(place_rows(mesh, rows.resid, total), place_rows(mesh, weight_b, total))


def _moved(problem: Problem, mesh: Mesh, read: tuple[int, Rows]) -> tuple[int, Rows, Batch]:
    return *read, to_device(read[1], problem, mesh)


def _check(
    members: Sequence[Member],
    states: Mapping[str, TrainState],
    held_out_bd: np.ndarray | None,
    step: int,
    mesh: Mesh,
    logs: Sequence[MetricsLog],
) -> dict[str, Any]:
    """How good a checkpoint is: K, and the mean fvu of the members on held-out rows, whose figures are logged."""
    ks = [int(k_at(step - 1, one.problem)) for one in members]
    if held_out_bd is None:
        return {"k": max(ks)}
    saes = [unscaled(states[one.name], one.problem) for one in members]
    asked = [(sae, k if sae.threshold_f is None else None) for sae, k in zip(saes, ks, strict=True)]
    problem = members[0].problem
    with starting(mesh):
        found = validate(asked, [held_out_bd], problem.train.batch_rows, mesh, problem.norm_limit)
    for log, figures in zip(logs, found, strict=False):
        log.add(step, {name: value for name, value in asdict(figures).items() if name != "density"})
    return {"k": max(ks), "fvu": float(np.mean([figures.fvu for figures in found]))}


class MetricsLog:
    """One JSON object a line; opening it drops what a killed run wrote after its last checkpoint."""

    def __init__(self, path: Path, before: int) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        write_text(path, "".join(line for line in whole if json.loads(line)["step"] < before))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")


class _Moment(NamedTuple):
    steps: int
    """Settled so far."""
    at: float
    waited_s: float
    """For rows, so far."""


class _Timings:
    """timings.jsonl, and the same figures over the whole run. They begin after the first step, which compiles."""

    def __init__(self, out: Path, first: int) -> None:
        self._log = MetricsLog(out / "timings.jsonl", first) if is_first() else None
        self._begun: _Moment | None = None
        self._logged = self._now = _Moment(0, 0.0, 0.0)

    def settled(self, step: int, waited_s: float, train: TrainConfig) -> None:
        """Count a step that has ended; where metrics.jsonl gets a line, so do the steps since the line before."""
        self._now = _Moment(self._now.steps + 1, time.monotonic(), waited_s)
        if self._begun is None:
            self._begun = self._logged = self._now
        elif is_logged(step, train):
            if self._log is not None:
                self._log.add(step, _rates(self._logged, self._now, train))
            self._logged = self._now

    def overall(self, train: TrainConfig) -> dict[str, float]:
        """From the end of the first step until now, checkpoints included."""
        now = self._now._replace(at=time.monotonic())
        return _rates(self._begun or now, now, train)


def _rates(begun: _Moment, now: _Moment, train: TrainConfig) -> dict[str, float]:
    """Rows a second, and the share of the time waited for rows; 0 where no step was made."""
    seconds = max(now.at - begun.at, 1e-9)
    rows, waited_s = (now.steps - begun.steps) * train.batch_rows, now.waited_s - begun.waited_s
    return {"rows_per_second": rows / seconds, "data_wait": min(1.0, waited_s / seconds)}


def _until(steps: int, first: int, rows_from: RowsFrom, with_origin: bool) -> Iterator[tuple[int, Rows]]:
    """Batches first ... steps - 1; nothing is read when there are none."""
    if first < steps:
        for step, rows in rows_from(first, with_origin):
            yield step, rows
            if step + 1 == steps:
                return


def is_logged(step: int, train: TrainConfig) -> bool:
    """Whether a step has a line in metrics.jsonl."""
    return step % train.log_every == 0 or step + 1 == train.steps


def _settle(
    step: int,
    metrics: Sequence[Metrics],
    rows: Rows,
    members: Sequence[Member],
    logs: Sequence[MetricsLog],
    rows_from: RowsFrom,
) -> str:
    """Wait for a step's metrics, check and log them; returns a note for the progress bar."""
    train = members[0].problem.train
    found = [{name: value.item() for name, value in one._asdict().items()} for one in jax.device_get(list(metrics))]
    for member, values in zip(members, found, strict=True):
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            if not rows.has_origin:
                _, rows = next(rows_from(step, True))
            raise UserError(("" if len(members) == 1 else f"{member.name}: ") + _not_finite(step, values, rows))
    if is_logged(step, train):
        for log, values in zip(logs, found, strict=False):
            log.add(step, values)
    if len(found) > 1:
        fvu = [values["fvu"] for values in found]
        dead = max(values["dead_fraction"] for values in found)
        return f"{len(found)} SAEs  fvu {min(fvu):.4f} to {max(fvu):.4f}  dead {dead:.1%}"
    (values,) = found
    return f"loss {values['loss']:.4f}  fvu {values['fvu']:.4f}  k {values['k']}  dead {values['dead_fraction']:.1%}"


def _open_logs(members: Sequence[Member], name: str, before: int) -> list[MetricsLog]:
    """One for each member in the first process, none in others."""
    if not is_first():
        return []
    for member in members:
        member.folder.mkdir(parents=True, exist_ok=True)
    return [MetricsLog(member.folder / f"{name}.jsonl", before) for member in members]


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
        f"documents ({', '.join(documents[:3])}, ...); {cause}. No checkpoint holds it."
    )
