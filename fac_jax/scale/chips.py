"""What the makers say of their chips: rates, memory, links, and the shapes in which they are let.

All figures are peaks from data sheets, per chip; nothing here was measured. Rates of links are one way. A TPU's vector
rate is not published as such: it is lanes x sublanes x ALUs x clock (8 x 128 x 4 a core), the clock being what the peak
of the matrix units implies (https://jax-ml.github.io/scaling-book/tpus).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fac_jax.errors import UserError
from fac_jax.plain import suggest


@dataclass(frozen=True)
class Chip:
    """One kind of chip. Where a chip is several devices to jax, `device` gives the figures of one of them."""

    name: str
    platform: str
    """tpu or gpu."""
    matmul_flops: float
    """Operations a second of bfloat16 matmuls."""
    float32_slowdown: float
    """How many times longer a matmul of true float32 takes: passes of bfloat16 (TPU), or another unit (GPU)."""
    vector_ops: float
    """Elementwise float32 operations a second."""
    clock_hz: float | None
    """Of a TPU core; turns the compiler's estimated cycles into seconds."""
    memory_gib: float
    """HBM that a program can use."""
    memory_bandwidth: float
    """Bytes a second."""
    link_bandwidth: float
    """Bytes a second of one link one way: to a torus neighbour (TPU), or to the switch of the host (GPU)."""
    torus_axes: int
    """2 or 3; 0 where a switch joins the chips of a host."""
    wraps_from: int
    """A torus axis is a ring from this length on (and at multiples of it), else a line."""
    chips_per_host: int
    network_bandwidth: float
    """Bytes a second of one chip one way, between hosts (GPU) or slices (TPU)."""
    shapes: tuple[str, ...]
    """Topologies to be had, smallest first."""
    source: str
    devices: int = 1
    """Devices that jax sees of one chip."""

    @property
    def device(self) -> Chip:
        """The share of one device."""
        rates = ("matmul_flops", "vector_ops", "memory_gib", "memory_bandwidth", "link_bandwidth", "network_bandwidth")
        return replace(self, devices=1, **{name: getattr(self, name) / self.devices for name in rates})

    def ring(self, length: int) -> bool:
        """Whether a torus axis of so many chips closes to a ring."""
        return length >= self.wraps_from and length % self.wraps_from == 0


