"""The model of costs against matmuls counted by hand, XLA's own analysis where it is right, and written programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fac_jax.scale.chips import CHIPS, read_topology
from fac_jax.scale.cost import Cost, cheapest, dearest, program_cost
from fac_jax.scale.devices import Machine
from fac_jax.scale.hlo import parse
from fac_jax.scale.network import Network, Place

CHIP = CHIPS["v5e"].device
P = jax.sharding.PartitionSpec


def compiled(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Any:
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


def cost_of(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Cost:
    return program_cost(parse(compiled(function, *shapes).as_text()), CHIP, None)


def written(body: str, signature: str = "(x: f32[8]) -> f32[8]", others: str = "") -> Cost:
    return program_cost(parse(f"HloModule m\n{others}\nENTRY %main {signature} {{\n{body}\n}}\n"), CHIP, None)


def flops(cost: Cost) -> float:
    return cost.sum(lambda op: op.work.matmul)


def bytes_of(cost: Cost) -> float:
    return cost.sum(lambda op: op.work.bytes)


def test_a_matmul_is_2mnk() -> None:
    program = compiled(lambda a, b: a @ b, (64, 128), (128, 256))
    cost = program_cost(parse(program.as_text()), CHIP, None)
    assert flops(cost) == 2 * 64 * 128 * 256 == program.cost_analysis()["flops"]
    assert bytes_of(cost) >= 4 * (64 * 128 + 128 * 256 + 64 * 256)
    assert cost.floor_s <= cost.seconds


def test_a_batched_matmul_counts_every_batch() -> None:
    assert (
        flops(cost_of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (5, 16, 32), (5, 32, 24))) == 2 * 5 * 16 * 32 * 24
    )


@pytest.mark.parametrize("turns", [2, 13])
def test_a_scanned_matmul_counts_as_often_as_it_turns(turns: int) -> None:
    def scanned(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=turns)[0]

    cost = cost_of(scanned, (32, 32))
    assert flops(cost) == turns * 2 * 32**3 and not cost.unknown_loops


def test_loops_in_loops_multiply() -> None:
    def inner(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda _, c: jnp.sin(c @ c), x)

    def outer(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (inner(c), None), x, None, length=5)[0]

    assert flops(cost_of(outer, (16, 16))) == 15 * 2 * 16**3


def test_one_branch_of_a_conditional_counts() -> None:
    def either(x: jax.Array, which: jax.Array) -> jax.Array:
        return jax.lax.switch(which.astype(jnp.int32), [lambda x: x + 1, lambda x: x @ x, lambda x: x @ x @ x], x)

    text = compiled(either, (256, 256), ()).as_text()
    found = [flops(program_cost(parse(text), CHIP, None, pick)) for pick in (cheapest, dearest, lambda *_: 1)]
    assert found == [0, 4 * 256**3, 2 * 256**3]


def test_elementwise_programs_agree_with_xla() -> None:
    program = compiled(lambda a, b: jnp.maximum(a * b + 1, 0), (128, 512), (128, 512))
    cost = program_cost(parse(program.as_text()), CHIP, None)
    assert bytes_of(cost) == 3 * 4 * 128 * 512 == program.cost_analysis()["bytes accessed"]
    assert cost.sum(lambda op: op.work.vector) == program.cost_analysis()["flops"] == 3 * 128 * 512


def test_a_gather_reads_only_the_rows_it_takes() -> None:
    cost = cost_of(lambda w, i: w[i.astype(jnp.int32)], (100_000, 64), (10,))
    assert 2 * 10 * 64 * 4 <= bytes_of(cost) < 5 * 10 * 64 * 4
    assert cost.floor_s > 0


def test_an_update_in_place_writes_only_what_it_updates() -> None:
    body = """
  %x = f32[1000,64]{1,0} parameter(0)
  %row = f32[1,64]{1,0} parameter(1)
  %at = s32[]{:S(1)} parameter(2)
  ROOT %new = f32[1000,64]{1,0} dynamic-update-slice(%x, %row, %at, %at)"""
    assert bytes_of(written(body)) == 2 * 64 * 4


def test_a_fused_gather_and_a_fused_scatter_touch_rows_only() -> None:
    others = """
