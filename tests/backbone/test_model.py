"""The forward pass against Hugging Face transformers on tiny random models of each family, loaded by the real path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from fac_jax.backbone import weights
from fac_jax.backbone.model import chosen, inverse_frequencies, logits, product, residual, run_blocks
from fac_jax.backbone.weights import Loaded, load_backbone
from fac_jax.config.downstream import LoraConfig
from fac_jax.config.machine import MeshConfig
from fac_jax.downstream.lora import adapters, init_lora
from fac_jax.errors import UserError
from fac_jax.mesh import make_mesh
from tests.backbone.tiny_backbone import TINY, tiny_tokenizer, write_model

SMOL = {key: TINY[key] for key in TINY if key not in ("model_type", "rope_theta", "eos_token_id")}
LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
THETA = {"rope_type": "default", "rope_theta": 1000.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1": ("Llama", {"rope_parameters": LLAMA31, "tie_word_embeddings": True, "head_dim": 8}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-2-kv-heads": ("Llama", {"rope_parameters": THETA, "num_key_value_heads": 2, "intermediate_size": 50}),
    "qwen2": ("Qwen2", {"rope_parameters": THETA}),
    "qwen2-window": (
        "Qwen2",
        {
            "rope_parameters": THETA,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "mistral": ("Mistral", {"rope_parameters": THETA, "sliding_window": 8, "head_dim": 6}),
}


def hugging_face(family: str, changes: dict[str, Any], folder: Path) -> Any:
    """A random model of transformers, saved in several safetensors files with an index."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMOL | changes, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            scale = 0.7 if "embed" in name else 0.25
            value.copy_(torch.randn_like(value) * scale if value.ndim > 1 else 1 + 0.2 * torch.randn_like(value))
    model.save_pretrained(folder, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()
    return model


def expected(model: Any, tokens_bt: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Hidden states 0..n_layers-1 and logits."""
    import torch

    with torch.no_grad():
        out = model(torch.tensor(tokens_bt.astype(np.int64)), output_hidden_states=True)
    return [state.numpy() for state in out.hidden_states[:-1]], out.logits.numpy()


def whole(tokens_bt: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, segments and positions of rows that hold one document each."""
    positions_bt = np.broadcast_to(np.arange(tokens_bt.shape[1], dtype=np.int32), tokens_bt.shape)
    return tokens_bt, np.ones_like(tokens_bt), positions_bt


def random_tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TINY["vocab_size"], (rows, length)).astype(np.int32)


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    model = hugging_face(family, changes, tmp_path)
    tokens_bt = random_tokens(2, 150)  # longer than one block of queries, than the windows and than the first context
    states, expected_logits = expected(model, tokens_bt)
    for data, feature in ((1, 1), (2, 4)):
        loaded = load_backbone(str(tmp_path), None, "float32", make_mesh(MeshConfig(data=data, feature=feature)))
        for layer, state in enumerate(states):
            if feature > 1 and layer != 2:  # one compilation a layer: the other mesh shows it on one of them
                continue
            found = np.asarray(loaded.residual_fn(layer)(*whole(tokens_bt)))
            np.testing.assert_allclose(found, state, atol=1e-4, err_msg=f"layer {layer} on {data}x{feature}")
        resid_btd = loaded.residual_fn(loaded.config.n_layers)(*whole(tokens_bt))
        np.testing.assert_allclose(np.asarray(loaded.logits_fn()(resid_btd)), expected_logits, atol=1e-4)


def test_a_window_changes_what_is_seen(tmp_path: Path, mesh_1x1: Mesh) -> None:
    tokens_bt = random_tokens(1, 40)
    found = []
    for window in (8, 9, None):
        write_model(tmp_path / str(window), model_type="mistral", sliding_window=window)
        loaded = load_backbone(str(tmp_path / str(window)), 2, "float32", mesh_1x1)
        found.append(np.asarray(loaded.residual_fn(2)(*whole(tokens_bt))))
    assert np.array_equal(found[0][:, :8], found[2][:, :8])
    assert all(np.abs(a - b).max() > 1e-3 for a, b in ((found[0], found[1]), (found[1], found[2])))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, mesh_1x1: Mesh) -> Loaded:
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder, sliding_window=16, model_type="mistral")
    return load_backbone(str(folder), None, "float32", mesh_1x1)


