"""Activations gathered and kept the way torch code does it, in a process of its own: peers of `fac bench activations`.

Run by path with whatever Python has torch and transformers, so it imports nothing of fac_jax:

    python torch_activations.py '{"part": "harvest", "contender": "official", "hf_model": FOLDER, "layer": 15,
                                  "device": "cpu", "dtype": "float32", "ids": IDS.json, "folder": EMPTY}'
    python torch_activations.py '{"part": "write", "d_model": 576, "rows": 100000, "folder": EMPTY}'
    python torch_activations.py '{"part": "read", "batch_rows": 4096, "passes": 3, "folder": WRITTEN}'

The last line it prints is JSON: seconds, what was counted, peak memory in bytes; or why it cannot run.
harvest reads a Hugging Face folder and token ids with their content masks, and writes what the published code writes:
one torch.save of 256 sequences' content rows, a list of [t, d] bfloat16 tensors. `official` is that code's loop, one
prompt at a time through the whole model; the `hf_` ones are what a careful user of transformers makes of it. write and
read are that layout of files alone, with random rows.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

SEQUENCES_PER_FILE = 256
TOKENS_PER_SEQUENCE = 286  # what the published code keeps of a conversation
BATCH = 16  # padded together
CHUNK_BYTES = 2**24

Ids = list[torch.Tensor]
Residuals = Iterator[tuple[list[int], torch.Tensor]]
"""Indices of sequences, and their residuals [b, t, d] (right-padded)."""


def official(model: Any, ids: Ids, layer: int) -> Residuals:
    """One prompt at a time through all layers and the unembedding, every hidden state kept."""
    for index, ids_t in enumerate(ids):
        outputs = model(input_ids=ids_t[None], output_hidden_states=True)
        yield [index], outputs.hidden_states[layer]


def hf_padded(model: Any, ids: Ids, layer: int) -> Residuals:
    """Padded batches in the order of arrival, all layers, no unembedding."""
    yield from _batches(model.model, ids, range(len(ids)), _kept(layer))


def hf_sorted(model: Any, ids: Ids, layer: int) -> Residuals:
    """The same, sorted by length, so that hardly anything is padded."""
    yield from _batches(model.model, ids, _by_length(ids), _kept(layer))


def hf_sorted_cut(model: Any, ids: Ids, layer: int) -> Residuals:
    """Sorted by length, and the layers above the one that is read are taken off: as good as transformers gets."""
    model.model.layers = model.model.layers[:layer]
    model.model.norm = torch.nn.Identity()
    yield from _batches(model.model, ids, _by_length(ids), lambda model, **given: model(**given).last_hidden_state)


def _by_length(ids: Ids) -> list[int]:
    return sorted(range(len(ids)), key=lambda index: len(ids[index]))


def _kept(layer: int) -> Callable[..., torch.Tensor]:
    return lambda model, **given: model(**given, output_hidden_states=True).hidden_states[layer]


def _batches(model: Any, ids: Ids, order: Any, residual: Callable[..., torch.Tensor]) -> Residuals:
    for start in range(0, len(ids), BATCH):
        chosen = list(order[start : start + BATCH])
        tokens_bt = pad_sequence([ids[index] for index in chosen], batch_first=True)
        real_bt = pad_sequence([torch.ones_like(ids[index]) for index in chosen], batch_first=True)
        yield chosen, residual(model, input_ids=tokens_bt, attention_mask=real_bt, use_cache=False)


HARVESTERS = {one.__name__: one for one in (official, hf_padded, hf_sorted, hf_sorted_cut)}


def harvest(asked: dict[str, Any]) -> dict[str, Any]:
    """All documents once, timed to the last file, after a few that warm up."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_default_device("cuda" if asked.get("device") == "gpu" else "cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(asked["hf_model"], dtype=getattr(torch, asked["dtype"]))
    model = model.to(torch.get_default_device())
    documents = json.loads(Path(asked["ids"]).read_text())
    ids = [torch.tensor(one) for one in documents["ids"]]
    content = [torch.tensor(one, dtype=torch.bool) for one in documents["content"]]
    harvester, folder = HARVESTERS[asked["contender"]], Path(asked["folder"])
    for _ in harvester(model, ids[: 2 * BATCH] if asked["contender"] != "official" else ids[:8], asked["layer"]):
        pass
    started, held, files, rows = time.perf_counter(), [], 0, 0
    for indices, resid_btd in harvester(model, ids, asked["layer"]):
        for index, resid_td in zip(indices, resid_btd, strict=True):
            held.append(resid_td[: len(ids[index])][content[index]].to("cpu", torch.bfloat16))
            rows += len(held[-1])
        while len(held) >= SEQUENCES_PER_FILE:
            files = _save(held[:SEQUENCES_PER_FILE], folder, files)
            held = held[SEQUENCES_PER_FILE:]
    if held:
        _save(held, folder, files)
    seconds = time.perf_counter() - started
    version = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return {"seconds": [seconds], "count": sum(map(len, ids)), "rows": rows, "version": version}


def _save(sequences: list[torch.Tensor], folder: Path, number: int) -> int:
    torch.save(sequences, folder / f"{number:05d}.pt")
    return number + 1


def write(asked: dict[str, Any]) -> dict[str, Any]:
    """Random rows as files of 256 sequences, timed until they are on the disk."""
    rows, folder, number = asked["rows"], Path(asked["folder"]), 0
    pool_nd = torch.randn(TOKENS_PER_SEQUENCE, asked["d_model"], dtype=torch.bfloat16)
    lengths = [min(TOKENS_PER_SEQUENCE, rows - start) for start in range(0, rows, TOKENS_PER_SEQUENCE)]
    os.sync()
    started = time.perf_counter()
    for start in range(0, len(lengths), SEQUENCES_PER_FILE):
        # clone, as a tensor is saved with all the memory that it is a view of
        held = [pool_nd[:length].clone() for length in lengths[start : start + SEQUENCES_PER_FILE]]
        number = _save(held, folder, number)
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    return {"seconds": [time.perf_counter() - started], "count": rows, "version": f"torch {torch.__version__}"}


def read(asked: dict[str, Any]) -> dict[str, Any]:
    """File by file in random order, each shuffled, in batches: how training reads that layout. Once a pass."""
    files, batch, rows, seconds = sorted(Path(asked["folder"]).iterdir()), asked["batch_rows"], 0, []
    chunk = bytearray(CHUNK_BYTES)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(chunk):  # into the page cache
                pass
    for _ in range(asked["passes"]):
        started, rows = time.perf_counter(), 0
        for index in torch.randperm(len(files)):
            rows_nd = torch.cat(torch.load(files[index]))
            order = torch.randperm(len(rows_nd))
            for start in range(0, len(order), batch):
                rows += len(rows_nd[order[start : start + batch]])
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "count": rows, "version": f"torch {torch.__version__}"}


PARTS = {"harvest": harvest, "write": write, "read": read}


def main() -> None:
    """Measure what the argument names."""
    asked = json.loads(sys.argv[1])
    torch.manual_seed(0)
    try:
        with torch.inference_mode():
            found = PARTS[asked["part"]](asked)
    except ImportError as error:
        print(json.dumps({"absent": f"transformers cannot be imported here ({error})"}))
        return
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if asked.get("device") == "gpu" else of_process
    print(json.dumps({**found, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
