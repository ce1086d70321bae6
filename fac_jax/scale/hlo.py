"""A compiled program's text, `compiled.as_text()`, as data: computations, instructions, shapes as they lie in memory.

Reads optimised HLO of XLA for TPU, GPU or CPU. Only what a model of costs needs is understood (`cost.py`): shapes with
their layouts (a TPU pads the last dimensions to whole tiles), which computations an instruction calls, how often a
loop turns, and which devices a collective joins. Grammar: https://openxla.org/xla/hlo_to_stablehlo_translation and
XLA's own printer, hlo_instruction.cc; the printer keeps no promise of stability, so what is not understood is an error
where it would be counted wrongly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "token": 0, "opaque": 0,
}  # fmt: skip
MAIN_MEMORY = 0
"""Memory space of HBM; other numbers are memories on the chip (or, 5, the host's)."""
SAME = ("bitcast", "copy", "convert", "reshape", "transpose", "copy-done")
"""Operations whose result is their first operand, moved or written otherwise."""

_ARRAY = re.compile(r"([a-z]+\d*(?:e\d+m\d+\w*)?)\[([^\]]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"(calls|body|condition|to_apply|branch_computations|true_computation|false_computation|called_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclass(frozen=True)
class Shape:
    """One array: its type, its dimensions and how it lies in memory."""

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    """Innermost dimensions are padded to multiples of it (TPU)."""
    space: int = MAIN_MEMORY

    @property
    def elements(self) -> int:
        """Numbers in it, without padding."""
        return math.prod(self.dims)

    @cached_property
    def bytes(self) -> int:
        """Bytes that it takes, with the padding of its tiles."""
        padded = list(self.dims)
        if self.tile and self.minor_to_major:
            for size, axis in zip(reversed(self.tile), self.minor_to_major, strict=False):
                padded[axis] = -(-padded[axis] // size) * size
        return -(-math.prod(padded) * BITS.get(self.dtype, 8) // 8)  # every type not listed is one of 8 bits

    @property
    def main_bytes(self) -> int:
        """Bytes in main memory: 0 for what lies on the chip."""
        return self.bytes if self.space == MAIN_MEMORY else 0


@dataclass
class Instruction:
    """One line: what it computes, from what, into what."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Arrays of the result; several for a tuple."""
    operands: tuple[str, ...]
    attributes: str = field(repr=False)
    """The rest of the line."""
    argument: str = field(repr=False, default="")
    """What stands between the parentheses: a constant's value, a parameter's number."""
    is_root: bool = False

    @property
    def shape(self) -> Shape:
        """The result, or the first array of it."""
        return self.shapes[0]

    @cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Names of the computations it calls, by attribute."""
        found = {}
        for key, value in _CALLED.findall(self.attributes.split(", metadata=")[0]):
            found[key] = tuple(re.findall(r"[\w.\-]+", value))
        return found

    @property
    def branches(self) -> tuple[str, ...]:
        """Computations of a conditional in the order of its index (a predicate's: false, true)."""
        named = self.called.get("branch_computations", ())
        return named or self.called.get("false_computation", ()) + self.called.get("true_computation", ())

    @cached_property
    def what(self) -> str:
        """Where it comes from in the traced program: metadata's op_name, or nothing."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """Of a custom call: who is called."""
        return self.text("custom_call_target").strip('"')

    def text(self, key: str) -> str:
        """An attribute up to the next comma or space; empty where it is absent."""
        found = re.search(rf"(?:^|[ ,]){key}=([^\s,]+)", self.attributes)
        return found[1] if found else ""

    def numbers(self, key: str) -> tuple[int, ...]:
        """An attribute of the form `key={1,2}`; empty where it is absent."""
        found = re.search(rf"(?:^|[ ,]){key}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(number) for number in found[1].split(",") if number) if found else ()

    @cached_property
    def estimated_cycles(self) -> int:
        """The TPU compiler's own estimate of the cycles that it takes; 0 where it makes none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else 0


@dataclass
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @cached_property
    def root(self) -> Instruction:
        """What it returns."""
        return next((one for one in self if one.is_root), list(self)[-1])

    @cached_property
    def parameters(self) -> list[Instruction]:
        """Its parameters by number."""
        return sorted((one for one in self if one.opcode == "parameter"), key=lambda one: int(one.argument))

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who reads each instruction."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for one in self:
            for operand in dict.fromkeys(one.operands):
                found[operand].append(one)
        return found

    def operand(self, one: Instruction, index: int) -> Instruction:
        """The instruction that makes an operand of `one`."""
        return self.instructions[one.operands[index]]


@dataclass
class Module:
    """A program."""

    computations: dict[str, Computation]
    entry: Computation

    def called(self, one: Instruction, key: str) -> Computation:
        """The computation that `one` names by `key`."""
        return self.computations[one.called[key][0]]

    def trip_count(self, loop: Instruction, computation: Computation) -> int | None:
        """Turns of a while loop: as XLA says, or from a counter that its condition compares; None where neither."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition, body = self.called(loop, "condition"), self.called(loop, "body")
        compare = self._only_compare(condition)
        if compare is None:
            return None
        (counter, limit), direction = compare
        if counter[0] != "element":
            return None
        first = self._value(computation, loop.operands[0], counter[1])
        last = limit[1] if limit[0] == "constant" else self._value(computation, loop.operands[0], limit[1])
        step = self._step(body, counter[1])
        if first is None or last is None or not step:
            return None
        count = {"LT": -(-(last - first) // step), "LE": (last - first) // step + 1, "GT": -(-(first - last) // -step)}
        return max(0, count[direction]) if direction in count else None

    def _only_compare(self, condition: Computation) -> tuple[list[tuple[str, int]], str] | None:
        """What a loop's condition compares (an element of its state, or a constant), and how."""
        root, inside, outer = condition.root, condition, None
        if root.opcode == "fusion":
            inside, outer = self.called(root, "calls"), root
            root = inside.root
        if root.opcode != "compare":
            return None
        sides = []
        for index in (0, 1):
            one = _through(inside, inside.operand(root, index))
            if one.opcode == "parameter" and outer is not None:
                one = _through(condition, condition.operand(outer, int(one.argument)))
            if one.opcode == "get-tuple-element":
                sides.append(("element", int(one.text("index"))))
            elif one.opcode == "constant" and one.argument.lstrip("-").isdigit():
                sides.append(("constant", int(one.argument)))
            else:
                return None
        return sides, root.text("direction")

    def _value(self, computation: Computation, name: str, element: int) -> int | None:
        """The constant that element `element` of a tuple is, or None."""
        one = computation.instructions[name]
        if one.opcode != "tuple":
            return None
        made = _through(computation, computation.operand(one, element))
        return int(made.argument) if made.opcode == "constant" and made.argument.lstrip("-").isdigit() else None

    def _step(self, body: Computation, element: int) -> int | None:
        """What a loop adds to its counter each turn, or None."""
        if body.root.opcode != "tuple":
            return None
        added, inside, outer = _through(body, body.operand(body.root, element)), body, None
        if added.opcode == "fusion":
            outer, inside = added, self.called(added, "calls")
            added = _through(inside, inside.root)
        if added.opcode != "add":
            return None
        for index in (0, 1):
            one = _through(inside, inside.operand(added, index))
            if one.opcode == "parameter" and outer is not None:
                one = _through(body, body.operand(outer, int(one.argument)))
            if one.opcode == "constant" and one.argument.lstrip("-").isdigit():
                return int(one.argument)
        return None


def _through(computation: Computation, one: Instruction) -> Instruction:
    """What `one` was before it was moved or written otherwise."""
    while one.opcode in SAME or one.opcode == "copy-start":
        one = computation.operand(one, 0)
    return one


def parse(text: str) -> Module:
    """The program of a text. Raises ValueError where it holds none."""
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in text.splitlines():
        if line[:1] not in ("", " ", "}"):
            head = _HEAD.match(line)
            if head and not line.startswith("HloModule"):
                current = computations[head[2]] = Computation(head[2])
                entry = current if head[1] else entry
        elif current is not None and (start := _NAME.match(line)):
            one = _instruction(line, start)
            current.instructions[one.name] = one
    if entry is None:
        raise ValueError("this is no HLO text: it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(line: str, start: re.Match[str]) -> Instruction:
    at = start.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    opcode_end = line.index("(", end)
    close = _closing(line, opcode_end)
    argument = line[opcode_end + 1 : close]
    opcode = line[end:opcode_end].strip()
    plain = opcode in ("constant", "parameter", "iota")
    return Instruction(
        name=start[2],
        opcode=opcode,
        shapes=read_shapes(line[at:end]),
        operands=() if plain else tuple(re.findall(r"%([\w.\-]+)", argument)),
        attributes=line[close + 1 :],
        argument=argument if plain else "",
        is_root=bool(start[1]),
    )


def _closing(line: str, at: int) -> int:
    """Position of the parenthesis that closes the one at `at`."""
    depth = 0
    for position in range(at, len(line)):
        depth += {"(": 1, ")": -1}.get(line[position], 0)
        if depth == 0:
            return position
    raise ValueError(f"unbalanced parentheses in HLO: {line[:200]}")


def read_shapes(text: str) -> tuple[Shape, ...]:
    """`f32[8,128]{1,0:T(8,128)S(1)}`, or a tuple of such; nested tuples become one list."""
    return tuple(_shape(*match) for match in _ARRAY.findall(text)) or (Shape("token", ()),)


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    order, _, rest = layout.partition(":")
    tile = re.search(r"T\(([\d,]+)\)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    return Shape(
        dtype,
        tuple(int(size.lstrip("<=")) for size in dims.split(",") if size),
        tuple(int(axis) for axis in order.split(",") if axis),
        tuple(int(size) for size in tile[1].split(",")) if tile else (),
        int(space[1]) if space else MAIN_MEMORY,
    )


def replica_groups(one: Instruction, devices: int) -> list[list[int]]:
    """Which devices a collective joins, by their place in the mesh. All three forms that XLA writes are read:
    {{0,1},{2,3}}, the iota form [2,2]<=[4] (with T(1,0) for a transposed one), and that of named mesh axes.

    Raises ValueError for a form that is none of them.
    """
    text = one.attributes
    if one.opcode.startswith("collective-permute"):
        return [sorted({int(a), int(b)}) for a, b in re.findall(r"\{(\d+),(\d+)\}", text.split("metadata=")[0])]
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? ?\{([^}]*)\}", text)
    if named:
        return _named_groups(*named.groups())
    start = text.find("replica_groups=")
    listed = text[start + len("replica_groups=") :]
    if start < 0 or listed.startswith("{}"):
        return [list(range(devices))]
    if listed.startswith("{{"):
        inner = listed[1 : listed.index("}}") + 1]
        return [[int(number) for number in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", inner)]
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", listed)
    if iota is None:
        raise ValueError(f"unknown form of replica_groups: {listed[:120]}")
    rows = tuple(map(int, iota[1].split(",")))
    return _iota(iota[2], iota[3]).reshape(rows).tolist()


def _named_groups(axes: str, ids: str | None, joined: str) -> list[list[int]]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    order = np.arange(math.prod(sizes.values()))
    if ids:
        iota = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\)?)?", ids)
        if iota is None:
            raise ValueError(f"unknown form of device_ids: {ids[:120]}")
        order = _iota(iota[1], iota[2]).reshape(-1)
    # An axis may be joined in part: 'a':(2)4 is the factor of 4 that follows a factor of 2.
    split: list[tuple[int, bool]] = []
    parts = {name: (part or None) for name, part in re.findall(r"'([^']+)'(?::(\(\d+\)\d+))?", joined)}
    for name, size in sizes.items():
        part = parts.get(name)
        if name in parts and part is not None:
            before, length = map(int, re.findall(r"\d+", part))
            split += [(before, False), (length, True), (size // before // length, False)]
        else:
            split.append((size, name in parts))
    grid = order.reshape([size for size, _ in split])
    moved = [axis for axis, (_, inside) in enumerate(split) if not inside]
    group = [axis for axis, (_, inside) in enumerate(split) if inside]
    members = math.prod(split[axis][0] for axis in group)
    return grid.transpose(moved + group).reshape(-1, members).tolist()


def _iota(dims: str, order: str | None) -> np.ndarray:
    sizes = [int(size) for size in dims.split(",")]
    grid = np.arange(math.prod(sizes)).reshape(sizes)
    return grid.transpose([int(axis) for axis in order.split(",")]) if order else grid
