"""Decoding with slots and a cache against the plainest loop there is: the whole forward pass again for every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from fac_jax.backbone import decode
from fac_jax.backbone.generate import generate
from fac_jax.backbone.model import logits, residual, run_blocks
from fac_jax.backbone.weights import Loaded, load_backbone
from fac_jax.errors import UserError
from tests.backbone.tiny_backbone import write_model

SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0, "top_p": 0.9, "batch": 4, "stop_ids": ()}


def prompts_of(*lengths: int, seed: int = 0, shared: int = 0) -> list[list[int]]:
    """Random prompts whose first `shared` tokens are the same."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, 256, shared).tolist()
    return [start + rng.integers(0, 256, length - shared).tolist() for length in lengths]


def plain_steered(loaded: Loaded, prompt: list[int], new_tokens: int, vector_d: np.ndarray, layer: int) -> list[int]:
    """The same with a vector added to the residual after `layer` blocks, from the prompt's last token on."""
    config, model = loaded.config, loaded.model

    @jax.jit
    def forward(tokens_1t: np.ndarray) -> jax.Array:
        at_1t = jnp.broadcast_to(jnp.arange(tokens_1t.shape[1]), tokens_1t.shape)
        x_1td = residual(model, tokens_1t, jnp.ones_like(tokens_1t), at_1t, layer)
        x_1td = x_1td + jnp.where(at_1t[..., None] >= len(prompt) - 1, vector_d, 0)
        return logits(model, run_blocks(model, x_1td, jnp.ones_like(tokens_1t), at_1t, layer, config.n_layers))

    ids = list(prompt)
    while len(ids) < len(prompt) + new_tokens:
        tokens_1t = np.zeros((1, len(prompt) + new_tokens), np.int32)
        tokens_1t[0, : len(ids)] = ids
        ids.append(int(np.argmax(np.asarray(forward(tokens_1t))[0, len(ids) - 1])))
    return ids[len(prompt) :]


def plain_greedy(loaded: Loaded, prompt: list[int], new_tokens: int) -> list[int]:
    """The most probable token, again and again, without a cache (one padded shape, so that it compiles once)."""
    residual, logits = loaded.residual_fn(loaded.config.n_layers), loaded.logits_fn()
    ids = list(prompt)
    length = len(prompt) + new_tokens
    rows = loaded.mesh.shape["data"]
    for _ in range(new_tokens):
        tokens_bt = np.zeros((rows, length), np.int32)
        tokens_bt[:, : len(ids)] = ids
        positions_bt = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_bt.shape)
        resid_btd = residual(tokens_bt, np.ones_like(tokens_bt), positions_bt)
        ids.append(int(np.argmax(np.asarray(logits(resid_btd))[0, len(ids) - 1])))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, mesh_1x1: Mesh) -> Loaded:
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder, num_hidden_layers=2)
    return load_backbone(str(folder), None, "float32", mesh_1x1)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral", "sliding_window": 9, "tie_word_embeddings": True},
        {"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1},
    ],
    ids=["mistral", "qwen2"],
)
def test_greedy_equals_the_plain_loop(changes: dict[str, Any], tmp_path: Path, mesh: Mesh) -> None:
    write_model(tmp_path, num_hidden_layers=2, **changes)
    loaded = load_backbone(str(tmp_path), None, "float32", mesh)
    prompts = prompts_of(1, 70, 17, 90, 33, 5)  # more prompts than slots; some longer than a chunk
    found = generate(loaded, prompts, **SETTINGS | {"max_new_tokens": 6}, seeds=range(6))
    for number in (0, 1, 3):
        assert found[number] == plain_greedy(loaded, prompts[number], 6)


def test_bfloat16_and_shared_beginnings(tmp_path: Path, mesh_1x1: Mesh) -> None:
    write_model(tmp_path, num_hidden_layers=2)
    loaded = load_backbone(str(tmp_path), None, "bfloat16", mesh_1x1)
    prompts = prompts_of(80, 75, 80, 72, 76, shared=71)
    found = generate(loaded, prompts, **SETTINGS | {"max_new_tokens": 3}, seeds=range(5))
    assert found[1] == plain_greedy(loaded, prompts[1], 3)
    assert len({tuple(answer) for answer in found}) > 1


