"""Files of the autoencoder: what is saved comes back, and what is damaged or made for something else is named."""

import gc
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file

from fac_jax.config.machine import MeshConfig
from fac_jax.errors import UserError
from fac_jax.mesh import FEATURE, make_mesh, sharding
from fac_jax.sae import checkpoint
from fac_jax.sae.checkpoint import (
    leaf_digests,
    load_sae,
    open_checkpoints,
    read_card,
    restore_state,
    save_sae,
    save_state,
)
from fac_jax.sae.model import SAE, encode

CARD = {
    "k": 4, "layer": 3, "variant": "topk", "model": "tiny", "model_digest": "0123", "rows": 640, "steps": 20,
    "metrics": {"fvu": 0.25},
}  # fmt: skip


def random_sae(seed: int = 0, features: int = 64, d: int = 16) -> SAE:
    rng = np.random.default_rng(seed)
    return SAE(*(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((features, d), features, d)))


def random_state(mesh: Mesh, features: int = 64) -> dict[str, object]:
    rng = np.random.default_rng(1)
    w_fd = jnp.asarray(rng.standard_normal((features, 16)), jnp.float32)
    return {
        "step": jax.device_put(jnp.int32(7), sharding(mesh)),
        "params": {"w_fd": jax.device_put(w_fd, sharding(mesh, FEATURE, None))},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_sae(tmp_path / "sae", random_sae(), CARD)
    return tmp_path / "sae"


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_sae_comes_back(folder: Path, mesh: Mesh) -> None:
    loaded = load_sae(folder, mesh, expect_d_model=16, expect_layer=3, expect_model_digest="0123")
    assert (loaded.features, loaded.k, loaded.d_model, loaded.layer, loaded.model) == (64, 4, 16, 3, "tiny")
    assert loaded.sae.w_fd[...].addressable_shards[0].data.shape[0] == 64 // mesh.shape[FEATURE]
    x_bd = np.random.default_rng(2).standard_normal((8, 16))
    np.testing.assert_allclose(
        encode(loaded.sae, x_bd, 4, mesh=mesh), encode(random_sae(), x_bd, 4), rtol=1e-5, atol=1e-6
    )
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "sae.safetensors"]


