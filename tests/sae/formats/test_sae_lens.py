"""SAELens's format without SAELens: two SAEs that it wrote (see sae_lens_program.py), and what is refused in them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from fac_jax.errors import UserError
from fac_jax.mesh import FEATURE
from fac_jax.sae.checkpoint import load_sae, read_sae
from fac_jax.sae.model import decode, encode

DATA = Path(__file__).parents[2] / "data" / "sae_lens"


@pytest.mark.parametrize(("name", "k"), [("topk-checkpoint", 5), ("batchtopk-trained", None)])
def test_features_activations_and_reconstructions_are_sae_lens_own(name: str, k: int | None, mesh: Mesh) -> None:
    loaded = load_sae(DATA / name, mesh, expect_d_model=16, expect_layer=3, expect_model_digest="unknown to it")
    assert (loaded.features, loaded.k, loaded.model, loaded.model_digest) == (64, k, "tiny", None)
    assert loaded.sae.encoder_fd.addressable_shards[0].data.shape[0] == 64 // mesh.shape[FEATURE]
    with np.load(DATA / name / "expected.npz") as expected:
        acts_bf = encode(loaded.sae, jnp.asarray(expected["x"]), loaded.k, mesh=mesh)
        np.testing.assert_array_equal(np.asarray(acts_bf) != 0, expected["acts"] != 0)
        for got, want in ((acts_bf, expected["acts"]), (decode(loaded.sae, acts_bf), expected["recon"])):
            assert np.linalg.norm(np.asarray(got) - want) <= 1e-6 * np.linalg.norm(want)


def test_the_card_says_what_the_file_says() -> None:
    assert read_sae(DATA / "topk-checkpoint")[0].variant == "topk"
    assert read_sae(DATA / "batchtopk-trained")[0].variant == "batchtopk"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(DATA / "batchtopk-trained", tmp_path / "sae")
    return tmp_path / "sae"


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "cfg.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def hook(name: str | None, **more: Any) -> Callable[[Path], None]:
    metadata = {"sae_lens_version": "6.54.12", "model_name": "tiny", "hook_name": name, **more}
    return config(metadata=metadata)


def weights(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        arrays = load_file(folder / "sae_weights.safetensors")
        change(arrays)
        save_file(arrays, folder / "sae_weights.safetensors")

    return apply


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blocks.15.hook_resid_post", 16),
        ("blocks.16.hook_resid_pre", 16),
        ("blocks.0.hook_resid_pre", 0),
        ("model.layers.15", 16),
        ("model.language_model.layers.15", 16),
    ],
)
def test_layers_count_blocks_applied(name: str, layer: int, folder: Path) -> None:
    hook(name)(folder)
    assert read_sae(folder)[0].layer == layer


def nan(arrays: dict[str, np.ndarray]) -> None:
    arrays["threshold"][0] = np.nan


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (config(architecture="jumprelu_transcoder"), "architecture 'jumprelu_transcoder', which is not read;"),
        (config(architecture="temporal"), "architecture 'temporal', which is not read;"),
        (config(architecture="abstopk"), "architecture 'abstopk', which is not read;"),
        (config(architecture=None), "architecture None, which is not read;"),
        (config(architecture="topk", k=5), r"holds .*'threshold'.*, its cfg.json says"),
        (config(reshape_activations="hook_z"), "reshape_activations 'hook_z': it reads attention heads"),
        (hook("blocks.2.hook_resid_post", hook_head_index=3), "hook_head_index 3: it reads attention heads"),
        (hook("blocks.2.attn.hook_z"), "hook_name 'blocks.2.attn.hook_z', which is no residual stream"),
        (hook("blocks.2.hook_mlp_out"), "hook_name 'blocks.2.hook_mlp_out', which is no residual stream"),
        (hook(None), "hook_name None, which is no residual stream"),
        (config(normalize_activations="layer_norm"), "'layer_norm', which scales each row by its own statistics"),
        (config(normalize_activations="covariance_whitening"), "call fold_activation_whitening in SAELens"),
        (config(normalize_activations="new"), "normalize_activations 'new', which is not known"),
        (config(normalize_activations="expected_average_only_in"), r"no factor with it \(activation_scaler.json: miss"),
        (config(apply_b_dec_to_input="no"), "apply_b_dec_to_input 'no'; it must be bool"),
        (config(d_sae=128), r"holds .*'W_dec': \(64, 16\).*, its cfg.json says .*'W_dec': \(128, 16\)"),
        (config(d_in=16.0), "d_in 16.0; it must be a whole number above 0"),
        (config(metadata=3), "metadata 3; it must be a mapping"),
        (lambda folder: (folder / "cfg.json").write_text("{"), "cfg.json is not valid JSON"),
        (lambda folder: (folder / "cfg.json").write_text("[]"), "cfg.json holds no mapping but list"),
        (lambda folder: (folder / "sae_weights.safetensors").unlink(), "sae_weights.safetensors is missing"),
        (lambda folder: (folder / "sae_weights.safetensors").write_bytes(b"x" * 20), "safetensors cannot be read"),
        (weights(lambda arrays: arrays.pop("b_enc")), "holds .*, its cfg.json says .*'b_enc'"),
        (weights(lambda arrays: arrays.update(b_mag=np.zeros(64, np.float32))), "holds .*'b_mag'"),
        (weights(lambda arrays: arrays.update(scaling_factor=np.full(64, 2.0))), "a scaling_factor that is not 1"),
        (weights(nan), "1 of the numbers of threshold_f are not finite"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_line(damage: Callable[[Path], None], message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        read_sae(folder)
    assert "\n" not in str(error.value)


def test_a_factor_is_folded_only_if_it_is_one(folder: Path) -> None:
    config(normalize_activations="expected_average_only_in")(folder)
    for content in ('{"scaling_factor": null}', '{"scaling_factor": -1}', '{"scaling_factor": NaN}'):
        (folder / "activation_scaler.json").write_text(content)
        with pytest.raises(UserError, match="no factor with it"):
            read_sae(folder)


def test_a_threshold_of_infinity_is_a_feature_that_is_off(folder: Path, mesh_1x1: Mesh) -> None:
    weights(lambda arrays: arrays["threshold"].__setitem__(slice(1, None), np.inf))(folder)
    with np.load(folder / "expected.npz") as expected:
        acts_bf = encode(load_sae(folder, mesh_1x1).sae, jnp.asarray(expected["x"]), None)
        np.testing.assert_array_equal(np.asarray(acts_bf) != 0, (expected["acts"] != 0) * (np.arange(64) == 0))
