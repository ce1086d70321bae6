"""How many operations one instruction is: matmuls under both names that XLA gives them, sorts, top-k."""

from __future__ import annotations

import math

import numpy as np

from fac_jax.scale.hlo import Computation, Instruction, Shape

SORT_OPS = 4
"""Vector operations an element and stage of a sort: a comparison and selects of key and index."""


def dot_flops(one: Instruction, computation: Computation) -> float:
    """2 x elements of the result x elements that each of them sums."""
    left = computation.operand(one, 0).shape
    return 2.0 * one.shape.elements * math.prod(left.dims[axis] for axis in one.numbers("lhs_contracting_dims"))


def convolution_flops(one: Instruction, computation: Computation) -> float:
    """2 x multiplications that are no padding: a TPU writes every matmul as a convolution, a batched one with a window
    that meets one element of the batch at each place and padding at all others."""
    left, right = (computation.operand(one, index).shape for index in (0, 1))
    labels = one.text("dim_labels")
    if not labels:
        return 2.0 * one.shape.elements * right.elements / max(right.dims[-1], 1)
    spec_left, spec_right, spec_out = labels.replace("->", "_").split("_")
    total = 2.0 * one.shape.dims[spec_out.index("b")] * one.shape.dims[spec_out.index("f")]
    total *= right.dims[spec_right.index("i")]
    window = _window(one.attributes)
    for place, axis in enumerate(sorted(label for label in spec_out if label.isdigit())):
        output, kernel = one.shape.dims[spec_out.index(axis)], right.dims[spec_right.index(axis)]
        total *= _places(left.dims[spec_left.index(axis)], kernel, output, {k: v[place] for k, v in window.items()})
    return total / int(one.text("batch_group_count") or 1)


def _window(attributes: str) -> dict[str, list[tuple[int, ...]]]:
    """`window={size=2x2 stride=1x1 pad=0_0x0_0 lhs_dilate=1x2}` by key and axis."""
    start = attributes.find("window={")
    if start < 0:
        return {}
    fields = dict(part.split("=") for part in attributes[start + 8 : attributes.index("}", start)].split())
    return {
        key: [tuple(int(n) for n in part.split("_")) for part in value.split("x")]
        for key, value in fields.items()
        if key in ("stride", "pad", "lhs_dilate", "rhs_dilate")
    }


def _places(length: int, kernel: int, output: int, window: dict[str, tuple[int, ...]]) -> int:
    """Pairs of a place of the result and one of the kernel that meet an element, along one axis."""
    stride, apart = window.get("stride", (1,))[0], window.get("lhs_dilate", (1,))[0]
    spread, before = window.get("rhs_dilate", (1,))[0], window.get("pad", (0, 0))[0]
    at = np.arange(output)[:, None] * stride - before + np.arange(kernel)[None] * spread
    return int(((at >= 0) & (at < (length - 1) * apart + 1) & (at % apart == 0)).sum())


def stages(length: int) -> float:
    """Of a bitonic sort."""
    depth = math.ceil(math.log2(max(2, length)))
    return depth * (depth + 1) / 2


def top_k_ops(shape: Shape, k: int) -> float:
    """Vector operations of XLA's TopK, whose method is not published: sorted runs of k, each merged into the best k."""
    depth = math.ceil(math.log2(max(2, k)))
    return float(shape.elements * SORT_OPS * (stages(k) + depth))