%rows (w: f32[1000,64], i: s32[10]) -> f32[10,64] {
  %w = f32[1000,64]{1,0} parameter(0)
  %i = s32[10]{0} parameter(1)
  ROOT %g = f32[10,64]{1,0} gather(%w, %i), offset_dims={1}, collapsed_slice_dims={0}
}
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}
%put (w2: f32[1000,64], i2: s32[10], u: f32[10,64]) -> f32[1000,64] {
  %w2 = f32[1000,64]{1,0} parameter(0)
  %i2 = s32[10]{0} parameter(1)
  %u = f32[10,64]{1,0} parameter(2)
  ROOT %sc = f32[1000,64]{1,0} scatter(%w2, %i2, %u), update_window_dims={1}, to_apply=%add
}"""
    body = """
  %x = f32[1000,64]{1,0} parameter(0)
  %j = s32[10]{0} parameter(1)
  %taken = f32[10,64]{1,0} fusion(%x, %j), kind=kCustom, calls=%rows
  ROOT %out = f32[1000,64]{1,0} fusion(%x, %j, %taken), kind=kCustom, calls=%put"""
    row, index = 10 * 64 * 4, 10 * 4
    cost = written(body, others=others)
    assert [op.work.bytes for op in cost.ops] == [2 * row + index, 3 * row + index]
    assert all(op.work.indexed and op.floor_s > 0 for op in cost.ops)


def test_what_lies_on_the_chip_costs_no_memory() -> None:
    body = """
  %x = f32[1000,64]{1,0:S(1)} parameter(0)
  ROOT %y = f32[1000,64]{1,0:S(1)} add(%x, %x)"""
    cost = written(body)
    assert bytes_of(cost) == 0 and cost.seconds == 64_000 / CHIP.vector_ops


def test_true_float32_takes_six_passes() -> None:
    def exact(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

    one, six = (cost_of(f, (64, 64), (64, 64)) for f in (jnp.matmul, exact))
    assert six.sum(lambda op: op.work.passes) == 6 * one.sum(lambda op: op.work.passes)


def test_the_compilers_estimate_is_taken_where_it_is_longer() -> None:
    body = """
  %x = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} add(%x, %x), backend_config={"window_config":{"estimated_cycles":"1500000"}}"""
    assert written(body).seconds == pytest.approx(1e-3)


def test_a_tpu_writes_a_batched_matmul_as_a_convolution_that_meets_padding() -> None:
    body = """
  %a = f32[8,128,64]{2,1,0} parameter(0)
  %b = f32[8,64,32]{2,1,0} parameter(1)
  ROOT %c = f32[8,128,32]{2,1,0} convolution(%a, %b), window={size=8 stride=7 pad=0_0 lhs_dilate=8}, \