def test_shards_are_written_and_read_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file from any mesh, which the safetensors library reads; no slice that is read is the whole of W."""
    arrays = random_sae()
    written = set()
    for data, feature in ((1, 1), (2, 4), (1, 8)):
        mesh = make_mesh(MeshConfig(data, feature))
        placed = {
            name: jax.device_put(getattr(arrays, name)[...], sharding(mesh, *SAE.SPECS[name]))
            for name in ("w_fd", "b_enc_f", "b_dec_d")
        }
        save_sae(tmp_path / f"{feature}", SAE(**placed), CARD)
        written.add((tmp_path / f"{feature}" / "sae.safetensors").read_bytes())
    assert len(written) == 1
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 10 * 16 * 4)  # hashed in blocks of 10 rows, the last one short
    np.testing.assert_array_equal(load_file(tmp_path / "8" / "sae.safetensors")["W_dec"], arrays.w_fd[...])
    loaded = load_sae(tmp_path / "1", mesh).sae
    for name in ("w_fd", "b_enc_f", "b_dec_d"):
        np.testing.assert_array_equal(getattr(loaded, name)[...], getattr(arrays, name)[...])
    assert loaded.w_fd[...].addressable_shards[3].data.shape == (8, 16)


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path, mesh_2x4: Mesh) -> None:
    """Best: the smallest K first, then the smallest fvu; one that was not measured is never best."""
    measured = {1: (8, 0.1), 2: (4, 0.5), 3: (4, 0.3), 4: (4, 0.4), 5: (4, 0.35)}
    with open_checkpoints(tmp_path, keep=2, keep_best=1) as checkpoints:
        for step, (k, fvu) in measured.items():
            state = random_state(mesh_2x4) | {"step": jax.device_put(jnp.int32(step), sharding(mesh_2x4))}
            save_state(checkpoints, step, state, k=k, fvu=fvu)
        save_state(checkpoints, 6, random_state(mesh_2x4))
        checkpoints.wait_until_finished()
        assert sorted(checkpoints.all_steps()) == [3, 5, 6]
        best = restore_state(checkpoints, random_state(mesh_2x4), best=True)
        assert best is not None and best[0] == 3 and best[1]["step"] == 3
    with open_checkpoints(tmp_path, keep=2, keep_best=1) as checkpoints:  # another process remembers
        found = restore_state(checkpoints, random_state(mesh_2x4), best=True)
        assert found is not None and found[0] == 3


def test_digest_tells_weights_and_k(tmp_path: Path, folder: Path) -> None:
    digests = {read_card(folder).digest}
    for name, sae, card in (("other", random_sae(1), CARD), ("k", random_sae(), CARD | {"k": 5})):
        digests.add(save_sae(tmp_path / name, sae, card).digest)
    assert len(digests) == 3
    assert save_sae(tmp_path / "same", random_sae(), CARD | {"metrics": {"fvu": 0.5}}).digest in digests


def edit_card(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "expect", "message"),
    [
        (lambda folder: None, {"expect_d_model": 512}, "reads width 16, backbone has 512: it was trained on tiny"),
        (lambda folder: None, {"expect_layer": 4}, "was trained on layer 3, config asks 4: set backbone.layer to 3"),
        (
            lambda folder: None,
            {"expect_model_digest": "99"},
            r"was trained on tiny \(digest 0123\), the backbone .* 99",
        ),
        (lambda folder: (folder / "config.json").unlink(), {}, "no SAE in .*: run `fac train` first or set scan.sae"),
        (lambda folder: (folder / "config.json").write_text("{"), {}, "config.json is not valid JSON"),
        (edit_card(format=3), {}, "has format 3, this version reads 2: update fac-jax"),
        (edit_card(features=128), {}, r"holds .*\(64, 16\).*, its config.json says .*\(128, 16\)"),
        (lambda folder: (folder / "sae.safetensors").unlink(), {}, "sae.safetensors is missing"),
        (lambda folder: (folder / "sae.safetensors").write_bytes(b"x" * 20), {}, "sae.safetensors cannot be read"),
        (lambda folder: flip(folder / "sae.safetensors", -10), {}, "sae.safetensors is damaged: b_dec has SHA-256"),
    ],
)
def test_unusable_sae(
    damage: Callable[[Path], None], expect: dict[str, object], message: str, folder: Path, mesh_1x1: Mesh
) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_sae(folder, mesh_1x1, **expect)  # type: ignore[arg-type]


def test_features_that_cannot_be_shared(tmp_path: Path, mesh_2x4: Mesh) -> None:
    save_sae(tmp_path, random_sae(features=66), CARD)
    with pytest.raises(UserError, match="has 66 features, which 4 shards cannot share equally"):
        load_sae(tmp_path, mesh_2x4)


def test_state_comes_back_on_any_mesh(tmp_path: Path, mesh_1x1: Mesh, mesh_2x4: Mesh) -> None:
    state = random_state(mesh_2x4)
    with open_checkpoints(tmp_path) as checkpoints:
        assert restore_state(checkpoints, state) is None
        for step in (3, 5, 7):
            save_state(checkpoints, step, state)
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == [5, 7]
        for mesh in (mesh_1x1, mesh_2x4):
            like = random_state(mesh)
            restored = restore_state(checkpoints, jax.tree.map(jnp.zeros_like, like))
            assert restored is not None and restored[0] == 7
            for got, want in zip(jax.tree.leaves(restored[1]), jax.tree.leaves(like), strict=True):
                assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
                np.testing.assert_array_equal(got, want)


def test_other_shape_is_named(tmp_path: Path, mesh_1x1: Mesh) -> None:
    with open_checkpoints(tmp_path) as checkpoints:
        save_state(checkpoints, 1, random_state(mesh_1x1))
        checkpoints.wait_until_finished()
        message = r"holds params.w_fd as float32 of shape \(64, 16\), this training needs float32 of shape \(32, 16\)"
        with pytest.raises(UserError, match=message):
            restore_state(checkpoints, random_state(mesh_1x1, features=32))
        with pytest.raises(UserError, match=r"holds extra as nothing, this training needs float32 of shape \(\)"):
            restore_state(checkpoints, random_state(mesh_1x1) | {"extra": jnp.float32(0)})


def test_every_flipped_byte_is_found(tmp_path: Path, mesh_1x1: Mesh) -> None:
    """Wherever a data file of a checkpoint is damaged, restoring says so and names the checkpoint."""
    state = random_state(mesh_1x1)
    with open_checkpoints(tmp_path) as checkpoints:
        save_state(checkpoints, 1, state)
    files = [path for path in (tmp_path / "1" / "state").rglob("*") if path.is_file() and path.stat().st_size > 2000]
    assert files
    found = 0
    for path in files:
        for offset in range(100, path.stat().st_size, 997):
            flip(path, offset)
            with open_checkpoints(tmp_path) as checkpoints:
                try:
                    _, restored = restore_state(checkpoints, state) or (0, None)
                except UserError as error:
                    assert str(tmp_path / "1") in str(error) and "delete" in str(error)
                    found += 1
                else:  # a byte that carries nothing
                    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
                        np.testing.assert_array_equal(got, want)
            flip(path, offset)
    assert found


# Where a file is missing, orbax drops coroutines whose event loop is closed: collected here, and not in later tests.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_missing_file_is_found(tmp_path: Path, mesh_1x1: Mesh) -> None:
    """Without any one of its files a checkpoint is refused by name, or restored to the bit where it says nothing."""
    state = random_state(mesh_1x1)
    with open_checkpoints(tmp_path) as checkpoints:
        save_state(checkpoints, 1, state)
    files, refused = [path for path in (tmp_path / "1").rglob("*") if path.is_file()], []
    for path in files:
        path.rename(tmp_path / "aside")
        with open_checkpoints(tmp_path) as checkpoints:
            try:
                found = restore_state(checkpoints, state)
            except UserError as error:
                assert str(tmp_path / "1") in str(error) and "delete" in str(error)
                refused.append(path)
            else:
                assert found is not None, path
                for got, want in zip(jax.tree.leaves(found[1]), jax.tree.leaves(state), strict=True):
                    np.testing.assert_array_equal(got, want)
        path.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "aside").rename(path)
    assert len(refused) >= 3
    gc.collect()


def test_changed_leaf_is_named(tmp_path: Path, mesh_1x1: Mesh) -> None:
    """A flip that passes orbax's own reading, as without compression: the digest tells which leaf it hit."""
    state = random_state(mesh_1x1)
    with open_checkpoints(tmp_path) as checkpoints:
        save_state(checkpoints, 1, state)
    path = tmp_path / "1" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["params.w_fd"][2] = "0" * 16
    path.write_text(json.dumps(meta))
    with (
        open_checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match="is damaged: params.w_fd has digest"),
    ):
        restore_state(checkpoints, state)


def test_digest_sees_any_single_change(mesh_2x4: Mesh) -> None:
    values = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)
    (plain,) = leaf_digests({"a": jnp.asarray(values)})
    (sharded,) = leaf_digests({"a": jax.device_put(values, sharding(mesh_2x4, FEATURE, None))})
    np.testing.assert_array_equal(plain, sharded)
    for place in np.random.default_rng(1).integers(0, 32 * 16 * 32, 20):
        bits = values.copy().view(np.uint32)
        bits.reshape(-1)[place // 32] ^= np.uint32(1) << np.uint32(place % 32)
        (changed,) = leaf_digests({"a": jnp.asarray(bits.view(np.float32))})
        assert (np.asarray(changed) != np.asarray(plain)).all()
    (swapped,) = leaf_digests({"a": jnp.asarray(values[::-1])})
    assert (np.asarray(swapped) != np.asarray(plain)).any()
