"""What a compiled program costs on a chip: operations, bytes of main memory, collectives, followed through its loops.

XLA's own `cost_analysis` counts a loop's body once and every branch of a conditional; here a body counts as often as it
turns, and one branch counts. The rules, for each instruction:

    bytes     operands and results in main memory (what lies on the chip is free), padding included; of an operand that
              is only sliced or gathered from, what is read; of one that is updated in place, what is written, twice
    matmul    2 m n k operations, whatever XLA calls the product (dot or convolution); true float32 costs several
              bfloat16 passes
    vector    one operation an element and elementwise instruction; a sort compares in log2 n (log2 n + 1) / 2 stages
    seconds   the longest of: matmul at the chip's peak, vector operations at theirs, bytes at the memory's bandwidth,
              and (TPU) the cycles that the compiler itself estimates

Instructions run one after another, as scheduled. What XLA starts and awaits apart, copies between memories and
collectives, runs beside what stands between start and end; only the rest of it is waited for. Nothing runs faster than
its bytes go through the memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from fac_jax.scale.chips import Chip
from fac_jax.scale.hlo import Computation, Instruction, Module, Shape, replica_groups
from fac_jax.scale.network import Network
from fac_jax.scale.operations import SORT_OPS, convolution_flops, dot_flops, stages, top_k_ops

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
        "opt-barrier", "optimization-barrier", "domain", "add-dependency", "send")  # fmt: skip
COLD_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked", "ConcatBitcast",
              "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "annotate_device_placement")  # fmt: skip
MOVES = ("copy", "reshape", "transpose", "broadcast", "slice", "pad", "concatenate", "iota", "reverse", "gather",
         "dynamic-slice", "dynamic-update-slice", "copy-start", "slice-start", "bitcast-convert")  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What one instruction does, once."""

    matmul: float = 0.0
    """Operations of matmuls."""
    passes: float = 0.0
    """The same, true float32 counted as often as the chip needs for it."""
    vector: float = 0.0
    bytes: float = 0.0
    """Of main memory, read and written."""
    indexed: bool = False
    """Whether it gathers or scatters."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.matmul + other.matmul, self.passes + other.passes, self.vector + other.vector,
            self.bytes + other.bytes, self.indexed or other.indexed,
        )  # fmt: skip


@dataclass(frozen=True)
class Op:
    """An instruction that costs something, and how often it runs."""

    name: str
    opcode: str
    what: str
    """Where it comes from in the traced program."""
    count: float
    work: Work
    seconds: float
    """Of one run, the collective's part included."""
    bound: str
    """What takes the longest: matmul, vector, memory or network."""
    floor_s: float = 0.0
    """Of its matmuls, or of its gather or scatter: at the chip's peak."""
    collective: Collective | None = None

    @property
    def total_s(self) -> float:
        """Of all runs."""
        return self.count * self.seconds


@dataclass(frozen=True)
class Collective:
    """What an instruction exchanges."""

    kind: str
    bytes: float
    """The larger of what one device gives and gets."""
    group: int
    """Devices that exchange it."""
    seconds: float


@dataclass
class Cost:
    """Of a computation, or a program."""

    ops: list[Op] = field(default_factory=list)
    seconds: float = 0.0
    waited_s: float = 0.0
    """Of the seconds: waiting for copies and collectives that nothing hides."""
    unknown_loops: list[str] = field(default_factory=list)
    """Loops whose turns are not known; counted once."""

    def sum(self, value: Callable[[Op], float]) -> float:
        """Of a value of one run, over all runs."""
        return sum(op.count * value(op) for op in self.ops)

    @property
    def floor_s(self) -> float:
        """Of all matmuls, gathers and scatters, each at the chip's peak: no program that does them takes less."""
        return self.sum(lambda op: op.floor_s)

    @property
    def floor_side(self) -> str:
        """What bounds most of that: matmul or memory."""
        by_matmul = self.sum(lambda op: op.floor_s if op.bound == "matmul" else 0.0)
        return "matmul" if 2 * by_matmul >= self.floor_s else "memory"

    @property
    def network_s(self) -> float:
        """Of all collectives, hidden or not."""
        return self.sum(lambda op: op.collective.seconds if op.collective else 0.0)

    def times(self, count: int) -> Cost:
        """Of so many runs."""
        ops = [replace(op, count=op.count * count) for op in self.ops]
        return Cost(ops, self.seconds * count, self.waited_s * count, self.unknown_loops)


Pick = Callable[[Instruction, bool, Sequence[Cost]], int]
"""Which branch of a conditional counts: the instruction, whether it stands in the entry itself, and what each costs."""


