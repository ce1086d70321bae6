"""Nats a token against transformers, which sees each text alone and without padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from jax.sharding import Mesh

from fac_jax.backbone.weights import Loaded, load_backbone
from fac_jax.errors import UserError
from fac_jax.llm import fluency
from fac_jax.llm.fluency import nats_per_token
from fac_jax.llm.local import LocalGenerator
from tests.backbone.tiny_backbone import write_model


def texts_of(*lengths: tuple[int, int]) -> tuple[list[list[int]], list[list[int]]]:
    """Random prompts and replies of so many tokens."""
    random = np.random.default_rng(0)
    prompts, replies = ([random.integers(0, 256, pair[side]).tolist() for pair in lengths] for side in (0, 1))
    return prompts, replies


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, mesh_1x1: Mesh) -> Loaded:
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder)
    return load_backbone(str(folder), None, "float32", mesh_1x1)


def test_equals_transformers(tmp_path: Path, mesh: Mesh) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    write_model(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompts, replies = texts_of((40, 7), (1, 1), (5, 80), (70, 70), (3, 2), (12, 20))
    expected = []
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = torch.tensor([[*prompt, *reply]])
        with torch.no_grad():
            log_tv = model(ids).logits[0].log_softmax(-1)
        expected.append(-np.mean([float(log_tv[len(prompt) - 1 + i, token]) for i, token in enumerate(reply)]))
    loaded = load_backbone(str(tmp_path), None, "float32", mesh)
    np.testing.assert_allclose(nats_per_token(loaded, prompts, replies), expected, atol=1e-4)


def test_what_is_computed_along_changes_nothing(tiny: Loaded) -> None:
    prompts, replies = texts_of((40, 7), (20, 9), (5, 80), (33, 70), (3, 2))
    together = nats_per_token(tiny, prompts, replies)
    alone = [nats_per_token(tiny, [prompt], [reply])[0] for prompt, reply in zip(prompts, replies, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_texts_of_other_lengths_compile_nothing_new(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    nats_per_token(tiny, *texts_of((30, 20), (50, 60)))
    traced: list[str] = []
    monkeypatch.setattr(fluency, "residual", lambda *_: traced.append("again"))
    nats_per_token(tiny, *texts_of((70, 44), (33, 33), (90, 20), (80, 1), (66, 60)))
    assert not traced


def test_a_reply_without_tokens_has_no_figure(tiny: Loaded) -> None:
    found_n = nats_per_token(tiny, *texts_of((3, 4), (3, 0)))
    assert np.isfinite(found_n[0]) and np.isnan(found_n[1]) and found_n.dtype == np.float32
    assert nats_per_token(tiny, [], []).shape == (0,)


def test_the_writer_measures_texts_as_its_replies(tiny: Loaded) -> None:
    writer = LocalGenerator(tiny, "tiny", 2)
    messages = [({"role": "user", "content": "ab"},), ({"role": "user", "content": "a"},)]
    tokenizer = tiny.tokenizer
    prompts = [tokenizer(f"<|start|>{one}<|end|>")["input_ids"] for one in ("ab", "a")]
    replies = [tokenizer(one)["input_ids"] for one in ("the reply", "x")]
    found_n = writer.nats_per_token(messages, ["the reply", "x"])
    assert np.array_equal(found_n, nats_per_token(tiny, prompts, replies))


def test_what_cannot_be_measured_is_said(tiny: Loaded, tmp_path: Path, mesh_1x1: Mesh) -> None:
    with pytest.raises(UserError, match="text 1 has 500 tokens of prompt and 13 of reply.*context is 512"):
        nats_per_token(tiny, *texts_of((1, 1), (500, 13)))
    with pytest.raises(UserError, match="text 0 has 0 tokens of prompt"):
        nats_per_token(tiny, [[]], [[1]])
    write_model(tmp_path)
    with pytest.raises(UserError, match="fluency needs the whole model"):
        nats_per_token(load_backbone(str(tmp_path), 2, "float32", mesh_1x1), [[1]], [[1]])