def test_packed_documents_equal_separate_ones(tiny: Loaded) -> None:
    documents = [random_tokens(1, length, seed)[0] for seed, length in enumerate((70, 31, 60))]
    tokens_bt, segments_bt, positions_bt = (np.zeros((1, 170), np.int32) for _ in range(3))
    at = 0
    for segment, ids in enumerate(documents, 1):
        span = slice(at, at + len(ids))
        tokens_bt[0, span], segments_bt[0, span], positions_bt[0, span] = ids, segment, np.arange(len(ids))
        at += len(ids)
    packed = np.asarray(tiny.residual_fn(3)(tokens_bt, segments_bt, positions_bt))
    assert np.isfinite(packed).all()  # padding included
    at = 0
    for ids in documents:
        alone = np.asarray(tiny.residual_fn(3)(*whole(ids[None])))
        np.testing.assert_allclose(packed[:, at : at + len(ids)], alone, rtol=1e-5, atol=1e-4)
        at += len(ids)


def test_blocks_go_on_where_others_stopped(tmp_path: Path, mesh_1x1: Mesh) -> None:
    """With a window on the last block only, so that every block must find its own."""
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    write_model(tmp_path, model_type="qwen2", **windows)
    loaded = load_backbone(str(tmp_path), None, "float32", mesh_1x1)
    tokens, segments, positions = map(jnp.asarray, whole(random_tokens(2, 30)))
    whole_way = loaded.residual_fn(3)(tokens, segments, positions)
    for layer in (0, 1, 2, 3):
        x_btd = loaded.residual_fn(layer)(tokens, segments, positions)
        found = run_blocks(loaded.model, x_btd, segments, positions, layer, 3)
        np.testing.assert_allclose(np.asarray(found), np.asarray(whole_way), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"residual after 4 blocks asked of a backbone of which 3 are loaded"):
        run_blocks(loaded.model, x_btd, segments, positions, 3, 4)