dim_labels=0bf_0io->0bf"""
    assert flops(written(body)) == 2 * 8 * 128 * 64 * 32


def test_a_plain_convolution_counts_what_is_no_padding() -> None:
    def convolved(x: jax.Array, k: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, k, (1, 1), [(1, 1), (1, 1)])

    body = """
  %a = f32[1,1,4,4]{3,2,1,0} parameter(0)
  %b = f32[1,1,3,3]{3,2,1,0} parameter(1)
  ROOT %c = f32[1,1,4,4]{3,2,1,0} convolution(%a, %b), window={size=3x3 pad=1_1x1_1}, dim_labels=bf01_oi01->bf01"""
    expected = compiled(convolved, (1, 1, 4, 4), (1, 1, 3, 3)).cost_analysis()["flops"]
    assert flops(written(body)) == expected == 2 * 100


def test_a_copy_that_is_awaited_later_hides_behind_what_stands_between() -> None:
    def around(between: str) -> Cost:
        return written(f"""
  %x = f32[1000000]{{0}} parameter(0)
  %v = f32[100000]{{0:S(1)}} parameter(1)
  %start = (f32[1000000]{{0:S(1)}}, f32[1000000]{{0}}, u32[]{{:S(2)}}) copy-start(%x)
  {between}
  %done = f32[1000000]{{0:S(1)}} copy-done(%start)
  ROOT %y = f32[1000000]{{0:S(1)}} negate(%done)""")

    alone = around("")
    busy = around('%w = f32[100000]{0:S(1)} add(%v, %v), backend_config={"estimated_cycles":"1500000"}')
    move, negate = 4e6 / CHIP.memory_bandwidth, 1e6 / CHIP.vector_ops
    assert alone.seconds == pytest.approx(move + negate) and alone.waited_s == pytest.approx(move)
    assert busy.seconds == pytest.approx(1e-3 + negate) and busy.waited_s == 0


def test_collectives_of_a_real_program(mesh_2x4: jax.sharding.Mesh) -> None:
    def core(x: jax.Array) -> jax.Array:
        everywhere = jax.lax.psum(x, "feature")
        return everywhere + jnp.sum(jax.lax.all_gather(x, "data", tiled=True) @ jnp.ones((4, 4)))

    function = jax.shard_map(
        core, mesh=mesh_2x4, in_specs=P("data", "feature"), out_specs=P("data", None), check_vma=False
    )
    x = jax.ShapeDtypeStruct((8, 16), np.float32, sharding=jax.NamedSharding(mesh_2x4, P("data", "feature")))
    text = jax.jit(function).lower(x).compile().as_text()
    topology = read_topology("v5e:2x4")
    network = Machine(topology, tuple(mesh_2x4.devices.flat), real=False).network(mesh_2x4)
    found = {op.collective.kind: op.collective for op in program_cost(parse(text), CHIP, network).ops if op.collective}
    assert (found["all-reduce"].bytes, found["all-reduce"].group) == (4 * 4 * 4, 4)
    assert (found["all-gather"].bytes, found["all-gather"].group) == (2 * 4 * 4 * 4, 2)
    assert all(one.seconds > 0 for one in found.values())


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("%r = f32[10]{0} reduce-scatter(%x), replica_groups={{0,1,2,3}}, to_apply=%add", 160),
        ("%r = f32[40]{0} all-gather(%x), replica_groups={{0,1,2,3}}", 160),
        ("%r = (f32[10]{0}, f32[40]{0}) all-gather-start(%x), replica_groups={{0,1,2,3}}", 160),
        ("%r = f32[10]{0} all-reduce-start(%x), replica_groups={{0,1,2,3}}, to_apply=%add", 40),
        ("%r = f32[10]{0} all-to-all(%x), replica_groups={{0,1,2,3}}", 40),
        (
            "%r = (f32[10]{0}, f32[10]{0}, u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}",
            40,
        ),
    ],
)
def test_bytes_of_a_collective_are_those_of_its_larger_side(line: str, size: int) -> None:
    cost = written(f"  %x = f32[10]{{0}} parameter(0)\n  {line}")
    assert [op.collective.bytes for op in cost.ops if op.collective] == [size]


def test_slices_exchange_through_their_hosts() -> None:
    attributes = 'channel_id=2, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}'
    body = f"""
  %x = f32[1000000]{{0}} parameter(0)
  %token = token[] after-all()
  %send = (f32[1000000]{{0}}, u32[], token[]) send(%x, %token), {attributes}
  %recv = (f32[1000000]{{0}}, u32[], token[]) recv(%token), {attributes}
  %done = (f32[1000000]{{0}}, token[]) recv-done(%recv), channel_id=2
  %sent = token[] send-done(%send), channel_id=2
  ROOT %y = f32[1000000]{{0}} get-tuple-element(%done), index=0"""
    topology = read_topology("v5e:2x2", 2)
    network = Network(topology, tuple(Place((0, 0), 0, part) for part in (0, 1)))
    module = parse(f"HloModule m\n\nENTRY %main (x: f32[8]) -> f32[8] {{{body}\n}}\n")
    cost = program_cost(module, CHIP, network)
    found = [op.collective for op in cost.ops if op.collective]
    assert [(one.kind, one.bytes, one.group) for one in found] == [("all-reduce", 4e6, 2)]
    assert cost.seconds == cost.waited_s == pytest.approx(2 * (4e6 / 2 / 3.1e9 + 20e-6))


def test_a_collective_in_three_fusions_counts_once_and_hides_behind_the_second() -> None:
    def gather(name: str) -> str:
        return f"""
%{name} (p{name}: f32[1000]) -> f32[4000] {{
  %p{name} = f32[1000]{{0:S(1)}} parameter(0)
  ROOT %g{name} = f32[4000]{{0:S(1)}} all-gather(%p{name}), channel_id=2, replica_groups={{{{0,1,2,3}}}}, \
frontend_attributes={{chain_id="0"}}
}}"""

    body = """
  %x = f32[1000]{0:S(1)} parameter(0)
  %async-collective-start = f32[4000]{0:S(1)} fusion(%x), kind=kCustom, calls=%a
  %busy = f32[4000]{0:S(1)} fusion(%x), kind=kCustom, calls=%b, backend_config={"estimated_cycles":"1500000"}
  ROOT %async-collective-done = f32[4000]{0:S(1)} fusion(%x), kind=kCustom, calls=%c"""
    network = Network(read_topology("v5e:2x2"), tuple(Place((i // 2, i % 2), 0) for i in range(4)))
    text = f"HloModule m\n{''.join(map(gather, 'abc'))}\n\nENTRY %main (x: f32[8]) -> f32[8] {{{body}\n}}\n"
    cost = program_cost(parse(text.replace("\\\n", "")), CHIP, network)
    assert [op.collective.bytes for op in cost.ops if op.collective] == [16_000]
    assert cost.seconds == pytest.approx(1e-3) and cost.waited_s == 0 and cost.network_s > 0


def test_sorts_and_top_k_are_counted() -> None:
    cost = cost_of(lambda x: jax.lax.top_k(x, 20)[0] + jnp.sort(x, axis=1)[:, :20], (16, 4096))
    assert cost.sum(lambda op: op.work.vector) > 16 * 4096 * 78