_PLANE = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
    *("16x16x16", "16x16x24"),
)
_HOSTS = ("1", "2", "4", "8", "16", "32", "64", "128", "256", "512")

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v5e", "tpu", 197e12, 6, 6.1e12, 1.5e9, 15.75, 819e9,
            link_bandwidth=50e9, torus_axes=2, wraps_from=16, chips_per_host=8, network_bandwidth=3.1e9, shapes=_PLANE,
            source="https://cloud.google.com/tpu/docs/v6e: 197 TFLOP/s, 16 GB (15.75 usable, as its compiler says), "
            "819 GB/s, 1,600 Gbit/s over 4 links, 2 x 100 Gbit/s a host of 8",
        ),
        Chip(
            "v5p", "tpu", 459e12, 6, 14.3e12, 1.75e9, 95.74, 2765e9,
            link_bandwidth=100e9, torus_axes=3, wraps_from=4, chips_per_host=4, network_bandwidth=6.25e9, shapes=_CUBES,
            source="https://cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GiB (95.74 usable, as its compiler says), "
            "2,765 GB/s, 1,200 GB/s both ways over 6 links, 50 Gbit/s a chip between slices",
        ),
        Chip(
            "v6e", "tpu", 918e12, 6, 7.2e12, 1.75e9, 31.25, 1640e9,
            link_bandwidth=100e9, torus_axes=2, wraps_from=16, chips_per_host=8, network_bandwidth=12.5e9,
            shapes=_PLANE,
            source="https://cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB (31.25 usable, as its compiler says), "
            "1,640 GB/s, 3,200 Gbit/s over 4 links, 4 x 200 Gbit/s a host of 8",
        ),
        Chip(
            "tpu7x", "tpu", 2307e12, 6, 18e12, 2.2e9, 189.5, 7380e9,
            link_bandwidth=100e9, torus_axes=3, wraps_from=4, chips_per_host=4, network_bandwidth=12.5e9, shapes=_CUBES,
            devices=2,
            source="https://docs.cloud.google.com/tpu/docs/tpu7x: 2,307 TFLOP/s, 192 GiB (189.5 usable, as its "
            "compiler says), 7,380 GB/s, 1,200 GB/s both ways over 6 links, 100 Gbit/s a chip between slices",
        ),
        Chip(
            "h100", "gpu", 989e12, 14.8, 67e12, None, 79.0, 3350e9,
            link_bandwidth=450e9, torus_axes=0, wraps_from=1, chips_per_host=8, network_bandwidth=50e9, shapes=_HOSTS,
            source="https://www.nvidia.com/en-us/data-center/h100: SXM, 989 TFLOP/s dense bfloat16, 67 float32, 80 GB "
            "(79 GiB usable), 3,350 GB/s, NVLink 900 GB/s both ways, 400 Gbit/s InfiniBand a GPU",
        ),
        Chip(
            "h200", "gpu", 989e12, 14.8, 67e12, None, 139.0, 4800e9,
            link_bandwidth=450e9, torus_axes=0, wraps_from=1, chips_per_host=8, network_bandwidth=50e9, shapes=_HOSTS,
            source="https://www.nvidia.com/en-us/data-center/h200: SXM, 989 TFLOP/s dense bfloat16, 67 float32, 141 GB "
            "(139 GiB usable), 4,800 GB/s, NVLink 900 GB/s both ways, 400 Gbit/s InfiniBand a GPU",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Topology:
    """So many chips of one kind, wired as a torus or in hosts; `slices` of them joined by the slower network."""

    chip: Chip
    dims: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As `--topology` names it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.dims))}"

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.dims) * self.slices

    @property
    def devices(self) -> int:
        """That jax sees."""
        return self.chips * self.chip.devices

    @property
    def devices_per_host(self) -> int:
        """Devices of one process: a TPU's virtual machine holds 4 chips of a slice of several hosts."""
        whole = self.chip.chips_per_host if self.chip.platform == "gpu" else min(4, self.chip.chips_per_host)
        return min(whole, math.prod(self.dims)) * self.chip.devices

    def larger(self) -> list[Topology]:
        """Those of the same chip that have more chips, smallest first."""
        shapes = (tuple(map(int, shape.split("x"))) for shape in self.chip.shapes)
        return [Topology(self.chip, dims, self.slices) for dims in shapes if math.prod(dims) > math.prod(self.dims)]


def read_topology(text: str, slices: int = 1) -> Topology:
    """`v5e:4x4`, `v5p:4x4x4`, `h100:16`. Raises UserError for a chip or a shape that is none."""
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise UserError(
            f"--topology {text}: no chip is called {name!r}{suggest(name, CHIPS)}; write CHIP:SHAPE, such as v5e:4x4, "
            f"with one of {', '.join(CHIPS)}"
        )
    chip, sizes = CHIPS[name], shape.split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes) or len(sizes) != max(1, chip.torus_axes):
        raise UserError(
            f"--topology {text}: {shape!r} is no shape of {name}; there are {', '.join(chip.shapes)} "
            f"(v5p:4x4x4 is 64 chips, h100:16 is 16 GPUs)"
        )
    dims = tuple(map(int, sizes))
    if slices < 1 or (slices > 1 and chip.platform != "tpu"):
        raise UserError(f"--slices {slices}: slices are of TPUs, 1 or more; of GPUs name their whole number")
    if chip.platform == "gpu" and dims[0] > chip.chips_per_host and dims[0] % chip.chips_per_host:
        raise UserError(f"--topology {text}: more than one host has {chip.chips_per_host} GPUs each; name a multiple")
    return Topology(chip, dims, slices)