@pytest.mark.parametrize("rows", [1, 5, 6])
def test_a_batch_in_pieces_is_the_batch_at_once(
    rows: int, tmp_path: Path, mesh_1x1: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 70 tokens at most: two rows of 30 where the batch divides by two, else one at a time."""
    write_model(tmp_path)
    monkeypatch.setattr(weights, "PIECE_TOKENS", 70)
    loaded = load_backbone(str(tmp_path), 3, "float32", mesh_1x1)
    batch = whole(random_tokens(rows, 30))
    two, three = loaded.residuals_fn((2, 3), "float32")(*batch)
    for layer, found in ((2, two), (3, three)):
        at_once = residual(loaded.model, *map(jnp.asarray, batch), layer)
        np.testing.assert_allclose(np.asarray(found), np.asarray(at_once), rtol=1e-4, atol=1e-4)
    padded = tuple(np.where(np.arange(rows)[:, None] < rows - 1, one, 0) for one in batch)
    (found,) = loaded.residuals_fn((3,), "float32")(*padded)
    np.testing.assert_allclose(np.asarray(found)[:-1], np.asarray(three)[:-1], rtol=1e-4, atol=1e-4)
    assert np.isfinite(np.asarray(found)).all() and (rows == 6 or not np.asarray(found)[-1].any())
    text = loaded.lower_residuals((3,), "float32", rows, 30).as_text()
    pieces = {1: 1, 5: 5, 6: 3}[rows]
    assert f"tensor<{pieces}x{rows // pieces}x30x" in text


def test_layer_zero_is_the_embedding(tiny: Loaded) -> None:
    tokens_bt = random_tokens(2, 8)
    found = np.asarray(tiny.residual_fn(0)(*whole(tokens_bt)))
    assert np.array_equal(found, np.asarray(tiny.model.embed_vd[...])[tokens_bt])


def test_bfloat16_parameters_stay_near_float32(tmp_path: Path, mesh: Mesh) -> None:
    write_model(tmp_path)
    tokens_bt = random_tokens(2, 24)
    exact, rounded = (load_backbone(str(tmp_path), 3, dtype, mesh) for dtype in ("float32", "bfloat16"))
    assert rounded.model.blocks["w_q"][...].dtype == jnp.bfloat16
    assert rounded.model.blocks["mlp_norm"][...].dtype == jnp.float32
    a, b = (np.asarray(loaded.residual_fn(3)(*whole(tokens_bt))) for loaded in (exact, rounded))
    assert b.dtype == np.float32
    assert np.abs(a - b).max() < 0.05 * np.abs(a).max()


def test_unscaled_frequencies_are_the_textbook_ones(tiny: Loaded) -> None:
    half = tiny.config.head_dim // 2
    np.testing.assert_allclose(inverse_frequencies(tiny.config), 10_000.0 ** (-np.arange(half) / half), rtol=1e-6)


def test_logits_of_a_part_are_refused(tmp_path: Path, mesh_1x1: Mesh) -> None:
    write_model(tmp_path)
    loaded = load_backbone(str(tmp_path), 2, "float32", mesh_1x1)
    with pytest.raises(UserError, match=r"logits need the whole model, but only 2 blocks are loaded"):
        logits(loaded.model, jnp.zeros((1, 1, 32)))
    with pytest.raises(UserError, match=r"residual after 3 blocks asked of a backbone of which 2 are loaded"):
        loaded.residual_fn(3)(*whole(random_tokens(1, 4)))


def test_rows_must_divide_over_the_mesh(tmp_path: Path, mesh_2x4: Mesh) -> None:
    write_model(tmp_path)
    loaded = load_backbone(str(tmp_path), 1, "float32", mesh_2x4)
    with pytest.raises(UserError, match=r"3 rows do not divide over mesh.data=2"):
        loaded.residual_fn(1)(*whole(random_tokens(3, 4)))


def test_several_layers_come_from_one_pass(tiny: Loaded) -> None:
    tokens_bt = np.random.default_rng(0).integers(0, 60, (8, 24)).astype(np.int32)
    found = tiny.residuals_fn((1, 3), "bfloat16")(*whole(tokens_bt))
    for layer, resid_btd in zip((1, 3), found, strict=True):
        alone = np.asarray(tiny.residual_fn(layer)(*whole(tokens_bt)))
        assert (
            resid_btd.dtype == "bfloat16"
            and np.abs(np.asarray(resid_btd, np.float32) - alone).max() < 0.01 * np.abs(alone).max()
        )


def test_products_have_the_gradients_of_an_einsum():
    rng = np.random.default_rng(5)
    shapes = {
        "...i,io->...o": ((2, 3, 4), (4, 5)), "btd,vd->btv": ((2, 3, 4), (6, 4)),
        "bkqh,bkhs->bkqs": ((2, 2, 3, 4), (2, 2, 4, 5)),
    }  # fmt: skip
    for axes, (left, right) in shapes.items():
        x, y = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (left, right))
        ours = jax.grad(lambda x, y, axes=axes: jnp.sum(jnp.sin(product(axes, x, y))), (0, 1))(x, y)
        theirs = jax.grad(lambda x, y, axes=axes: jnp.sum(jnp.sin(jnp.einsum(axes, x, y))), (0, 1))(x, y)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_bf16_backbone_is_trained_with_bf16_products(tmp_path: Path):
    """A float32 cotangent times a bf16 weight is what doubled the time of a LoRA step."""
    write_model(tmp_path / "model")
    loaded = load_backbone(str(tmp_path / "model"), None, "bfloat16", make_mesh(MeshConfig(data=1, feature=1)))
    graph, state = nnx.split(loaded.model)
    lora = LoraConfig(rank=2, dropout=0.1)
    learned = init_lora(loaded.config, lora, 0, loaded.mesh)
    tokens_bt, ones_bt = jnp.zeros((1, 16), jnp.int32), jnp.ones((1, 16), jnp.int32)

    def loss(learned: Any, state: Any) -> Any:
        model = nnx.merge(graph, state)
        places = jnp.arange(16, dtype=jnp.int32)[None]
        x_btd = residual(model, tokens_bt, ones_bt, places, model.layers, adapters(learned, lora, jax.random.key(0)))
        return logits(model, x_btd).sum()

    found = list(dots(jax.make_jaxpr(jax.grad(loss))(learned, state).jaxpr))
    assert len(found) > 30 and set(found) == {("bfloat16", "bfloat16")}


def dots(jaxpr: Any) -> Iterator[tuple[str, str]]:
    """Types of the operands of every product, those of loops included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(str(operand.aval.dtype) for operand in equation.invars)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(inner, jax.extend.core.ClosedJaxpr):
                    yield from dots(inner.jaxpr)
                elif isinstance(inner, jax.extend.core.Jaxpr):
                    yield from dots(inner)


@pytest.mark.parametrize("width", [1, 5, 64])
def test_dropout_keeps_its_share_and_every_place_has_its_own_draw(width: int):
    kept = np.asarray(chosen(jax.random.key(3), jnp.float32(0.9), (20_000 // width, width)))
    assert abs(kept.mean() - 0.9) < 0.01
    if width > 1:
        assert abs(np.corrcoef(kept[:, 0], kept[:, 1])[0, 1]) < 0.05, "two of a word are independent"
    assert np.asarray(chosen(jax.random.key(3), jnp.float32(1), (100, width))).all()
