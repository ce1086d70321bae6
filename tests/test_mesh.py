"""What is decided by the platform."""

from pathlib import Path

import pytest

from fac_jax.mesh import matmul_dtype


def test_a_cpu_multiplies_in_what_its_hardware_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: "flags : fpu avx512f avx512_bf16 gfni")
    assert matmul_dtype("cpu") == "bfloat16"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: "flags : fpu avx512f")
    assert matmul_dtype("cpu") == "float32"
    assert matmul_dtype("tpu") == matmul_dtype("gpu") == "bfloat16"
