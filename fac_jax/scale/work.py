"""What one instruction of a compiled program does, once: operations, and bytes of main memory.

bytes     operands and results in main memory (what lies on the chip is free), padding included; of an operand that
          is only sliced or gathered from, what is read; of one that is updated in place, what is written, twice
matmul    2 m n k operations, whatever XLA calls the product (dot or convolution); true float32 costs several
          bfloat16 passes
vector    one operation an element and elementwise instruction; a sort compares in log2 n (log2 n + 1) / 2 stages
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fac_jax.scale.chips import Chip
from fac_jax.scale.hlo import Computation, Instruction, Module, Shape
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
class Counter:
    """Counts what instructions of a program do on a chip."""

    module: Module
    chip: Chip

    def work(self, one: Instruction, computation: Computation) -> Work:
        """Of one run; a collective's is what it reads and writes."""
        if one.opcode == "fusion":
            return self._fusion(one, computation)
        if kind_and_half(one.opcode)[0] in COLLECTIVES:
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
        if one.opcode in MOVES or one.opcode in FREE or kind_and_half(one.opcode)[0] in COLLECTIVES:
            return Work()
        return Work(vector=float(one.shape.elements))


def kind_and_half(opcode: str) -> tuple[str, str]:
    """`all-gather-start` as (all-gather, start); the second is empty for what is no half."""
    for half in ("start", "done", "update"):
        if opcode.endswith(f"-{half}") and opcode != "dynamic-update":
            return opcode.removesuffix(f"-{half}"), half
    return opcode, ""


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
