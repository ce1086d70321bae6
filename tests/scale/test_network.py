"""Topologies by name, and what a collective takes between their devices."""

from __future__ import annotations

import pytest

from fac_jax.errors import UserError
from fac_jax.scale.chips import CHIPS, read_topology
from fac_jax.scale.devices import Machine
from fac_jax.scale.network import HOP_S, Network, Place


def network(name: str, slices: int = 1) -> Network:
    topology = read_topology(name, slices)
    import numpy as np

    class Mesh:
        devices = np.empty(topology.devices)
        size = topology.devices

    return Machine(topology, (), real=False).network(Mesh())  # type: ignore[arg-type]


def test_topologies_are_read() -> None:
    assert read_topology("v5e:16x16").chips == 256 and read_topology("v5e:4x4", 2).chips == 32
    assert read_topology("v5p:4x4x4").devices == 64 and read_topology("tpu7x:2x2x1").devices == 8
    assert read_topology("h100:16").devices_per_host == 8 and read_topology("v5e:4x4").devices_per_host == 4
    assert [one.name for one in read_topology("v5e:4x8").larger()] == ["v5e:8x8", "v5e:8x16", "v5e:16x16"]
    assert read_topology("tpu7x:2x2x1").chip.device.matmul_flops * 2 == CHIPS["tpu7x"].matmul_flops


@pytest.mark.parametrize(
    ("text", "slices", "says"),
    [
        ("v5x:4x4", 1, "did you mean"),
        ("v5e:4", 1, "no shape of v5e"),
        ("v5p:4x4", 1, "no shape of v5p"),
        ("", 1, "write CHIP:SHAPE"),
        ("h100:12", 1, "name a multiple"),
        ("h100:8", 2, "slices are of TPUs"),
    ],
)
def test_what_is_no_topology_is_refused(text: str, slices: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_topology(text, slices)


def test_a_line_uses_one_link_and_a_ring_both() -> None:
    line, ring = network("v5e:4x4"), network("v5e:16x16")
    assert line.seconds("all-gather", 4e8, [0, 1, 2, 3]) == pytest.approx(4e8 * 3 / 4 / 50e9 + 3 * HOP_S)
    row = list(range(16))
    assert ring.seconds("all-gather", 4e8, row) == pytest.approx(4e8 * 15 / 16 / 100e9 + 8 * HOP_S)
    assert ring.seconds("all-reduce", 4e8, row) == pytest.approx(2 * ring.seconds("all-gather", 4e8, row))
    assert ring.seconds("all-gather", 4e8, list(range(256))) < ring.seconds("all-gather", 4e8, row) * 0.6


def test_groups_that_interleave_share_their_links() -> None:
    near, far = (network("v5e:16x16").seconds("all-gather", 4e8, group) for group in ([0, 1, 2, 3], [0, 4, 8, 12]))
    assert far > 1.9 * near


def test_one_device_exchanges_nothing() -> None:
    assert network("v5e:4x4").seconds("all-reduce", 1e9, [3]) == 0


def test_slices_exchange_their_share_over_the_slower_network() -> None:
    two = network("v5e:4x4", slices=2)
    group = [0, 1, 2, 3, 16, 17, 18, 19]
    inside = two.seconds("all-reduce", 4e8, group[:4])
    assert two.seconds("all-reduce", 4e8, group) == pytest.approx(inside + 2 * (1e8 / 2 / 3.1e9 + 20 * HOP_S))


def test_gpus_share_a_switch_and_hosts_a_network() -> None:
    one, two = network("h100:8"), network("h100:16")
    assert one.seconds("all-gather", 8e8, list(range(8))) == pytest.approx(7e8 / 450e9 + 8 * HOP_S)
    assert two.seconds("all-gather", 16e8, list(range(16))) == pytest.approx(15e8 / 400e9 + 20 * HOP_S)
    assert two.seconds("all-gather", 2e8, [0, 8]) == pytest.approx(1e8 / 50e9 + 20 * HOP_S)


def test_two_devices_of_one_chip_have_no_link_between_them() -> None:
    topology = read_topology("tpu7x:2x2x1")
    chip = Network(topology, (Place((0, 0, 0), 0), Place((0, 0, 0), 0)))
    assert chip.seconds("all-gather", 1e9, [0, 1]) < 1e-4
