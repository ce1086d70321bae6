"""A .gguf file becomes a Hugging Face folder, for programs that read nothing else (transformers, a vLLM server).

Reads a .gguf file, tensor by tensor; writes `config.json`, `generation_config.json`, safetensors (several files with an
index when they are large) and the tokenizer into a folder that appears only when it is whole.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fac_jax.backbone import gguf_file
from fac_jax.backbone.hf_folder import INDEX, SINGLE
from fac_jax.backbone.weights import DTYPES, load_tokenizer, open_model
from fac_jax.corpus_files import local_files
from fac_jax.errors import UserError
from fac_jax.runs import writing_folder

BYTES_PER_FILE = 2 * 2**30


def export_hf(source: str, folder: str | Path, dtype: str = "float32", bytes_per_file: int = BYTES_PER_FILE) -> Path:
    """Write the .gguf file `source` (a path or pkg://PACKAGE/FILE.gguf) as a Hugging Face folder; returns the folder.

    float32 keeps the expanded values exactly, bfloat16 halves the size. Raises UserError for a source that is no
    .gguf file, tensors that do not fit its config, a folder that already holds something, and an unknown dtype.
    """
    folder = Path(folder)
    if not source.endswith(".gguf"):
        raise UserError(f"{source} is no .gguf file; a Hugging Face model needs no conversion")
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; choose from {list(DTYPES)}")
    open_model(source)  # refuses what cannot be read before anything is written
    path = local_files(source)[0]
    with writing_folder(folder) as partial:
        _write_configs(path, partial, dtype)
        _write_weights(path, partial, DTYPES[dtype], bytes_per_file)
        load_tokenizer(source).save_pretrained(partial)
    return folder


def _write_configs(path: Path, folder: Path, dtype: str) -> None:
    config = {key: value for key, value in gguf_file.read_config(path).items() if value is not None}
    # Both forms: transformers 5 reads rope_parameters, older programs rope_theta.
    config |= {"dtype": dtype, "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]}}
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    for name, value in (("config.json", config), ("generation_config.json", ids)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_weights(path: Path, folder: Path, dtype: np.dtype, bytes_per_file: int) -> None:
    tensors = gguf_file.GgufTensors(path)
    shapes = tensors.shapes(sorted(tensors.names()))
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
        whole = {name: tensors.read(name, (slice(None),) * len(shapes[name])) for name in names}
        save_file({name: np.ascontiguousarray(w, dtype) for name, w in whole.items()}, folder / file, {"format": "pt"})
    if len(files) > 1:
        total = sum(int(np.prod(shape)) * dtype.itemsize for shape in shapes.values())
        where = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
