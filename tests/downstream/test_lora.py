"""Adapters and objectives against peft and transformers on tiny random models: losses and gradients, packed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from fac_jax.backbone.adapter import Adapter
from fac_jax.backbone.export import export_hf
from fac_jax.backbone.model import logits, residual
from fac_jax.backbone.weights import Loaded, load_backbone
from fac_jax.config.downstream import LoraConfig
from fac_jax.config.machine import MeshConfig
from fac_jax.downstream.lora import MODULES, adapters, init_lora, save_peft
from fac_jax.downstream.objectives import Objective, Piece, loss_sum, scores
from fac_jax.downstream.pieces import Text, pack_batch, rows_for
from fac_jax.errors import UserError
from fac_jax.mesh import make_mesh
from tests.backbone.test_model import CASES, hugging_face, whole

LORA = LoraConfig(rank=4, alpha=6.0, dropout=0.0)


def texts(lengths: list[int], vocab: int = 260, seed: int = 0) -> list[Text]:
    """Random tokens; the last two thirds of each are a completion."""
    random = np.random.default_rng(seed)
    made = []
    for place, length in enumerate(lengths):
        ids = random.integers(0, vocab, length).astype(np.int32)
        made.append(Text(ids, np.arange(length) >= length // 3, float(place % 2), 1.0 + place % 3))
    return made


def with_peft(model: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """The model with random adapters, and these adapters as ours are laid out."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    names = [name.rpartition(".")[2] for name in MODULES.values()]
    config = peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, lora_dropout=0.0, target_modules=names)
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn_like(value) * 0.2)
    return adapted, ours(adapted, lambda value: value.detach())


def ours(adapted: Any, read: Any) -> dict[str, np.ndarray]:
    """What `read` says of each of peft's adapters, stacked over blocks and transposed, under our names."""
    blocks = adapted.base_model.model.model.layers
    found = {}
    for short, name in MODULES.items():
        part, module = name.split(".")
        layers = [getattr(getattr(block, part), module) for block in blocks]
        for side in "ab":
            values = [read(getattr(layer, f"lora_{side.upper()}")["default"].weight).numpy().T for layer in layers]
            found[f"lora_{side}_{short}"] = np.stack(values)
    return found


def loss_of_peft(adapted: Any, head_d: Any, groups: list[tuple[Text, ...]], objective: Objective) -> Any:
    """The same loss one text at a time, unpacked, from Hugging Face's outputs."""
    import torch
    from torch.nn import functional as F

    total = torch.zeros(())
    for group in groups:
        found = []
        for text in group:
            ids = torch.tensor(text.ids_t[None].astype(np.int64))
            if objective == "completion":
                labels = torch.where(torch.tensor(text.learned_t[None]), ids, -100)
                learned = int(text.learned_t[1:].sum())
                total = total + adapted(input_ids=ids, labels=labels).loss * learned
            else:  # its last hidden state is after the final norm
                out = adapted(input_ids=ids, output_hidden_states=True)
                found.append(out.hidden_states[-1][0, -1] @ head_d)
        if objective == "classifier":
            label = torch.tensor(group[0].label)
            total = total + group[0].weight * F.binary_cross_entropy_with_logits(found[0], label)
        if objective == "reward":
            total = total - group[0].weight * F.logsigmoid(found[0] - found[1])
    return total


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("objective", ["classifier", "reward", "completion"])
@pytest.mark.parametrize(("family", "shape"), [("llama-3.1", (1, 1)), ("qwen2", (2, 4))])
def test_losses_and_gradients_are_those_of_peft(
    tmp_path: Path, family: str, shape: tuple[int, int], objective: Objective
) -> None:
    import torch

    mesh = make_mesh(MeshConfig(*shape))
    adapted, params = with_peft(hugging_face(*CASES[family], tmp_path))
    loaded = load_backbone(str(tmp_path), None, "float32", mesh)
    made = texts([9, 14, 20, 5, 12, 17, 31, 8])
    groups: list[tuple[Text, ...]] = (
        [(made[i], made[i + 1]) for i in range(0, 8, 2)] if objective == "reward" else [(text,) for text in made]
    )
    head = np.random.default_rng(3).normal(0, 0.3, 32).astype(np.float32)
    torch_head = torch.tensor(head, requires_grad=True)
    expected = loss_of_peft(adapted, torch_head, groups, objective)
    expected.backward()
    wanted = ours(adapted, lambda value: value.grad)

    def loss(params: dict[str, Any], head_d: Any, piece: Piece) -> Any:
        return loss_sum(loaded.model, head_d, adapters(params, LORA, None), piece, objective)

    pieces, compute = pack_batch(groups, 2, 40, len(groups)), jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    assert len(pieces) > 1, "the batch is accumulated"
    total, gradient = 0.0, None
    for piece in pieces:
        value, found = compute(params, head, piece)
        total += float(value)
        gradient = found if gradient is None else jax.tree.map(jnp.add, gradient, found)
    assert total == pytest.approx(expected.item(), rel=1e-5)
    assert gradient is not None
    if objective == "completion":
        assert not np.asarray(gradient[1]).any()
    else:
        wanted["head"] = torch_head.grad.numpy()
    for name, value in wanted.items():
        got = np.asarray(gradient[1] if name == "head" else gradient[0][name])
        assert np.abs(value).max() > 1e-3, f"{name} is reached"
        np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-4 * np.abs(value).max(), err_msg=name)


