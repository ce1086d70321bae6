"""The published code's numbers, and both ways of decoding, whatever the rule between them says of so few features."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from fac_jax.sae import dense
from fac_jax.sae.model import SAE

GOLDEN = Path(__file__).parents[1] / "data" / "official_topk_sae.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """An SAE, what the published code makes of some rows, and an Adam trajectory."""
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def sae(golden: dict[str, np.ndarray]) -> SAE:
    """The SAE of `golden`."""
    return SAE(jnp.asarray(golden["W_enc"].T), jnp.asarray(golden["b_enc"]), jnp.asarray(golden["b_dec"]))


@pytest.fixture(params=["selected rows", "all features", "all features, in chunks"])
def decoding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way that this test's functions decode, if they are traced while it lasts."""
    monkeypatch.setattr(dense, "DENSE_SHARE", {"cpu": 2.0 if request.param == "selected rows" else 0.0})
    if "chunks" in request.param:
        monkeypatch.setattr(dense, "DENSE_ELEMENTS", 600)
    return str(request.param)