def cheapest(conditional: Instruction, outermost: bool, costs: Sequence[Cost]) -> int:
    """The branch that takes least."""
    return min(range(len(costs)), key=lambda index: costs[index].seconds)


def dearest(conditional: Instruction, outermost: bool, costs: Sequence[Cost]) -> int:
    """The branch that takes most."""
    return max(range(len(costs)), key=lambda index: costs[index].seconds)


def program_cost(module: Module, chip: Chip, network: Network | None, pick: Pick = cheapest) -> Cost:
    """Of one run of a program on one device; `chip` gives the figures of a device.

    Raises ValueError for a collective whose form is not understood.
    """
    return _Costing(module, chip, network, pick).of(module.entry, outermost=True)


@dataclass
class _Costing:
    module: Module
    chip: Chip
    network: Network | None
    pick: Pick

    def of(self, computation: Computation, outermost: bool = False) -> Cost:
        """A computation's instructions in their order, on a clock."""
        total = Cost()
        clock, ends = 0.0, dict.fromkeys(("memory", "network"), 0.0)
        pending: dict[str, float] = {}
        for one in computation:
            kind, half = _base(one.opcode)
            if half == "done":
                end = pending.get(one.operands[0], clock) if one.operands else clock
                total.waited_s += max(0.0, end - clock)
                clock = max(clock, end)
                continue
            if half == "update" or one.opcode in FREE:
                continue
            if one.opcode == "recv":  # a TPU's slices exchange through their hosts: sent here, awaited at recv-done
                kind, half = _between_slices(one), "start"
            if one.opcode in ("while", "conditional", "call"):
                part = self._nested(one, computation, outermost)
                total.ops += part.ops
                total.waited_s += part.waited_s
                total.unknown_loops += part.unknown_loops
                clock += part.seconds
                continue
            # A TPU starts, feeds and awaits some collectives in three fusions, and computes in the second.
            fused = self._fused_collective(one)
            if fused and (key := _channel(fused)) in pending:
                if one.name.startswith("async-collective-done"):
                    end = pending.pop(key)
                    total.waited_s += max(0.0, end - clock)
                    clock = max(clock, end)
                    continue
                fused = None
            elif fused and one.name.startswith("async-collective-start"):
                half = "start"
            op = self._op(one, computation, kind, fused)
            if op is None:
                continue
            total.ops.append(op)
            if half == "start":
                channel = "network" if op.collective else "memory"
                ends[channel] = max(ends[channel], clock) + op.seconds
                pending[_channel(fused) if fused else one.name] = ends[channel]
            else:
                clock += op.seconds
                if op.collective:
                    total.waited_s += max(0.0, op.seconds - _seconds(op.work, self.chip, 0)[0])
        through_memory = total.sum(lambda op: op.work.bytes) / self.chip.memory_bandwidth
        total.waited_s += max(0.0, through_memory - clock)
        total.seconds = max(clock, through_memory)
        return total

    def _nested(self, one: Instruction, computation: Computation, outermost: bool) -> Cost:
        if one.opcode == "call":
            return self.of(self.module.called(one, "to_apply"), outermost)
        if one.opcode == "conditional":
            costs = [self.of(self.module.computations[name]) for name in one.branches]
            return costs[self.pick(one, outermost, costs)]
        turns = self.module.trip_count(one, computation)
        cost = self.of(self.module.called(one, "body")).times(1 if turns is None else turns)
        if turns is None:
            cost.unknown_loops = [*cost.unknown_loops, one.name]
        return cost

    def _op(self, one: Instruction, computation: Computation, kind: str, fused: Instruction | None) -> Op | None:
        work = self._work(one, computation)
        collective = self._collective(fused, _base(fused.opcode)[0]) if fused else self._collective(one, kind)
        seconds, bound = _seconds(work, self.chip, one.estimated_cycles)
        if not seconds and collective is None:
            return None
        floor = 0.0
        if work.matmul or work.indexed:
            floor = max(work.passes / self.chip.matmul_flops, work.bytes / self.chip.memory_bandwidth)
        if collective and collective.seconds > seconds:
            seconds, bound = collective.seconds, "network"
        return Op(one.name, kind, one.what, 1.0, work, seconds, bound, floor, collective)

    def _fused_collective(self, one: Instruction) -> Instruction | None:
        """The collective inside a fusion that computes while it exchanges, or inside an asynchronous call."""
        if one.opcode not in ("fusion", "async-start") or "calls" not in one.called:
            return None
        inside = self.module.called(one, "calls")
        bases = ((_base(other.opcode), other) for other in inside)
        return next((other for base, other in bases if base[0] in COLLECTIVES and base[1] != "done"), None)

    def _collective(self, one: Instruction, kind: str) -> Collective | None:
        if kind not in COLLECTIVES:
            return None
        if one.opcode == "recv":
            size, slices = float(one.shape.bytes), self.network.topology.slices if self.network else 1
            return Collective(kind, size, slices, self.network.between_slices(kind, size) if self.network else 0.0)
        members = len(self.network.places) if self.network else 1
        group = max(replica_groups(one, members), key=len, default=[0])
        size = float(_exchanged(one, kind))
        seconds = self.network.seconds(kind, size, group) if self.network else 0.0
        return Collective(kind, size, len(group), seconds)

    def _work(self, one: Instruction, computation: Computation) -> Work:
        if one.opcode == "fusion":
            return self._fusion(one, computation)
        if _base(one.opcode)[0] in COLLECTIVES:
            touched = sum(_of(computation, name) for name in one.operands) + _main(one.shapes)
            return Work(bytes=0.0 if one.opcode.endswith("-start") else float(touched))
        if one.opcode == "recv":
            return Work(bytes=2.0 * one.shape.bytes)
        if one.opcode in ("copy-start", "slice-start"):
            moved = one.shapes[one.opcode == "slice-start"]  # (to, from, token), or ((from), to, token)
            source = computation.operand(one, 0).shape
            return Work(bytes=float(moved.bytes * ((source.space == 0) + (moved.space == 0))))
        if one.opcode == "custom-call" and one.target in COLD_CALLS:
            return Work()
        inner = self._inner(one, computation)
        reads = {index: _of(computation, name) for index, name in enumerate(one.operands)}
        special = _indexed_bytes(one, computation)
        if special is not None:
            return replace(inner, bytes=float(special), indexed=one.opcode in ("gather", "scatter"))
        return replace(inner, bytes=float(sum(reads.values()) + _main(one.shapes)))

    def _fusion(self, one: Instruction, computation: Computation) -> Work:
        called = self.module.called(one, "calls")
        inner = self._inside(called)
        total = 0.0
        for parameter in called.parameters:
            index = int(parameter.argument)
            if index < len(one.operands):
                source = computation.operand(one, index)
                if source.shape.space == 0 and source.opcode != "constant" or source.shape.bytes > 2**16:
                    total += min(self._read(called, parameter), source.shape.main_bytes or math.inf)
        roots = [called.root]
        if called.root.opcode == "tuple":
            roots = [called.operand(called.root, index) for index in range(len(called.root.operands))]
        for root, shape in zip(roots, one.shapes, strict=False):
            if shape.space == 0:
                total += self._written(called, root, shape)
        return replace(inner, bytes=total)

    def _read(self, computation: Computation, one: Instruction) -> float:
        """Bytes of a fusion's parameter that are read: slices of it, where all that is read of it is slices."""
        if one.shape.space:
            return 0.0
        total = 0.0
        for user in computation.users[one.name]:
            where = user.operands.index(one.name)
            if user.opcode in ("dynamic-slice", "slice", "gather") and where == 0:
                total += user.shape.bytes
            elif user.opcode in ("dynamic-update-slice", "scatter") and where == 0:
                total += 0.0  # counted where it is written
            elif user.opcode in ("bitcast", "get-tuple-element"):
                total += self._read(computation, user)
            elif user.opcode == "fusion":
                called = self.module.called(user, "calls")
                total += self._read(called, called.parameters[where])
            else:
                return float(one.shape.bytes)
        return min(total, float(one.shape.bytes))

    def _written(self, computation: Computation, root: Instruction, shape: Shape) -> float:
        while root.opcode in ("bitcast", "reshape", "copy", "convert") and root.operands:
            root = computation.operand(root, 0)
        if root.opcode == "fusion":
            called = self.module.called(root, "calls")
            if called.root.opcode != "tuple":
                return self._written(called, called.root, shape)
        if root.opcode == "dynamic-update-slice":
            return min(2.0 * computation.operand(root, 1).shape.bytes, 2.0 * shape.bytes)
        if root.opcode == "scatter":
            return 2.0 * computation.operand(root, len(root.operands) - 1).shape.bytes
        return float(shape.bytes)

    def _inside(self, computation: Computation) -> Work:
        """Operations of a fused computation; its bytes are those of the fusion."""
        total = Work()
        for one in computation:
            if one.opcode == "fusion":
                total += replace(self._inside(self.module.called(one, "calls")), bytes=0.0)
            elif one.opcode not in FREE:
                inner = self._inner(one, computation)
                total += replace(inner, indexed=one.opcode in ("gather", "scatter"))
        return total

    def _inner(self, one: Instruction, computation: Computation) -> Work:
        """Operations of one instruction that is no fusion."""
        if one.opcode in ("dot", "convolution"):
            flops = dot_flops(one, computation) if one.opcode == "dot" else convolution_flops(one, computation)
            exact = (
                "highest" in one.attributes.split("metadata=")[0] and computation.operand(one, 0).shape.dtype == "f32"
            )
            return Work(matmul=flops, passes=flops * (self.chip.float32_slowdown if exact else 1))
        if one.opcode == "sort":
            axis = (one.numbers("dimensions") or (len(one.shape.dims) - 1,))[0]
            return Work(vector=one.shape.elements * SORT_OPS * stages(one.shape.dims[axis]))
        if one.opcode == "custom-call":
            if one.target == "TopK":
                return Work(vector=top_k_ops(computation.operand(one, 0).shape, one.shape.dims[-1]))
            return Work()
        if one.opcode in ("reduce", "reduce-window"):
            return Work(vector=float(computation.operand(one, 0).shape.elements))
        if one.opcode == "scatter":
            return Work(vector=float(computation.operand(one, len(one.operands) - 1).shape.elements))
        if one.opcode in MOVES or one.opcode in FREE or _base(one.opcode)[0] in COLLECTIVES:
            return Work()
        return Work(vector=float(one.shape.elements))


