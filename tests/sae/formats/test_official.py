"""The published checkpoints: as torch writes them, with the published code's maths restated in torch beside ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from fac_jax.errors import UserError
from fac_jax.mesh import FEATURE
from fac_jax.sae.checkpoint import LoadedSae, load_sae
from fac_jax.sae.model import decode, encode

torch = pytest.importorskip("torch")
D, F, K = 48, 256, 7
NAME = "TopK7_l16_h48_epoch3.pth"


class OfficialTopK(torch.nn.Module):  # type: ignore[name-defined, misc]
    """Tied encoder; top-k as a mask on the pre-activations, then ReLU."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.mask = torch.nn.Parameter(torch.ones(F), requires_grad=False)
        self.W_enc = torch.nn.Parameter(torch.randn(D, F, generator=rng) * (2 / D) ** 0.5)
        self.b_enc = torch.nn.Parameter(torch.randn(F, generator=rng) / 10)
        self.b_dec = torch.nn.Parameter(torch.randn(D, generator=rng))

    def forward(self, x: Any) -> tuple[Any, Any]:
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        best = torch.zeros_like(pre).scatter_(-1, pre.topk(K, dim=-1).indices, 1)
        acts = torch.relu(pre * best)
        return acts, acts @ self.W_enc.T + self.b_dec


def checkpoint() -> dict[str, Any]:
    return {"weight": OfficialTopK().state_dict(), "config": {"d_inp": D, "d_hide": F, "topK": K}}


def made_by(loaded: LoadedSae, x_bd: np.ndarray, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    acts_bf = encode(loaded.sae, jax.numpy.asarray(x_bd), loaded.k, mesh=mesh)
    return np.asarray(acts_bf), np.asarray(decode(loaded.sae, acts_bf))


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)


def test_it_is_the_published_sae(tmp_path: Path, mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(checkpoint(), tmp_path / NAME)
    with caplog.at_level("INFO"):
        loaded = load_sae(tmp_path / NAME, mesh, expect_d_model=D, expect_layer=16, expect_model_digest="unknown to it")
    assert f"K is {K}, as when the file was saved" in caplog.text
    assert (loaded.features, loaded.k, loaded.d_model, loaded.layer, loaded.model_digest) == (F, K, D, 16, None)
    assert loaded.sae.w_fd[...].addressable_shards[0].data.shape[0] == F // mesh.shape[FEATURE]
    x = 3 * torch.randn(64, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = [tensor.numpy() for tensor in OfficialTopK()(x)]
    for got, want in zip(made_by(loaded, x.numpy(), mesh), wanted, strict=True):
        np.testing.assert_array_equal(got != 0, want != 0)
        assert_close(got, want)


def test_numbers_may_be_tensors_and_weights_of_half_precision(tmp_path: Path, mesh_1x1: Mesh) -> None:
    content = checkpoint()
    content["config"] = {name: torch.tensor(value) for name, value in content["config"].items()}
    content["weight"] = {name: tensor.bfloat16() for name, tensor in content["weight"].items()}
    torch.save(content, tmp_path / NAME)
    loaded = load_sae(tmp_path / NAME, mesh_1x1)
    assert loaded.k == K
    np.testing.assert_array_equal(loaded.sae.w_fd[...], content["weight"]["W_enc"].float().T.numpy())


def test_another_layer_is_refused(tmp_path: Path, mesh_1x1: Mesh) -> None:
    torch.save(checkpoint(), tmp_path / NAME)
    with pytest.raises(UserError, match="was trained on layer 16, config asks 14: set backbone.layer to 16"):
        load_sae(tmp_path / NAME, mesh_1x1, D, 14)
    with pytest.raises(UserError, match="reads width 48, backbone has 64: it was trained on a model that it does not"):
        load_sae(tmp_path / NAME, mesh_1x1, 64, 16)


def mask_off(content: dict[str, Any]) -> None:
    content["weight"]["mask"][:3] = 0


def not_finite(content: dict[str, Any]) -> None:
    content["weight"]["b_enc"][1] = float("-inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (mask_off, "has a mask that is not 1 for 3 of 256 features"),
        (not_finite, "1 of the numbers of b_enc_f are not finite"),
        (lambda content: content.pop("config"), r"has no 'config' \(it holds \['weight'\]\)"),
        (lambda content: content.update(weight=1), "has no 'weight'"),
        (lambda content: content["weight"].pop("mask"), r"holds .*; a checkpoint of the published code holds .*'mask'"),
        (lambda content: content["weight"].update(W_enc=torch.zeros(F, D)), r"'W_enc': \(256, 48\).*\(48, 256\)"),
        (lambda content: content["weight"].update(b_dec=3), "'b_dec': None"),
        (lambda content: content["config"].pop("topK"), "has no config.topK: give the K with `fac convert --sae"),
        (lambda content: content["config"].update(topK=F + 1), "K 257; K must lie between 1 and 256"),
        (lambda content: content["config"].update(topK=2.5), "config.topK 2.5; it must be a whole number above 0"),
        (lambda content: content["config"].update(d_hide=float("nan")), "config.d_hide nan; it must be a whole"),
        (lambda content: content["config"].update(d_inp=True), "config.d_inp True; it must be a whole number"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path, mesh_1x1: Mesh
) -> None:
    content = checkpoint()
    change(content)
    torch.save(content, tmp_path / NAME)
    with pytest.raises(UserError, match=message) as error:
        load_sae(tmp_path / NAME, mesh_1x1)
    assert "\n" not in str(error.value)


def test_a_name_without_a_layer(tmp_path: Path, mesh_1x1: Mesh) -> None:
    torch.save(checkpoint(), tmp_path / "sae.pth")
    with pytest.raises(UserError, match="does not say which layer it reads: rename it to TopK7_l{layer}_h48_epoch{n}"):
        load_sae(tmp_path / "sae.pth", mesh_1x1)
