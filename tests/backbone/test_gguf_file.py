"""A .gguf file loads as the Hugging Face folder with the same weights does; what it cannot say is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh

from fac_jax.backbone.weights import load_backbone, load_tokenizer, open_model
from fac_jax.errors import UserError
from tests.backbone.tiny_backbone import write_gguf, write_model


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "llama", "tie_word_embeddings": True}, {"model_type": "qwen2", "tie_word_embeddings": False}],
)
def test_equals_the_folder_with_the_same_weights(changes: dict[str, Any], tmp_path: Path, mesh_2x4: Mesh) -> None:
    write_gguf(tmp_path / "m.gguf", **changes)
    tensors = write_model(tmp_path / "m", **changes)
    (config, gguf), (folder_config, folder) = open_model(str(tmp_path / "m.gguf")), open_model(str(tmp_path / "m"))
    assert config == folder_config
    assert gguf.names() == folder.names() == set(tensors)
    for name, value in tensors.items():
        everything = (slice(None),) * value.ndim
        assert np.array_equal(gguf.read(name, everything), folder.read(name, everything)), name
    a, b = (load_backbone(str(tmp_path / name), 2, "float32", mesh_2x4).model for name in ("m.gguf", "m"))
    assert all(np.array_equal(np.asarray(a.blocks[name][...]), np.asarray(b.blocks[name][...])) for name in a.blocks)


def test_tokenizer(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    tokenizer = load_tokenizer(str(tmp_path / "m.gguf"))
    text = "the 12 caf\u00e9s\n<|end|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id == 258
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "th"
    assert len(tokenizer("12")["input_ids"]) == 2
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|start|>hi<|end|>"


def test_an_unknown_tokenizer_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", pre="deepseek-llm")
    with pytest.raises(UserError, match=r"GGUF tokenizer gpt2/deepseek-llm is not read; use the Hugging Face folder"):
        load_tokenizer(str(tmp_path / "m.gguf"))


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    for content in (b"not a model", whole[:200], whole[:-1000]):
        (tmp_path / "broken.gguf").write_bytes(content)
        with pytest.raises(UserError, match=r"broken.gguf: not a readable .gguf file"):
            open_model(str(tmp_path / "broken.gguf"))