def _seconds(work: Work, chip: Chip, cycles: int) -> tuple[float, str]:
    """Of one run without its collective, and which side takes that long."""
    sides = {
        "matmul": work.passes / chip.matmul_flops,
        "vector": work.vector / chip.vector_ops,
        "memory": work.bytes / chip.memory_bandwidth,
    }
    bound = max(sides, key=lambda side: sides[side])
    estimated = cycles / chip.clock_hz if chip.clock_hz else 0.0
    return max(sides[bound], estimated), bound


def _base(opcode: str) -> tuple[str, str]:
    """`all-gather-start` as (all-gather, start); the second is empty for what is no half."""
    for half in ("start", "done", "update"):
        if opcode.endswith(f"-{half}") and opcode != "dynamic-update":
            return opcode.removesuffix(f"-{half}"), half
    return opcode, ""


def _channel(one: Instruction) -> str:
    """Which collective a fusion's part belongs to."""
    chain = one.attributes.partition('chain_id="')[2].partition('"')[0]
    return f"channel {one.text('channel_id')} chain {chain}"


def _between_slices(one: Instruction) -> str:
    """The collective that a `recv` through the hosts is a part of."""
    found = one.attributes.partition('_xla_megascale_transfer_type="')[2].partition('"')[0]
    return found.lower().replace("_", "-") or "collective-permute"