def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours(tiny: Loaded) -> None:
    settings = SETTINGS | {"temperature": 0.8}
    prompts = prompts_of(9, 30, 9, 21, 14, 30, 11)
    seeds = [5, 6, 7, 8, 9, 10, 2**40 + 11]
    together = generate(tiny, prompts, **settings, seeds=seeds)
    assert generate(tiny, prompts, **settings, seeds=seeds) == together
    for number in (0, 3, 6):
        assert generate(tiny, [prompts[number]], **settings, seeds=[seeds[number]]) == [together[number]]
    backwards = generate(tiny, prompts[::-1], **settings | {"batch": 2}, seeds=seeds[::-1])
    assert backwards[::-1] == together
    same = generate(tiny, [prompts[0]] * 6, **settings, seeds=[5, 6, 7, 8, 9, 5])
    assert same[0] == same[5] == together[0]
    assert len({tuple(answer) for answer in same}) == 5


def test_stop_tokens_end_a_continuation_and_are_not_part_of_it(tiny: Loaded) -> None:
    prompts = prompts_of(8, 12, 10)
    ended: dict[int, list[int]] = {}
    free = generate(tiny, prompts, **SETTINGS, seeds=range(3))
    assert all(len(answer) == 12 for answer in free)
    stop = free[0][4]
    settings = SETTINGS | {"stop_ids": {stop}}
    found = generate(tiny, prompts, **settings, seeds=range(3), on_done=ended.__setitem__)
    expected = [answer[: answer.index(stop)] if stop in answer else answer for answer in free]
    assert found == expected
    assert ended == dict(enumerate(expected))