def test_merged_matrices_do_what_the_adapters_do(tmp_path: Path, mesh: Mesh) -> None:
    hugging_face(*CASES["qwen2"], tmp_path / "model")
    loaded = load_backbone(str(tmp_path / "model"), None, "float32", mesh)
    params = filled(loaded, LORA)
    batch = whole(np.random.default_rng(0).integers(0, 260, (2, 24)).astype(np.int32))
    adapted = logits(loaded.model, residual(loaded.model, *batch, 3, adapters(params, LORA, None)))
    (tmp_path / "saved").mkdir()
    save_peft(tmp_path / "saved", params, jnp.ones(32), LORA, str(tmp_path / "model"))
    folder = export_hf(str(tmp_path / "model"), tmp_path / "merged", adapter=Adapter(tmp_path / "saved"))
    alone = load_backbone(str(folder), None, "float32", mesh).model
    np.testing.assert_allclose(logits(alone, residual(alone, *batch, 3)), adapted, atol=2e-4)
    plain = logits(loaded.model, residual(loaded.model, *batch, 3))
    assert np.abs(np.asarray(plain - adapted)).max() > 0.1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_peft_loads_what_was_saved(tmp_path: Path, mesh_1x1: Mesh) -> None:
    import peft
    import torch

    model = hugging_face(*CASES["qwen2"], tmp_path / "model")
    loaded = load_backbone(str(tmp_path / "model"), None, "float32", mesh_1x1)
    lora = LoraConfig(rank=4, alpha=6.0, matrices=("q", "o", "gate", "down"))
    params = filled(loaded, lora)
    (tmp_path / "saved").mkdir()
    save_peft(tmp_path / "saved", params, jnp.ones(32), lora, str(tmp_path / "model"))
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "saved")).eval()
    tokens_bt = np.random.default_rng(0).integers(0, 260, (2, 24)).astype(np.int32)
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens_bt.astype(np.int64))).logits.numpy()
    got = logits(loaded.model, residual(loaded.model, *whole(tokens_bt), 3, adapters(params, lora, None)))
    np.testing.assert_allclose(np.asarray(got), wanted, atol=1e-4 * np.abs(wanted).max())


def test_adapters_start_as_nothing_and_lie_like_their_matrices(tmp_path: Path, mesh_2x4: Mesh) -> None:
    hugging_face(*CASES["qwen2"], tmp_path)
    loaded = load_backbone(str(tmp_path), None, "float32", mesh_2x4)
    lora = LoraConfig(rank=4, matrices=("q", "down"))
    params = init_lora(loaded.config, lora, 0, mesh_2x4)
    assert sorted(params) == ["lora_a_down", "lora_a_q", "lora_b_down", "lora_b_q"]
    assert sum(leaf.size for leaf in params.values()) == 3 * 4 * (32 + 32 + 48 + 32)
    assert not np.asarray(params["lora_b_q"]).any() and not np.asarray(params["lora_b_down"]).any()
    bound = np.abs(np.asarray(params["lora_a_q"])).max()
    assert 0.9 / np.sqrt(32) < bound <= 1 / np.sqrt(32), "uniform, as peft starts"
    assert params["lora_b_q"].sharding.spec[2] == "feature" and params["lora_a_down"].sharding.spec[1] == "feature"
    batch = whole(np.random.default_rng(0).integers(0, 260, (2, 24)).astype(np.int32))
    np.testing.assert_array_equal(
        residual(loaded.model, *batch, 3, adapters(params, lora, None)), residual(loaded.model, *batch, 3)
    )
    other = init_lora(loaded.config, lora, 1, mesh_2x4)
    assert (np.asarray(other["lora_a_q"]) != np.asarray(params["lora_a_q"])).any()


