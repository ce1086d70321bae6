"""Devices of a topology that is not here, to compile for: a TPU's real ones where libtpu is installed, else fake ones.

libtpu compiles for any TPU on a machine that has none. Without it, and for GPUs, as many CPU devices stand in: the same
program, split in the same way, but compiled by XLA's CPU backend. `prepare` must run before jax touches a device.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fac_jax.errors import UserError, first_line
from fac_jax.scale.chips import Topology
from fac_jax.scale.network import Network, Place

if TYPE_CHECKING:
    from jax.sharding import Mesh

LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
}
"""What libtpu wants to read where no TPU and no metadata server is."""


@dataclass(frozen=True)
class Machine:
    """Devices to compile for, in jax's order."""

    topology: Topology
    devices: tuple[Any, ...]
    real: bool
    """Whether the target's own compiler makes the program."""

    def network(self, mesh: Mesh) -> Network:
        """Where the devices of `mesh` are."""
        if self.real:
            places = tuple(
                Place(tuple(one.coords), one.process_index, getattr(one, "slice_index", 0) or 0)
                for one in mesh.devices.flat
            )
        else:
            places = tuple(_place(self.topology, index) for index in range(mesh.size))
        return Network(self.topology, places)


def has_libtpu() -> bool:
    """Whether libtpu can be imported."""
    return importlib.util.find_spec("libtpu") is not None


def prepare(topology: Topology) -> None:
    """Set the environment that jax reads when it starts."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if topology.chip.platform == "tpu" and has_libtpu():
        for name, value in LIBTPU.items():
            os.environ.setdefault(name, value)
    elif "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        flag = f"--xla_force_host_platform_device_count={topology.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def machine(topology: Topology) -> Machine:
    """The devices of a topology. Raises UserError for a shape that libtpu does not know, or too few stand-ins."""
    import jax

    if topology.chip.platform == "tpu" and has_libtpu():
        from jax.experimental import topologies

        options = {} if topology.slices == 1 else {"num_slices": topology.slices}
        try:
            found: Sequence[Any] = topologies.get_topology_desc(
                platform="tpu", topology_name=topology.name, **options
            ).devices
        except Exception as error:  # libtpu's errors are JaxRuntimeError or ValueError, by version
            known = ", ".join(topology.chip.shapes)
            raise UserError(
                f"--topology {topology.name}: libtpu does not know it ({first_line(error)}); {topology.chip.name} "
                f"comes in {known}"
            ) from None
        if len(found) != topology.devices:
            raise UserError(
                f"--topology {topology.name}: libtpu makes {len(found)} devices of it, not {topology.devices}"
            )
        return Machine(topology, tuple(found), real=True)
    found = jax.devices("cpu")
    if len(found) < topology.devices:
        raise UserError(
            f"--topology {topology.name} needs {topology.devices} stand-in devices and this process has {len(found)}: "
            "unset XLA_FLAGS, or install libtpu (bash launch/plan.sh does it)"
        )
    return Machine(topology, tuple(found[: topology.devices]), real=False)


def _place(topology: Topology, index: int) -> Place:
    """Of a stand-in: mesh order runs along the last axis of the topology first."""
    chip = index // topology.chip.devices
    part, inside = divmod(chip, topology.chips // topology.slices)
    coords = tuple(int(at) for at in np.unravel_index(inside, topology.dims))
    return Place(coords, index // topology.devices_per_host, part)
