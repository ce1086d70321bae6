"""Which mesh and batch are predicted to be the fastest, and what would make a training fit that does not.

What cannot fit by arithmetic (a device's part of the state, one gradient as large as the parameters, its rows in
float32) is left out before anything is compiled; what is said to fit was compiled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fac_jax.config.file import Config
from fac_jax.errors import UserError
from fac_jax.progress import progress
from fac_jax.scale.chips import Topology
from fac_jax.scale.devices import Machine, machine
from fac_jax.scale.predict import Step, train_step

if TYPE_CHECKING:
    from fac_jax.scale.programs import OutOfMemory

GIB = 2**30
BATCHES = (0.25, 0.5, 2.0, 4.0)
"""Batch sizes that are tried beside the configured one, as multiples of it, for the two best meshes."""


@dataclass(frozen=True)
class Found:
    """What a search compiled."""

    fitting: tuple[Step, ...]
    """Fastest first."""
    refused: tuple[tuple[dict[str, int], str], ...]
    """Settings, and why not."""

    def best(self, config: Config) -> Config:
        """`config` with the settings of the fastest."""
        settings = self.fitting[0].settings
        return _with(config, settings["mesh.data"], settings["mesh.feature"], settings["train.batch_rows"])


def search(config: Config, topology: Topology) -> Found:
    """All meshes of a topology at the configured batch, then other batches on the two best.

    Compiles at the last K only: the schedule's other widths are other branches of the same program, and take long to
    compile. Raises UserError, with advice, where nothing fits.
    """
    from fac_jax.scale.programs import OutOfMemory, model_config

    target, d_model = machine(topology), model_config(config.backbone.model).d_model
    fitting: list[Step] = []
    refused: list[tuple[dict[str, int], str]] = []
    last = OutOfMemory(math.nan, topology.chip.device.memory_gib * GIB)

    def attempt(asked: Config) -> None:
        nonlocal last
        settings = {"mesh.data": asked.mesh.data or 1, "mesh.feature": asked.mesh.feature}
        settings["train.batch_rows"] = asked.train.batch_rows
        try:
            fitting.append(_compiled(asked, d_model, target))
        except OutOfMemory as found:
            last = found
            refused.append((settings, f"needs {found}"))

    rows = config.train.batch_rows
    with progress("search", None, "programs") as bar:
        for data, feature in meshes(config.sae.features, len(target.devices), config.train.shard_optimizer):
            if rows % data == 0:
                attempt(_with(config, data, feature, rows))
                bar.advance(1, f"mesh {data} x {feature}")
        fitting.sort(key=lambda step: -step.tokens_per_second)
        for step in fitting[:2]:
            data, feature = step.settings["mesh.data"], step.settings["mesh.feature"]
            for factor in BATCHES:
                if rows * factor % data == 0 and rows * factor >= data:
                    attempt(_with(config, data, feature, int(rows * factor)))
                    bar.advance(1, f"batch {rows * factor:,.0f}")
    if not fitting:
        raise UserError(advice(config, d_model, topology, last))
    return Found(tuple(sorted(fitting, key=lambda step: -step.tokens_per_second)), tuple(refused))


def meshes(features: int, devices: int, shard_optimizer: bool = False) -> list[tuple[int, int]]:
    """(data, feature) that use all devices and divide the features, most feature shards first."""
    if shard_optimizer and features % devices:
        return []
    pairs = ((devices // feature, feature) for feature in range(devices, 0, -1) if devices % feature == 0)
    return [(data, feature) for data, feature in pairs if features % feature == 0]


def _with(config: Config, data: int, feature: int, rows: int) -> Config:
    mesh = replace(config.mesh, data=data, feature=feature)
    return replace(config, mesh=mesh, train=replace(config.train, batch_rows=rows))


def _compiled(config: Config, d_model: int, target: Machine, whole: bool = False) -> Step:
    """The step that a config asks for, at its last K only unless `whole`. Raises OutOfMemory, by arithmetic first."""
    from fac_jax.scale.programs import OutOfMemory

    limit = target.topology.chip.device.memory_gib * GIB
    least = least_bytes(config, d_model, target)
    if least > limit:
        raise OutOfMemory(least, limit)
    if not whole:
        last_k = {"k_schedule": "linear", "k_start": config.sae.k, "anneal_steps": 0}
        config = replace(config, train=replace(config.train, **last_k))  # type: ignore[arg-type]
    return train_step(config, d_model, target)


def least_bytes(config: Config, d_model: int, target: Machine) -> float:
    """What a device holds at the least: its part of the state, a gradient like its parameters, its rows in float32."""
    from fac_jax.mesh import DATA, FEATURE, make_mesh
    from fac_jax.scale.programs import posed, state_bytes

    mesh = make_mesh(config.mesh, target.devices)
    problem = posed(config, d_model, target.topology.chip.platform)
    matrices = 1 if config.sae.tied else 2
    gradient = 4 * matrices * config.sae.features // mesh.shape[FEATURE] * d_model
    rows = 4 * config.train.batch_rows // mesh.shape[DATA] * d_model
    return float(state_bytes(problem, mesh) + gradient + rows)


def advice(config: Config, d_model: int, topology: Topology, found: OutOfMemory) -> str:
    """What does not fit, and the settings, then the smallest larger topology, that were compiled and found to fit."""
    lines = [
        f"{config.sae.features:,} features of width {d_model} do not fit {topology.name}: a device needs {found} with "
        f"mesh.feature {config.mesh.feature}, train.batch_rows {config.train.batch_rows:,}, {config.train.optimizer}"
    ]
    with progress("advice", None, "programs") as bar:
        fits = _first_that_fits(_milder(config, topology), d_model, machine(topology), bar)
        if fits is not None:
            flags, memory = fits
            lines.append(f"on the same devices it would fit with {flags} ({memory})")
        else:
            lines.append("on the same devices nothing that was tried makes it fit")
        larger = _larger(config, d_model, topology, bar)
    if larger:
        lines.append(larger)
    return "; ".join(lines)


def _milder(config: Config, topology: Topology) -> Iterator[tuple[str, Config]]:
    """Ever less memory a device, the settings that cost least first; each keeps those before it."""
    devices = topology.devices
    flags = ""
    for data, feature in meshes(config.sae.features, devices)[:1]:
        if (feature, data) != (config.mesh.feature, config.mesh.data or devices // config.mesh.feature):
            config, flags = _with(config, data, feature, config.train.batch_rows), f"--mesh.feature {feature}"
            yield flags, config
    if not config.train.shard_optimizer and (config.mesh.data or devices // config.mesh.feature) > 1:
        if config.sae.features % devices == 0:
            config = replace(config, train=replace(config.train, shard_optimizer=True))
            flags = f"{flags} --train.shard-optimizer".strip()
            yield flags, config
    data = config.mesh.data or devices // config.mesh.feature
    for factor in (4, 16):
        rows = config.train.batch_rows // factor
        if rows >= max(128, data) and rows % data == 0:
            yield f"{flags} --train.batch-rows {rows}".strip(), _rows(config, rows)
    if config.train.optimizer == "adam":
        config = replace(config, train=replace(config.train, optimizer="adafactor"))
        flags = f"{flags} --train.optimizer adafactor".strip()
        yield flags, config
        rows = config.train.batch_rows // 4
        if rows >= max(128, data) and rows % data == 0:
            yield f"{flags} --train.batch-rows {rows}", _rows(config, rows)


def _rows(config: Config, rows: int) -> Config:
    return replace(config, train=replace(config.train, batch_rows=rows))


def _first_that_fits(
    candidates: Iterator[tuple[str, Config]], d_model: int, target: Machine, bar: Any
) -> tuple[str, str] | None:
    from fac_jax.scale.programs import OutOfMemory

    for flags, asked in candidates:
        try:
            step = _compiled(asked, d_model, target, whole=True)
        except OutOfMemory:
            bar.advance(1, f"not {flags}")
            continue
        bar.advance(1, flags)
        return flags, f"{step.program.peak_bytes / GIB:.2f} of {step.limit_bytes / GIB:.2f} GiB a device"
    return None


def _larger(config: Config, d_model: int, topology: Topology, bar: Any) -> str:
    """The smallest topology of more chips, with every device a feature shard or half of them, that fits."""
    for wider in topology.larger():
        try:
            target = machine(wider)
        except UserError:  # more stand-ins than this process has: arithmetic only
            return f"a larger topology, such as {wider.name}, would hold it if its devices had room (not compiled here)"
        candidates = []
        for data, feature in meshes(config.sae.features, wider.devices)[:2]:
            if config.train.batch_rows % data == 0:
                candidates.append(
                    (
                        f"--topology {wider.name} --mesh.feature {feature}",
                        _with(config, data, feature, config.train.batch_rows),
                    )
                )
        fits = _first_that_fits(iter(candidates), d_model, target, bar)
        if fits is not None:
            flags, memory = fits
            return f"with these settings the smallest topology that holds it is {flags} ({memory})"
    return f"no topology of {topology.chip.name} holds it with these settings"
