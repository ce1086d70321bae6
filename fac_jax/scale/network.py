"""What a collective takes on a torus, in a host's switch, and between hosts or slices.

Bandwidth only, plus a microsecond a hop: an all-gather of S bytes among n devices receives S (n - 1) / n through its
links, an all-reduce twice as much (a reduce-scatter, then an all-gather), an all-to-all a quarter of an all-gather of
all that is exchanged (https://jax-ml.github.io/scaling-book/sharding). A torus axis that is a ring works both ways, a
line one way; several axes work at the same time; groups that interleave on an axis share its links.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fac_jax.scale.chips import Chip, Topology

HOP_S = 1e-6
"""Latency of a hop; a launch on the host's network takes ten of them."""


@dataclass(frozen=True)
class Place:
    """Where a device of the mesh is: coordinates of its chip in its slice, or the host of a GPU."""

    coords: tuple[int, ...]
    host: int
    slice: int = 0


@dataclass(frozen=True)
class Network:
    """Places of the devices in the mesh's order."""

    topology: Topology
    places: tuple[Place, ...]

    def seconds(self, kind: str, size: float, group: Sequence[int]) -> float:
        """Of one collective among the devices of `group`. `size`: bytes of the larger of what goes in and comes out."""
        members = [self.places[index] for index in group]
        if len(members) < 2:
            return 0.0
        chip = self.topology.chip.device
        slices = len({place.slice for place in members})
        inner = [place for place in members if place.slice == members[0].slice]
        near = _seconds(kind, size, len(inner), *self._ring(inner, chip))
        if slices == 1:
            return near
        far = _seconds(kind, size / len(inner), slices, chip.network_bandwidth, 10 * slices)
        return near + far

    def between_slices(self, kind: str, size: float) -> float:
        """Of one collective in which every device joins its counterparts in the other slices."""
        slices = self.topology.slices
        return _seconds(kind, size, slices, self.topology.chip.device.network_bandwidth, 10 * slices)

    def _ring(self, members: Sequence[Place], chip: Chip) -> tuple[float, int]:
        """Bytes a second that each of `members` can receive from the others, and hops around them."""
        if not chip.torus_axes:
            hosts = len({place.host for place in members})
            if hosts == 1:
                return chip.link_bandwidth, len(members)
            return min(chip.link_bandwidth, chip.network_bandwidth * len(members) / hosts), 10 * hosts
        bandwidth, hops = 0.0, 0
        for axis, length in enumerate(self.topology.dims):
            values = sorted({place.coords[axis] for place in members})
            if len(values) > 1:
                ring = chip.ring(length) and (len(values) == length or values[-1] - values[0] > length / 2)
                reach = length if ring else values[-1] - values[0] + 1
                bandwidth += chip.link_bandwidth * (2 if ring else 1) * len(values) / reach
                hops += reach // 2 if ring else reach - 1
        return (bandwidth, hops) if bandwidth else (math.inf, 1)  # the two devices of one chip


def _seconds(kind: str, size: float, members: int, bandwidth: float, hops: int) -> float:
    share = (members - 1) / members
    if members < 2:
        return 0.0
    if kind == "all-reduce":
        return 2 * (size * share / bandwidth + hops * HOP_S)
    if kind in ("all-to-all", "ragged-all-to-all"):
        return size * members / 4 / bandwidth + hops * HOP_S
    if kind == "collective-permute":
        return size / bandwidth + HOP_S
    return size * share / bandwidth + hops * HOP_S  # all-gather, reduce-scatter, broadcast
