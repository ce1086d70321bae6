"""The device half of `splice`: replacing in pieces, masks, and how often it compiles. Values: see test_splice.py."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from fac_jax.backbone.weights import load_backbone
from fac_jax.sae import spliced as module
from fac_jax.sae.model import SAE, decode, encode
from fac_jax.sae.spliced import substitute, token_losses
from tests.backbone.tiny_backbone import write_model

FEATURES, D, K = 48, 32, 5


def random_sae() -> SAE:
    rng = np.random.default_rng(0)
    w_fd, b_enc_f = rng.standard_normal((FEATURES, D)), rng.standard_normal(FEATURES) * 0.1
    return SAE(*(jnp.asarray(a, jnp.float32) for a in (w_fd, b_enc_f, rng.standard_normal(D))))


@pytest.mark.parametrize("elements", [1, 4 * FEATURES * 6, 2**25])
def test_replaced_where_the_mask_holds_whatever_the_pieces(
    elements: int, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
    rng = np.random.default_rng(1)
    x_btd, mask_bt = jnp.asarray(rng.standard_normal((4, 18, D)), jnp.float32), rng.random((4, 18)) < 0.5
    sae = random_sae()
    found = np.asarray(substitute(sae, x_btd, jnp.asarray(mask_bt), K, mesh))
    x_bd = x_btd.reshape(-1, D)
    np.testing.assert_array_equal(found[~mask_bt], np.asarray(x_btd)[~mask_bt])
    expected = np.asarray(decode(sae, encode(sae, x_bd, K))).reshape(4, 18, D)
    np.testing.assert_allclose(found[mask_bt], expected[mask_bt], atol=1e-5)


def test_other_batches_of_one_shape_compile_nothing(tmp_path: Path, mesh_1x1: Mesh) -> None:
    write_model(tmp_path / "model")
    loaded, sae = load_backbone(str(tmp_path / "model"), None, "float32", mesh_1x1), random_sae()
    rng = np.random.default_rng(2)
    place_bt = np.broadcast_to(np.arange(24, dtype=np.int32), (2, 24))
    before = token_losses._cache_size()
    for _ in range(3):
        arrays = (rng.integers(0, 256, (2, 24), np.int32), np.ones((2, 24), np.int32), place_bt)
        content_bt, mean_d = rng.random((2, 24)) < 0.5, rng.standard_normal(D).astype(np.float32)
        losses = token_losses(loaded.model, sae, *arrays, content_bt, mean_d, layer=2, k=K, mesh=mesh_1x1)
        assert losses.cross_entropy_wbt.shape == (len(module.WAYS), 2, 24) and (losses.divergence_bt > -1e-5).all()
        unreached = int(content_bt.argmax(axis=1).min())  # before the first content token all ways are the same
        np.testing.assert_allclose(np.ptp(losses.cross_entropy_wbt[:, :, :unreached], axis=0), 0, atol=1e-6)
    assert token_losses._cache_size() == before + 1
