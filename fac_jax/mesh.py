"""The device mesh: two axes, `data` (batch) and `feature` (SAE features, heads and hidden units of the backbone).

Always set, 1x1 on a laptop. Axis names live here and nowhere else; what is not sharded is said by `None`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from fac_jax.config.machine import MeshConfig
from fac_jax.errors import UserError

DATA = "data"
FEATURE = "feature"
_ORDER = Lock()


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh of `devices` (default: all), shape (data, feature), Auto axes. UserError when the sizes do not fit."""
    devices = jax.devices() if devices is None else devices
    data = config.data if config.data is not None else max(1, len(devices) // config.feature)
    if data * config.feature > len(devices) or data < 1 or config.feature < 1:
        raise UserError(
            f"mesh.data={data} x mesh.feature={config.feature} needs {data * config.feature} devices, "
            f"but jax sees {len(devices)} ({devices[0].platform}); lower one of them"
        )
    if data * config.feature < len(devices) and len({device.process_index for device in devices}) > 1:
        raise UserError(
            f"mesh.data={data} x mesh.feature={config.feature} uses {data * config.feature} of {len(devices)} devices: "
            "with several processes all must be used; leave mesh.data out, or raise one of them"
        )
    grid = _along_the_wires(data, config.feature, devices[: data * config.feature])
    return Mesh(grid, (DATA, FEATURE), axis_types=(AxisType.Auto, AxisType.Auto))


def own_mesh(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of one process's devices, for work that it does by itself beside others.

    With several processes `mesh.feature` may be more than one has: the model is then split over all of its own.
    """
    if config.coordinator is None:
        return make_mesh(config, devices)
    return make_mesh(replace(config, data=None, feature=math.gcd(config.feature, len(devices))), devices)


def _along_the_wires(data: int, feature: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices as [data, feature], so that neighbours on the mesh are neighbours in the machine.

    Where the two share an axis of a TPU's torus, `data` takes neighbours on it: its sum of the gradient of W is the
    largest exchange, and with hops between its devices it takes twice as long (predicted for 4 x 64 on a v5e:16x16).
    Slices of TPUs have a slow network between them: only the data axis, which exchanges once a step, crosses it.
    """
    arrange = partial(mesh_utils.create_device_mesh, allow_split_physical_axes=True)
    if devices[0].platform != "tpu":
        return arrange((data, feature), devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return arrange((feature, data), devices).T
    if data % slices:
        raise UserError(f"mesh.data {data} cannot be shared equally by {slices} slices: change mesh.feature")
    within, between = (feature, data // slices), (1, slices)
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True).T


def starting(mesh: Mesh) -> AbstractContextManager[Any]:
    """Held by a thread while it starts a program on `mesh`, where another thread may start one on the same devices.

    Started in different orders on different devices, both would wait for ever in each other's exchanges.
    """
    return _ORDER if mesh.size > 1 else nullcontext()


def platform(mesh: Mesh) -> str:
    """cpu, gpu or tpu: of the devices of `mesh`, which need not be here when a program is only compiled."""
    return mesh.devices.flat[0].platform


def matmul_dtype(platform: str) -> str:
    """Input type in which devices of this platform multiply fastest: bfloat16 wherever the hardware has it."""
    if platform != "cpu":
        return "bfloat16"
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return "float32"
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16"} else "float32"


def sharding(mesh: Mesh, *axes: str | tuple[str, ...] | None) -> NamedSharding:
    """`NamedSharding` over `mesh`: for each array dimension an axis name, several, or None."""
    return NamedSharding(mesh, P(*axes))


def row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """How `rows` rows come to the devices: shared out over all of them, or over `data` only where they cannot be.

    A step that needs a row on every feature shard gathers it there, over the wires between devices: a host then reads
    and sends only its own share, where it would else need all rows of its data shards.
    """
    return sharding(mesh, (DATA, FEATURE)) if rows % mesh.size == 0 else sharding(mesh, DATA)


def own_rows(mesh: Mesh, rows: int) -> list[tuple[int, int]]:
    """Which rows of a batch of `rows` this process's devices get: (start, stop) in order, neighbours joined."""
    places = row_sharding(mesh, rows).addressable_devices_indices_map((rows,)).values()
    spans: list[tuple[int, int]] = []
    for start, stop in sorted({index[0].indices(rows)[:2] for index in places if index}):
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], stop)
        else:
            spans.append((start, stop))
    return spans


def place_rows(mesh: Mesh, local: Shaped[np.ndarray, "n ..."], rows: int) -> Shaped[Array, "b ..."]:
    """A batch of `rows` rows, shared out, from the rows that `own_rows` names, or from all of them."""
    spans = [(0, rows)] if len(local) == rows else own_rows(mesh, rows)

    def piece(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(rows)
        before = 0
        for low, high in spans:
            if low <= start < high:
                return local[before + start - low : before + stop - low]
            before += high - low
        raise AssertionError(f"rows {start} to {stop} are not among {spans}")

    return jax.make_array_from_callback((rows, *local.shape[1:]), row_sharding(mesh, rows), piece)