def _exchanged(one: Instruction, kind: str) -> int:
    """Bytes of a collective on the larger side: of the result, or of what is reduced and scattered."""
    shapes = one.shapes
    if one.opcode.endswith("-start") and len(shapes) > 1:  # (operands, results[, context])
        shapes = tuple(shape for shape in shapes if shape.dtype not in ("u32", "token") or shape.dims)
        half = len(shapes) // 2
        if kind != "all-reduce" and half:
            return max(sum(s.bytes for s in shapes[:half]), sum(s.bytes for s in shapes[half:]))
    size = sum(shape.bytes for shape in shapes)
    if kind == "reduce-scatter":
        groups = replica_groups(one, 1)
        return size * max(len(group) for group in groups)
    return size


def _of(computation: Computation, name: str) -> int:
    """Bytes in main memory of an operand."""
    one = computation.instructions[name]
    return _main(one.shapes)


def _main(shapes: Sequence[Shape]) -> int:
    return sum(shape.main_bytes for shape in shapes)


def _indexed_bytes(one: Instruction, computation: Computation) -> int | None:
    """Bytes of an instruction that reads or writes a part of its first operand; None for all others."""
    rest = sum(_of(computation, name) for name in one.operands[1:])
    in_memory = bool(one.operands) and computation.operand(one, 0).shape.space == 0
    if one.opcode in ("gather", "dynamic-slice", "slice"):
        return one.shape.bytes * in_memory + one.shape.main_bytes + (rest if one.opcode == "gather" else 0)
    if one.opcode == "dynamic-update-slice":
        update = computation.operand(one, 1).shape
        return update.main_bytes + update.bytes * (one.shape.space == 0)
    if one.opcode == "scatter":
        update = computation.operand(one, len(one.operands) - 1).shape
        return rest + 2 * update.bytes * (one.shape.space == 0)
    return None
