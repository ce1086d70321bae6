"""Both ways of decoding, whatever the rule that chooses between them would say of so few features."""

import pytest

from fac_jax.sae import dense


@pytest.fixture(params=["selected rows", "all features"])
def decoding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way that this test's functions decode, if they are traced while it lasts."""
    monkeypatch.setattr(dense, "DENSE_SHARE", {"cpu": 2.0 if request.param == "selected rows" else 0.0})
    return str(request.param)
