"""How fast a library multiplies [rows, inner] by [inner, columns] here, bfloat16 to float32 or float32 throughout.

Run by path, with the Python that has the library:

    python matmul_rate.py '["torch", "cpu", "bfloat16", 1024, 768, 16384]'

The last line it prints is JSON: operations a second of the fastest of a few tries. Imports nothing of fac_jax.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

TRIES = 6
REPEATS = {"cpu": 1, "gpu": 20}
"""Matmuls of one try: started one after the other, so that a GPU never waits for the host."""


def jax_matmul(dtype: str, rows: int, inner: int, columns: int, repeats: int) -> Callable[[], Any]:
    """XLA's."""
    import jax
    import jax.numpy as jnp

    x, w = (jax.random.normal(jax.random.key(n), (n, inner)).astype(dtype) for n in (rows, columns))
    multiply = jax.jit(
        lambda x, w: jnp.einsum("bd,fd->bf", x, w, precision="highest", preferred_element_type=jnp.float32)
    )
    return lambda: jax.block_until_ready([multiply(x, w) for _ in range(repeats)][-1])


def torch_matmul(dtype: str, rows: int, inner: int, columns: int, repeats: int) -> Callable[[], Any]:
    """torch's (oneDNN, MKL or cuBLAS)."""
    import torch

    x, w = (torch.randn(n, inner).to(getattr(torch, dtype)) for n in (rows, columns))

    def multiply() -> None:
        for _ in range(repeats):
            x @ w.T
        if x.is_cuda:
            torch.cuda.synchronize()

    return multiply


def main() -> None:
    """Measure what the argument names."""
    library, device, dtype, *sizes = json.loads(sys.argv[1])
    try:
        if library == "torch" and device == "gpu":
            import torch

            torch.set_default_device("cuda")
        matmul: Callable[..., Callable[[], Any]] = {"jax": jax_matmul, "torch": torch_matmul}[library]
        multiply = matmul(dtype, *sizes, REPEATS[device])
    except ImportError as error:
        print(json.dumps({"absent": f"{library} is not installed ({error})"}))
        return
    seconds = []
    for _ in range(TRIES):
        started = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - started)
    rows, inner, columns = sizes
    flops = 2 * rows * inner * columns * REPEATS[device]
    print(json.dumps({"flops_per_second": flops / min(seconds)}))


if __name__ == "__main__":
    main()
