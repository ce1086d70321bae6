"""Every test sees eight CPU devices, so that a mesh of 1x1 and one of 2x4 are both real."""

from __future__ import annotations

import atexit
import os
import tempfile

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import jax
import pytest
from jax.sharding import Mesh

from fac_jax.config.machine import MeshConfig
from fac_jax.mesh import make_mesh

# An example's first run compiles or waits for another process's tests: how long it takes says nothing.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")
CACHE = tempfile.TemporaryDirectory(prefix="fac-jax-tests-")  # nobody's answers are read, and none of the tests' kept
atexit.register(CACHE.cleanup)
os.environ["FAC_JAX_CACHE"] = CACHE.name
# Nearly all of the time of tests goes into compiling tiny programs that run once: what LLVM optimizes there costs more
# than it saves. Processes that tests start compile as those of users do.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def mesh_1x1() -> Mesh:
    return make_mesh(MeshConfig(data=1, feature=1))


@pytest.fixture(scope="session")
def mesh_2x4() -> Mesh:
    return make_mesh(MeshConfig(data=2, feature=4))


@pytest.fixture(params=["1x1", "2x4"])
def mesh(request: pytest.FixtureRequest) -> Mesh:
    data, feature = map(int, request.param.split("x"))
    return make_mesh(MeshConfig(data=data, feature=feature))
