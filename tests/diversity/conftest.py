"""A tiny random BERT in the layout of sentence-transformers, written by Hugging Face's own classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *"abcdefghijklmnopqrstuvwxyz",
    *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
]
MakeModel = Callable[..., Path]


def write_tokenizer(path: Path) -> None:
    """Letters as WordPiece, padded to 128 tokens as published models have it, which a reader must undo."""
    numbers = {piece: number for number, piece in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=128)
    tokenizer.save(str(path))


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """`make_model(pooling="mean", normalise=True, **config)` -> folder."""
    import torch
    from transformers import BertConfig, BertModel

    def make(pooling: str = "mean", normalise: bool = True, max_tokens: int = 40, **config: Any) -> Path:
        folder = tmp_path_factory.mktemp("bert")
        torch.manual_seed(0)
        shape = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 50}
        settings = BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=48, **{**shape, **config})
        model = BertModel(settings)
        for parameter in model.parameters():  # biases and norms that do something
            parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        write_tokenizer(folder / "tokenizer.json")
        kinds = ["Transformer", "Pooling", *(["Normalize"] if normalise else [])]
        modules = [
            {"idx": i, "path": ["", "1_Pooling", "2_Normalize"][i], "type": f"sentence_transformers.models.{kind}"}
            for i, kind in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        modes = {
            f"pooling_mode_{mode}": mode.startswith(pooling)
            for mode in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
        }
        if pooling == "mean":
            modes["pooling_mode_mean_sqrt_len_tokens"] = False
        (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 24, **modes}))
        (folder / "sentence_bert_config.json").write_text(
            json.dumps({"max_seq_length": max_tokens, "do_lower_case": False})
        )
        return folder

    return make