def test_dropout_is_of_the_adapters_only_and_keeps_their_mean(tmp_path: Path, mesh_1x1: Mesh) -> None:
    hugging_face(*CASES["qwen2"], tmp_path)
    loaded = load_backbone(str(tmp_path), None, "float32", mesh_1x1)
    lora = LoraConfig(rank=4, dropout=0.3, matrices=("v",))
    params = filled(loaded, lora)
    batch = whole(np.random.default_rng(0).integers(0, 260, (1, 24)).astype(np.int32))

    def first_block(params: dict[str, Any], key: Any) -> Any:
        return residual(loaded.model, *batch, 1, jax.tree.map(lambda leaf: leaf[:1], adapters(params, lora, key)))

    one = jax.jit(lambda key: first_block(params, key))
    drawn = np.stack([np.asarray(one(jax.random.key(seed))) for seed in range(300)])
    certain = np.asarray(first_block(params, None))
    assert drawn.std(0).max() > 0.01, "keys differ"
    np.testing.assert_array_equal(drawn[0], np.asarray(one(jax.random.key(0))))
    attention = np.abs(drawn.mean(0) - certain).mean() / drawn.std(0).mean()
    assert attention < 0.3, "the mean over keys is the adapter without dropout, but for the MLP behind it"
    nothing = init_lora(loaded.config, lora, 0, mesh_1x1)
    np.testing.assert_array_equal(first_block(nothing, jax.random.key(0)), residual(loaded.model, *batch, 1))


def filled(loaded: Loaded, lora: LoraConfig) -> dict[str, Any]:
    """Adapters as after some training: B is not 0."""
    params = init_lora(loaded.config, lora, 0, loaded.mesh)
    return {
        name: value + 0.2 * jax.random.normal(jax.random.key(place), value.shape)
        for place, (name, value) in enumerate(sorted(params.items()))
    }


def test_pieces_hold_every_text_once_and_pairs_together() -> None:
    made = texts([9, 14, 20, 5, 12, 17, 31, 8, 40, 2])
    groups = [(made[i], made[i + 1]) for i in range(0, 10, 2)]
    pieces = pack_batch(groups, 2, 40, len(groups))
    assert {piece.tokens_bt.shape for piece in pieces} == {(2, 40)} and {len(p.last_n) for p in pieces} == {10}
    found = []
    for piece in pieces:
        there = np.flatnonzero(piece.there_n)
        assert (there == np.arange(len(there))).all() and len(there) % 2 == 0
        for slot in there:
            row, stop = divmod(int(piece.last_n[slot]), 40)
            mine = np.flatnonzero(piece.segments_bt[row] == piece.segments_bt[row, stop])
            assert mine[-1] == stop and (piece.positions_bt[row, mine] == np.arange(len(mine))).all()
            found.append((piece.tokens_bt[row, mine].tolist(), piece.label_n[slot], piece.weight_n[slot]))
            learned = piece.target_weight_bt[row, mine]
            text = made[len(found) - 1]
            assert learned.tolist() == [*text.learned_t[1:].astype(float), 0.0]
            assert (piece.target_bt[row, mine][:-1] == text.ids_t[1:]).all()
    assert found == [(text.ids_t.tolist(), text.label, text.weight) for text in made]


@pytest.mark.parametrize(
    ("lengths", "rows"), [([9], 1), ([30, 10], 1), ([30, 11], 2), ([40, 40, 1], 4), ([40] * 9, 6), ([40] * 5, 6)]
)
def test_short_batches_take_few_rows(lengths: list[int], rows: int) -> None:
    assert rows_for([(text,) for text in texts(lengths)], 1, 6, 40) == rows
    assert rows_for([(text,) for text in texts(lengths)], 2, 6, 40) == max(2, rows)


@pytest.mark.parametrize("lengths", [[41], [40, 39, 41]])
def test_what_fits_no_row_is_refused(lengths: list[int]) -> None:
    with pytest.raises(UserError, match="texts of 41 tokens do not fit 2 rows of 40"):
        pack_batch([(text,) for text in texts(lengths)], 2, 40, 3)
    with pytest.raises(UserError, match="texts of 30 and 30 tokens do not fit 1 rows of 40"):
        pack_batch([tuple(texts([30, 30]))], 1, 40, 1)


def test_scores_do_not_depend_on_what_lies_beside(tmp_path: Path, mesh_1x1: Mesh) -> None:
    hugging_face(*CASES["llama-3.1"], tmp_path)
    loaded = load_backbone(str(tmp_path), None, "float32", mesh_1x1)
    made = [(text,) for text in texts([9, 14, 20, 5])]
    head = jnp.asarray(np.random.default_rng(3).normal(0, 1, 32), jnp.float32)
    (together,) = pack_batch(made, 2, 40, 4)
    alone = [pack_batch([one], 1, 40, 1)[0] for one in made]
    np.testing.assert_allclose(
        scores(loaded.model, head, None, together),
        np.concatenate([np.asarray(scores(loaded.model, head, None, piece)) for piece in alone]),
        atol=1e-4,
    )
