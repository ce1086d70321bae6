"""What a step of training or harvest would take on a machine that is not here: its program compiled, read and counted.

The real step is compiled ahead of time for the topology (`programs.py`), the compiled program is read (`hlo.py`), and
what it does is counted (`cost.py`) at the rates of the chip's data sheet (`chips.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fac_jax.config.file import Config
from fac_jax.errors import UserError
from fac_jax.progress import Bar
from fac_jax.scale.chips import Topology
from fac_jax.scale.cost import Cost, Pick, cheapest, dearest, program_cost
from fac_jax.scale.devices import Machine, machine
from fac_jax.scale.hlo import Instruction, Module, parse

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from fac_jax.backbone.config import ModelConfig
    from fac_jax.scale.programs import Program

GIB = 2**30
DAY_S = 86_400


@dataclass(frozen=True)
class Step:
    """What one step of a stage is predicted to take, on one device and on all."""

    stage: str
    """train or harvest."""
    settings: dict[str, Any]
    """Flags that make it, by name, with those of the mesh."""
    tokens: int
    """Of one step on all devices."""
    limit_bytes: float
    """Of a device's memory."""
    program: Program
    cost: Cost
    """Train: at the last K, nobody dead, features spread evenly over shards, all else at its cheapest branch."""
    first: Cost | None
    """Train: the same at the first K of the schedule."""
    worst: Cost
    """Train: at the last K with dead features, every conditional at its dearest branch."""

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together."""
        return self.tokens / self.cost.seconds

    @property
    def ratio(self) -> float:
        """Predicted time over that of the matmuls, gathers and scatters alone."""
        return self.cost.seconds / self.cost.floor_s if self.cost.floor_s else float("nan")

    def days(self, tokens: float) -> float:
        """For so many tokens, at the steady rate."""
        return tokens / self.tokens_per_second / DAY_S


@dataclass(frozen=True)
class Plan:
    """Both stages on one topology."""

    topology: Topology
    real: bool
    """Whether the target's own compiler made the programs."""
    train: Step
    harvest: Step | None
    """None where the backbone does not fit a host."""
    harvest_refused: str
    """Why there is no harvest; empty where there is."""
    train_tokens: int
    harvest_tokens: int


def train_step(config: Config, d_model: int, target: Machine) -> Step:
    """The training step on all devices of a topology. Raises OutOfMemory."""
    from fac_jax.mesh import DATA, FEATURE, make_mesh
    from fac_jax.sae.problem import k_widths
    from fac_jax.scale.programs import compile_train, posed

    mesh = make_mesh(config.mesh, target.devices)
    if mesh.size < len(target.devices):
        raise UserError(
            f"mesh.data {mesh.shape[DATA]} x mesh.feature {mesh.shape[FEATURE]} leaves devices of the "
            f"{len(target.devices)} idle: leave mesh.data out, or raise one of them"
        )
    chip = target.topology.chip
    problem = posed(config, d_model, chip.platform)
    limit = chip.device.memory_gib * GIB
    program = compile_train(problem, mesh, limit)
    module, widths = parse(program.text), len(k_widths(problem))
    costs = []
    for index, base in ((0, cheapest), (widths - 1, cheapest), (0, dearest)):
        k = k_widths(problem)[index]
        narrow = narrowing(k, mesh.shape[FEATURE], problem.train.batch_rows)
        picked = AtWidth(widths, index, base, narrow if base is cheapest else None)
        costs.append(_cost(module, target, mesh, picked))
        if widths > 1 and not picked.met:
            raise ValueError(f"the compiled step has no conditional of {widths} branches, one for each width of K")
    settings = {
        "mesh.data": mesh.shape[DATA],
        "mesh.feature": mesh.shape[FEATURE],
        "train.batch_rows": config.train.batch_rows,
        "train.optimizer": config.train.optimizer,
        "train.shard_optimizer": config.train.shard_optimizer,
    }
    first = costs[1] if widths > 1 else None
    return Step("train", settings, config.train.batch_rows, limit, program, costs[0], first, costs[2])


@dataclass
class AtWidth:
    """Of the step's branches, one for each width of K, picks that of `index`; else it picks as `base` does."""

    widths: int
    index: int
    base: Pick
    narrow: tuple[int, int] | None = None
    """Branches of the conditional that decodes as few columns as it can, and which of them is expected."""
    met: bool = False
    """Whether there was a conditional of `widths` branches."""

    def __call__(self, conditional: Instruction, outermost: bool, costs: Sequence[Cost]) -> int:
        """A `Pick`."""
        if outermost and len(costs) == self.widths > 1:
            self.met = True
            return self.index
        if self.narrow and len(costs) == self.narrow[0] > 2:  # of two branches, one is for dead features
            return self.narrow[1]
        return self.base(conditional, outermost, costs)


def narrowing(k: int, shards: int, rows: int) -> tuple[int, int]:
    """Branches that sparse decoding has for K on so many shards (`sae/decode.py`), and the one that a step is expected
    to take if features are spread evenly: all wait for the row, of all rows and shards, that keeps the most."""
    from scipy.stats import binom

    from fac_jax.sae.decode import widths

    found = widths(k, shards)
    needed = next(n for n in range(k + 1) if n == k or rows * shards * binom.sf(n, k, 1 / shards) < 0.5)
    return len(found), sum(needed <= width for width in found[1:])


def harvest_step(config: Config, model: ModelConfig, topology: Topology, bar: Bar) -> tuple[Step | None, str]:
    """The forward pass on one host, all hosts doing the same, on as few model shards as fit; or why it does not fit.

    Its mesh is a host's own, and has nothing to do with that of the training: hosts harvest alone.
    """
    from fac_jax.config.machine import MeshConfig
    from fac_jax.mesh import make_mesh
    from fac_jax.scale.programs import OutOfMemory, compile_harvest

    host = machine(_host(topology))
    devices = len(host.devices)
    refused = ""
    for feature in (n for n in range(1, devices + 1) if devices % n == 0):
        data = devices // feature
        rows = -(-config.backbone.rows_per_batch // data) * data
        mesh = make_mesh(MeshConfig(data=data, feature=feature), host.devices)
        limit = topology.chip.device.memory_gib * GIB
        try:
            batch = replace(config.backbone, rows_per_batch=rows)
            program = compile_harvest(replace(config, backbone=batch), model, mesh, limit, topology.chip.platform)
        except OutOfMemory as found:
            blocks = config.harvested_layers[-1]
            refused = f"the backbone's first {blocks} blocks do not fit a host: they need {found} a device"
            continue
        bar.advance(1, "harvest")
        cost = _cost(parse(program.text), host, mesh, cheapest)
        settings = {
            "mesh.data": data,
            "mesh.feature": feature,
            "backbone.rows_per_batch": rows,
            "backbone.row_tokens": config.backbone.row_tokens,
        }
        hosts = topology.devices // devices
        tokens = rows * config.backbone.row_tokens * hosts
        return Step("harvest", settings, tokens, limit, program, cost, None, cost), ""
    return None, refused


def _host(topology: Topology) -> Topology:
    """One host of a topology, as one of its own."""
    chips = topology.devices_per_host // topology.chip.devices
    dims: tuple[int, ...] = (chips,)
    if topology.chip.torus_axes:
        dims = {4: (2, 2), 8: (2, 4)}.get(chips, (1, chips)) + (1,) * (topology.chip.torus_axes - 2)
    return Topology(topology.chip, dims)


def _cost(module: Module, target: Machine, mesh: Mesh, pick: Pick) -> Cost:
    return program_cost(module, target.topology.chip.device, target.network(mesh), pick)
