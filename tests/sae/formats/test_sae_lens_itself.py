"""The interchange with sae-lens itself, both ways: same features, same activations, same reconstructions.

Needs an interpreter with sae-lens, named by SAE_LENS_PYTHON: `bash launch/test-sae-lens.sh` makes one and runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from fac_jax.errors import UserError
from fac_jax.sae.checkpoint import LoadedSae, load_sae, read_sae, save_sae
from fac_jax.sae.convert import convert_sae
from fac_jax.sae.model import SAE, decode, encode

PROGRAM = Path(__file__).parent / "sae_lens_program.py"
PYTHON = os.environ.get("SAE_LENS_PYTHON")
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="SAE_LENS_PYTHON names no interpreter with sae-lens; run bash launch/test-sae-lens.sh"
)
WRITTEN = [
    "standard", "standard-raw-input", "topk", "topk-raw-input", "topk-rescaled", "topk-rescaled-raw", "topk-checkpoint",
    "topk-trained", "topk-half", "topk-scaled", "topk-scaled-rescaled-raw", "topk-version-5", "jumprelu",
    "jumprelu-raw-input", "jumprelu-checkpoint", "jumprelu-trained", "jumprelu-log", "batchtopk-trained",
    "matryoshka-trained",
]  # fmt: skip
REFUSED = {
    "gated": "has architecture 'gated', which is not read",
    "transcoder": "has architecture 'transcoder', which is not read",
    "batchtopk": "has architecture 'batchtopk', which is not read.*: save it with save_inference_model, as jumprelu",
    "layer_norm": "has normalize_activations 'layer_norm', which scales each row by its own statistics",
    "constant_norm_rescale": "has normalize_activations 'constant_norm_rescale', which scales each row",
    "expected_average_only_in": "no factor with it .*: call fold_activation_norm_scaling_factor",
}


def program(order: str, folder: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(
        [str(PYTHON), str(PROGRAM), order, str(folder)], capture_output=True, text=True, timeout=280, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


def assert_same(loaded: LoadedSae, described: Path, mesh: Mesh) -> None:
    with np.load(described) as arrays:
        x_bd, acts, recon = jnp.asarray(arrays["x"]), arrays["acts"], arrays["recon"]
    acts_bf = encode(loaded.sae, x_bd, loaded.k, mesh=mesh)
    np.testing.assert_array_equal(np.asarray(acts_bf) != 0, acts != 0)
    assert 0 < (acts != 0).mean() < 0.6
    for got, want in ((acts_bf, acts), (decode(loaded.sae, acts_bf), recon)):
        assert np.linalg.norm(np.asarray(got) - want) <= 1e-6 * np.linalg.norm(want)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    program("write", folder)
    return folder


@pytest.mark.parametrize("name", WRITTEN)
def test_what_sae_lens_writes_is_the_same_here(name: str, theirs: Path, mesh: Mesh) -> None:
    loaded = load_sae(theirs / name, mesh, expect_d_model=16, expect_layer=3)
    assert loaded.model == "tiny" and (loaded.k == 5) == name.startswith("topk")
    assert_same(loaded, theirs / name / "expected.npz", mesh)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_exactly_is_refused(name: str, theirs: Path, mesh_1x1: Mesh) -> None:
    with pytest.raises(UserError, match=REFUSED[name]):
        load_sae(theirs / "refused" / name, mesh_1x1)


def test_every_sae_that_sae_lens_wrote_is_tested(theirs: Path) -> None:
    assert {path.name for path in theirs.iterdir()} == {*WRITTEN, "refused"}
    assert {path.name for path in (theirs / "refused").iterdir()} == set(REFUSED)


def test_what_is_written_here_is_the_same_in_sae_lens(theirs: Path, tmp_path: Path, mesh_1x1: Mesh) -> None:
    """Tied, untied and with thresholds, rows of very different norms; and what SAELens wrote, there and back."""
    rng = np.random.default_rng(3)
    w_fd = (rng.standard_normal((64, 16)) * np.linspace(0.2, 3, 64)[:, None] / 4).astype(np.float32)
    wide, flat = rng.standard_normal((64, 16)).astype(np.float32) / 4, rng.standard_normal(64).astype(np.float32)
    b_dec = rng.standard_normal(16).astype(np.float32)
    ours = {
        "tied": (SAE(w_fd, flat, b_dec), 5, 3),
        "untied": (SAE(w_fd, flat, b_dec, wide), 5, 1),
        "threshold": (SAE(w_fd, flat, b_dec, wide, np.abs(flat[::-1])), None, 0),
        "tied-threshold": (SAE(w_fd, flat, b_dec, None, np.abs(flat)), None, 3),
    }
    card = {"model": "tiny", "model_digest": "01", "rows": 1, "steps": 1, "metrics": {}, "variant": "topk"}
    for name, (sae, k, layer) in ours.items():
        save_sae(tmp_path / "ours" / name, sae, {**card, "k": k, "layer": layer})
        convert_sae(tmp_path / "ours" / name, tmp_path / "for_sae_lens" / name, "sae_lens")
    for name in ("topk-rescaled-raw", "batchtopk-trained"):
        convert_sae(theirs / name, tmp_path / "ours" / name)
        convert_sae(tmp_path / "ours" / name, tmp_path / "for_sae_lens" / name, "sae_lens")
    program("read", tmp_path / "for_sae_lens")
    hooks = {0: "blocks.0.hook_resid_pre", 1: "blocks.0.hook_resid_post", 3: "blocks.2.hook_resid_post"}
    for folder in (tmp_path / "for_sae_lens").iterdir():
        loaded = load_sae(tmp_path / "ours" / folder.name, mesh_1x1)
        assert_same(loaded, folder / "found.npz", mesh_1x1)
        described = json.loads((folder / "described.json").read_text())
        assert described["class"] == ("JumpReLUSAE" if loaded.k is None else "TopKSAE") and described["k"] == loaded.k
        assert described["model_name"] == "tiny" and described["hook_name"] == hooks[loaded.layer]
        _, back = read_sae(folder)  # and the bytes come home
        for attribute, array in read_sae(tmp_path / "ours" / folder.name)[1].items():
            np.testing.assert_array_equal(back[attribute], array)