def test_lengths_of_prompts_compile_nothing_new(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(tiny, prompts_of(40, 20), **SETTINGS | {"temperature": 0.7, "batch": 3}, seeds=[0, 1])
    traced = []
    monkeypatch.setattr(decode, "extend", lambda *_: traced.append("again"))
    for lengths, top_p, temperature in (((7, 50, 33, 2), 0.5, 0.7), ((51,), 1.0, 1.3)):
        settings = SETTINGS | {"temperature": temperature, "top_p": top_p, "batch": 3}
        generate(tiny, prompts_of(*lengths), **settings, seeds=range(len(lengths)))
    assert not traced


@pytest.mark.parametrize("layer", [1, 3])
def test_steered_greedy_equals_the_plain_loop(layer: int, tmp_path: Path, mesh: Mesh) -> None:
    """Steered rows beside others, and more prompts than slots: every slot is refilled with its prompt's own vector."""
    write_model(tmp_path, num_hidden_layers=3)
    loaded = load_backbone(str(tmp_path), None, "float32", mesh)
    prompts = prompts_of(20, 70, 9, 20, 33, 1, 20, shared=1)
    random = np.random.default_rng(1)
    vectors = [3 * random.standard_normal(32).astype(np.float32) for _ in prompts]
    steer = [None if number in (2, 5) else vector_d for number, vector_d in enumerate(vectors)]
    settings = SETTINGS | {"max_new_tokens": 5, "batch": 2}
    found = generate(loaded, prompts, **settings, seeds=range(7), steer=steer, layer=layer)
    free = generate(loaded, prompts, **settings, seeds=range(7))
    for number in (0, 1, 5, 6):
        vector_d = steer[number]
        nothing_d = np.zeros(32, np.float32)
        assert found[number] == plain_steered(
            loaded, prompts[number], 5, nothing_d if vector_d is None else vector_d, layer
        )
    assert [number for number in range(7) if found[number] == free[number]] == [2, 5], "who is not steered"


def test_steered_greedy_equals_transformers_with_a_hook(tmp_path: Path, mesh_1x1: Mesh) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    write_model(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    vector_d, prompt, layer = 2 * np.random.default_rng(3).standard_normal(32).astype(np.float32), prompts_of(12)[0], 2

    def add(module: Any, inputs: Any, x_1td: Any) -> Any:
        """After the block whose output is the residual after `layer` blocks."""
        return torch.cat([x_1td[:, : len(prompt) - 1], x_1td[:, len(prompt) - 1 :] + torch.tensor(vector_d)], dim=1)

    handle = model.model.layers[layer - 1].register_forward_hook(add)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    handle.remove()
    loaded = load_backbone(str(tmp_path), None, "float32", mesh_1x1)
    settings = SETTINGS | {"max_new_tokens": 8}
    assert generate(loaded, [prompt], **settings, seeds=[0], steer=[vector_d], layer=layer) == [ids[len(prompt) :]]


def test_a_vector_of_zeros_steers_nowhere(tiny: Loaded) -> None:
    prompts = prompts_of(9, 30, 9, 21, 14)
    for temperature in (0.0, 0.8):
        settings = SETTINGS | {"temperature": temperature}
        free = generate(tiny, prompts, **settings, seeds=range(5))
        none = generate(tiny, prompts, **settings, seeds=range(5), steer=[None] * 5)
        zero = generate(tiny, prompts, **settings, seeds=range(5), steer=[np.zeros(32, np.float32)] * 5, layer=1)
        assert free == none == zero


def test_other_vectors_compile_nothing_and_none_at_all_leaves_the_program_as_it_is(
    tiny: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, seeds = prompts_of(40, 20), [0, 1]
    generate(tiny, prompts, **SETTINGS, seeds=seeds)
    generate(tiny, prompts, **SETTINGS, seeds=seeds, steer=[np.ones(32, np.float32), None], layer=2)
    traced = []
    monkeypatch.setattr(decode, "extend", lambda *_: traced.append("again"))
    generate(tiny, prompts, **SETTINGS, seeds=seeds, steer=[None, np.full(32, 7, np.float32)], layer=2)
    generate(tiny, prompts, **SETTINGS, seeds=seeds)
    assert not traced


def test_nothing_to_do(tiny: Loaded) -> None:
    assert generate(tiny, [], **SETTINGS, seeds=[]) == []
    assert generate(tiny, [[1]], **SETTINGS | {"max_new_tokens": 0}, seeds=[0]) == [[]]


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[1], []], {}, r"prompt 1 is empty"),
        ([[1], [260]], {}, r"prompt 1 has a token outside the vocabulary of 260"),
        ([[1], [2]], {"seeds": [1]}, r"2 prompts came with 1 seeds"),
        ([[1] * 505], {}, r"prompt 0 has 505 tokens and 12 more are asked, but the model's context is 512"),
        ([[1]], {"top_p": 0.0}, r"top_p 0.0 must lie in \(0, 1\]"),
        ([[1]], {"temperature": -1.0}, r"temperature -1.0 must not be negative"),
        ([[1], [2]], {"steer": [np.ones(32)], "layer": 1}, r"2 prompts came with 1 vectors to steer by"),
        ([[1]], {"steer": [np.ones(32)]}, r"steering after None blocks was asked for; the model has blocks 1 to 2"),
        ([[1]], {"steer": [np.ones(32)], "layer": 3}, r"steering after 3 blocks was asked for"),
        ([[1], [2]], {"steer": [None, np.ones(31)], "layer": 1}, r"prompt 1 is steered by a vector of shape \(31,\)"),
        ([[1]], {"steer": [np.full(32, np.nan)], "layer": 1}, r"it must hold 32 finite numbers"),
    ],
)
def test_bad_requests(prompts: list[list[int]], changes: dict[str, Any], message: str, tiny: Loaded) -> None:
    settings = SETTINGS | {"seeds": range(len(prompts))} | changes
    with pytest.raises(UserError, match=message):
        generate(tiny, prompts, **settings)


def test_a_part_of_a_model_cannot_write(tmp_path: Path, mesh_1x1: Mesh) -> None:
    write_model(tmp_path)
    part = load_backbone(str(tmp_path), 2, "float32", mesh_1x1)
    with pytest.raises(UserError, match=r"generation needs the whole model, but 2 of 3 blocks are loaded"):
        generate(part, [[1]], **SETTINGS, seeds=[0])
