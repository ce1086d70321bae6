"""How fast a library multiplies [rows, inner] by [inner, columns] here, bfloat16 to float32 or float32 throughout.

Run by path, with the Python that has the library: python matmul_rate.py '["torch", "bfloat16", 1024, 768, 16384]'.
The last line it prints is JSON: operations a second of the fastest of a few tries. Imports nothing of fac_jax.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

TRIES = 6


def jax_matmul(dtype: str, rows: int, inner: int, columns: int) -> Callable[[], Any]:
    """XLA's."""
    import jax
    import jax.numpy as jnp

    x, w = (jax.random.normal(jax.random.key(n), (n, inner)).astype(dtype) for n in (rows, columns))
    multiply = jax.jit(
        lambda x, w: jnp.einsum("bd,fd->bf", x, w, precision="highest", preferred_element_type=jnp.float32)
    )
    return lambda: multiply(x, w).block_until_ready()


def torch_matmul(dtype: str, rows: int, inner: int, columns: int) -> Callable[[], Any]:
    """torch's (oneDNN or MKL)."""
    import torch

    x, w = (torch.randn(n, inner).to(getattr(torch, dtype)) for n in (rows, columns))
    return lambda: x @ w.T


def main() -> None:
    """Measure what the argument names."""
    library, dtype, *sizes = json.loads(sys.argv[1])
    try:
        multiply = {"jax": jax_matmul, "torch": torch_matmul}[library](dtype, *sizes)
    except ImportError as error:
        print(json.dumps({"absent": f"{library} is not installed ({error})"}))
        return
    seconds = []
    for _ in range(TRIES):
        started = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - started)
    rows, inner, columns = sizes
    print(json.dumps({"flops_per_second": 2 * rows * inner * columns / min(seconds)}))


if __name__ == "__main__":
    main()
