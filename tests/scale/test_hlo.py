"""HLO text as data: shapes in memory, loops, groups; against XLA's own programs and hand-written lines."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fac_jax.scale.hlo import Instruction, parse, read_shapes, replica_groups

TEXT = """HloModule tiny, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: bf16[100,20]) -> (bf16[100,20], f32[]) {
  %x = bf16[100,20]{1,0:T(8,128)(2,1)} parameter(0), sharding={replicated}
  %zero = f32[]{:T(128)S(1)} constant(0)
  %all-gather.1 = bf16[100,80]{1,0:T(8,128)S(1)} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}, \
dimensions={1}, metadata={op_name="jit(step)/all_gather"}
  ROOT %both = (bf16[100,20]{1,0:T(8,128)(2,1)}, /*index=1*/f32[]{:T(128)S(1)}) tuple(%x, %zero)
}
"""


def test_shapes_carry_the_padding_of_their_tiles_and_the_memory_they_lie_in() -> None:
    shape = read_shapes("f32[2048,10]{1,0:T(8,128)S(1)}")[0]
    assert (shape.dims, shape.elements, shape.bytes, shape.main_bytes) == ((2048, 10), 20480, 2048 * 128 * 4, 0)
    other_way = read_shapes("f32[2048,10]{0,1:T(8,128)}")[0]
    assert other_way.bytes == other_way.main_bytes == 2048 * 16 * 4
    assert [s.bytes for s in read_shapes("(f32[3]{0}, (pred[5]{0}, s4[4]{0}), token[])")] == [12, 5, 2, 0]
    assert read_shapes("f32[<=8,2]{1,0}")[0].dims == (8, 2)


def test_a_program_is_read_line_by_line() -> None:
    module = parse(TEXT)
    assert list(module.computations) == ["add", "main"] and module.entry.name == "main"
    gather = module.entry.instructions["all-gather.1"]
    assert (gather.opcode, gather.operands, gather.what) == ("all-gather", ("x",), "jit(step)/all_gather")
    assert module.entry.root.opcode == "tuple" and len(module.entry.root.shapes) == 2
    assert [one.name for one in module.entry.users["x"]] == ["all-gather.1", "both"]
    assert module.entry.instructions["zero"].argument == "0"
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("nothing")


@pytest.mark.parametrize("turns", [1, 7, 100])  # XLA unrolls a loop of one turn
def test_turns_of_a_scan_and_of_a_loop_that_counts_down(turns: int) -> None:
    def up(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=turns)[0]

    def by_three(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda s: s[0] < 3 * turns, lambda s: (s[0] + 3, s[1] @ s[1]), (0, x))[1]

    for function in (up, by_three):
        module = parse(jax.jit(function).lower(jnp.zeros((8, 8))).compile().as_text())
        loops = [(one, c) for c in module.computations.values() for one in c if one.opcode == "while"]
        assert [module.trip_count(*loop) for loop in loops] == ([turns] if turns > 1 else [])


def test_a_loop_that_ends_when_it_ends_has_no_number_of_turns() -> None:
    def until(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x * 2, x)

    module = parse(jax.jit(until).lower(jnp.ones(8)).compile().as_text())
    loops = [(one, c) for c in module.computations.values() for one in c if one.opcode == "while"]
    assert [module.trip_count(*loop) for loop in loops] == [None]


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=[2,3]<=[3,2]T(1,0)", [[0, 2, 4], [1, 3, 5]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ],
)
def test_groups_in_every_form_that_xla_writes(written: str, groups: list[list[int]]) -> None:
    one = Instruction("r", "all-reduce", read_shapes("f32[4]"), ("x",), f", {written}, use_global_device_ids=true")
    assert replica_groups(one, 4) == groups


def test_groups_that_are_not_understood_are_an_error() -> None:
    one = Instruction("r", "all-reduce", read_shapes("f32[4]"), ("x",), ", replica_groups=[?], x=1")
    with pytest.raises(ValueError, match="unknown form"):
        replica_groups(one, 4)


def test_groups_of_a_real_program_are_the_rows_of_its_mesh(mesh_2x4: jax.sharding.Mesh) -> None:
    P = jax.sharding.PartitionSpec

    def core(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, "feature") + jnp.sum(jax.lax.all_gather(x, "data"))

    function = jax.shard_map(
        core, mesh=mesh_2x4, in_specs=P("data", "feature"), out_specs=P("data", None), check_vma=False
    )
    x = jax.ShapeDtypeStruct((8, 16), np.float32, sharding=jax.NamedSharding(mesh_2x4, P("data", "feature")))
    module = parse(jax.jit(function).lower(x).compile().as_text())
    found = {
        one.opcode.removesuffix("-start"): replica_groups(one, 8)
        for computation in module.computations.values()
        for one in computation
        if one.opcode.startswith(("all-reduce", "all-gather")) and not one.opcode.endswith("done")
    }
    assert found["all-reduce"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found["all-gather"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
