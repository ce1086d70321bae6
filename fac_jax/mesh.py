"""The device mesh: two axes, `data` (batch) and `feature` (SAE features, heads and hidden units of the backbone).

Always set, 1x1 on a laptop. Axis names live here and nowhere else; what is not sharded is said by `None`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fac_jax.config import MeshConfig
from fac_jax.errors import UserError

DATA = "data"
FEATURE = "feature"


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh of `devices` (default: all), shape (data, feature), Auto axes. UserError when the sizes do not fit."""
    devices = jax.devices() if devices is None else devices
    data = config.data if config.data is not None else max(1, len(devices) // config.feature)
    if data * config.feature > len(devices) or data < 1 or config.feature < 1:
        raise UserError(
            f"mesh.data={data} x mesh.feature={config.feature} needs {data * config.feature} devices, "
            f"but jax sees {len(devices)} ({devices[0].platform}); lower one of them"
        )
    grid = np.asarray(devices[: data * config.feature]).reshape(data, config.feature)
    return Mesh(grid, (DATA, FEATURE), axis_types=(AxisType.Auto, AxisType.Auto))


def sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """`NamedSharding` over `mesh`, one axis name or None per array dimension."""
    return NamedSharding(mesh, P(*axes))
