"""A .gguf file, or a model with an adapter merged into it, becomes a Hugging Face folder: for programs that read
nothing else, such as transformers or a vLLM server.

Reads the model tensor by tensor; writes `config.json`, `generation_config.json`, safetensors (several files with an
index when they are large) and the tokenizer into a folder that appears only when it is whole.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from fac_jax.backbone import gguf_file
from fac_jax.backbone.adapter import Adapter
from fac_jax.backbone.hf_folder import INDEX, SINGLE, hub_fetch, local_fetch
from fac_jax.backbone.weights import DTYPES, Tensors, load_tokenizer, open_model
from fac_jax.corpus_files import local_files
from fac_jax.errors import UserError
from fac_jax.runs import writing_folder

BYTES_PER_FILE = 2 * 2**30


def export_hf(
    source: str,
    folder: str | Path,
    dtype: str = "float32",
    bytes_per_file: int = BYTES_PER_FILE,
    adapter: Adapter | None = None,
) -> Path:
    """Write the model `source`, with the adapter's additions if there is one, as a Hugging Face folder; returns it.

    float32 keeps expanded values and what is added exactly, bfloat16 halves the size. Raises UserError for a source
    that is such a folder already, tensors that do not fit its config, an adapter of another model, a folder that
    already holds something, and an unknown dtype.
    """
    folder = Path(folder)
    if not source.endswith(".gguf") and adapter is None:
        raise UserError(f"{source} is no .gguf file; a Hugging Face model needs no conversion")
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; choose from {list(DTYPES)}")
    tensors = open_model(source)[1]  # refuses what cannot be read before anything is written
    if adapter is not None and (unknown := sorted(adapter.names() - tensors.names())):
        raise UserError(
            f"{adapter.where} adds to {unknown[0]}, which {source} has not: it is an adapter of another model"
        )
    with writing_folder(folder) as partial:
        for name, values in _configs(source, dtype).items():
            (partial / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        _write_weights(tensors, adapter, partial, DTYPES[dtype], bytes_per_file)
        load_tokenizer(source).save_pretrained(partial)
    return folder


def _configs(source: str, dtype: str) -> dict[str, Any]:
    """config.json and generation_config.json."""
    if not source.endswith(".gguf"):
        fetch = local_fetch(Path(source)) if Path(source).is_dir() else hub_fetch(source)
        files = {name: path for name in ("config.json", "generation_config.json") if (path := fetch(name))}
        found = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items()}
        return {**found, "config.json": {**found["config.json"], "dtype": dtype}}
    config = {key: value for key, value in gguf_file.read_config(local_files(source)[0]).items() if value is not None}
    # Both forms: transformers 5 reads rope_parameters, older programs rope_theta.
    config |= {"dtype": dtype, "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]}}
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    return {"config.json": config, "generation_config.json": ids}


def _write_weights(
    tensors: Tensors, adapter: Adapter | None, folder: Path, dtype: np.dtype, bytes_per_file: int
) -> None:
    shapes = tensors.shapes(sorted(tensors.names()))

    def read(name: str) -> np.ndarray:
        weight = tensors.read(name, (slice(None),) * len(shapes[name]))
        return np.ascontiguousarray(weight if adapter is None else adapter.added_to(name, weight), dtype)

    groups: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * dtype.itemsize
        if groups[-1] and held + size > bytes_per_file:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    files = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    files = [SINGLE] if len(groups) == 1 else files
    for file, names in zip(files, groups, strict=True):
        save_file({name: read(name) for name in names}, folder / file, {"format": "pt"})
    if len(files) > 1:
        total = sum(int(np.prod(shape)) * dtype.itemsize for shape in shapes.values())
        where = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
