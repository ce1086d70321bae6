"""What a compiled program costs on a chip: its instructions' work, followed through its loops and on a clock.

XLA's own `cost_analysis` counts a loop's body once and every branch of a conditional; here a body counts as often as it
turns, and one branch counts. An instruction takes the longest of: matmul at the chip's peak, vector operations at
theirs, bytes at the memory's bandwidth (work.py says how they are counted), and (TPU) the cycles that the compiler
itself estimates.

Instructions run one after another, as scheduled. What XLA starts and awaits apart, copies between memories and
collectives, runs beside what stands between start and end; only the rest of it is waited for. Nothing runs faster than
its bytes go through the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from fac_jax.scale.chips import Chip
from fac_jax.scale.hlo import Computation, Instruction, Module, replica_groups
from fac_jax.scale.network import Network
from fac_jax.scale.work import COLLECTIVES, FREE, Counter, Work, kind_and_half


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
class _Clock:
    """When what runs one after another ends, and what was started beside it."""

    now: float = 0.0
    waited_s: float = 0.0
    _free_at: dict[str, float] = field(default_factory=lambda: {"memory": 0.0, "network": 0.0})
    """What is started goes one after another too, through each of these."""
    _started: dict[str, float] = field(default_factory=dict)
    """When what was started ends, by name."""

    def __contains__(self, name: str) -> bool:
        return name in self._started

    def run(self, seconds: float) -> None:
        """Something that nothing runs beside, but for what was started."""
        self.now += seconds

    def start(self, name: str, through: str, seconds: float) -> None:
        """Something that is awaited later."""
        self._started[name] = self._free_at[through] = max(self._free_at[through], self.now) + seconds

    def wait_for(self, name: str) -> None:
        """What was started under that name has ended; nothing, if nothing was."""
        self.wait_until(self._started.pop(name, self.now))

    def wait_until(self, end: float) -> None:
        """Nothing runs until then."""
        self.waited_s += max(0.0, end - self.now)
        self.now = max(self.now, end)


@dataclass
class _Costing:
    module: Module
    chip: Chip
    network: Network | None
    pick: Pick

    def __post_init__(self) -> None:
        self._counter = Counter(self.module, self.chip)

    def of(self, computation: Computation, outermost: bool = False) -> Cost:
        """A computation's instructions in their order, on a clock."""
        total, clock = Cost(), _Clock()
        for one in computation:
            if one.opcode in ("while", "conditional", "call"):
                part = self._nested(one, computation, outermost)
                total.ops += part.ops
                total.unknown_loops += part.unknown_loops
                clock.run(part.seconds)
                clock.waited_s += part.waited_s
            elif one.opcode not in FREE:
                self._run(one, computation, clock, total.ops)
        clock.wait_until(total.sum(lambda op: op.work.bytes) / self.chip.memory_bandwidth)
        total.seconds, total.waited_s = clock.now, clock.waited_s
        return total

    def _run(self, one: Instruction, computation: Computation, clock: _Clock, ops: list[Op]) -> None:
        """One instruction, or the half of one."""
        kind, half = kind_and_half(one.opcode)
        if half == "done" and one.operands:
            clock.wait_for(one.operands[0])
        if half in ("done", "update"):
            return
        name = one.name
        if one.opcode == "recv":  # a TPU's slices exchange through their hosts: sent here, awaited at recv-done
            kind, half = _between_slices(one), "start"
        # A TPU starts, feeds and awaits some collectives in three fusions, and computes in the second.
        fused = self._fused_collective(one)
        if fused and (channel := _channel(fused)) in clock:
            if one.name.startswith("async-collective-done"):
                clock.wait_for(channel)
                return
            fused = None
        elif fused and one.name.startswith("async-collective-start"):
            name, half = channel, "start"
        op = self._op(one, computation, kind, fused)
        if op is None:
            return
        ops.append(op)
        if half == "start":
            clock.start(name, "network" if op.collective else "memory", op.seconds)
            return
        clock.run(op.seconds)
        if op.collective:
            clock.waited_s += max(0.0, op.seconds - _seconds(op.work, self.chip, 0)[0])

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
        work = self._counter.work(one, computation)
        collective = self._collective(fused, kind_and_half(fused.opcode)[0]) if fused else self._collective(one, kind)
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
        bases = ((kind_and_half(other.opcode), other) for other in inside)
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
