"""A corpus scanned for what activates each feature, the way torch code does it, in a process of its own: peers of
`fac bench scan`.

Run by path with whatever Python has torch, transformers and delphi, so it imports nothing of fac_jax:

    python torch_scan.py '{"contender": "official", "hf_model": FOLDER, "layer": 15, "sae": SAE.safetensors, "k": 32,
                           "device": "cpu", "dtype": "float32", "ids": IDS.json, "top": 10, "folder": EMPTY}'

The last line it prints is JSON: seconds, what was counted, peak memory in bytes; or why it cannot run. `official` does
what the published code does: one prompt at a time through the whole model, all ReLU activations (top-k off) at its
content tokens, and for every feature that is active a Python loop that keeps the best prompts. `delphi` is its latent
cache: padded batches of 8 through the whole model, Top-K activations at all tokens, their places and values held in
memory and then written in splits of the features; statistics of features are a pass of their own that is not counted.
"""

from __future__ import annotations

import heapq
import json
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

BATCH, SPLITS = 8, 5
"""Delphi's defaults are 32 and 5; 32 sequences of activations [t, f] in float32 are gigabytes here."""


def official(asked: dict[str, Any], model: Any, ids: list[torch.Tensor], content: list[torch.Tensor]) -> int:
    """Returns how many (feature, prompt) pairs are active."""
    best: dict[int, list[tuple[Any, ...]]] = {}
    sae, active = _sae(asked), 0
    for number, (ids_t, content_t) in enumerate(zip(ids, content, strict=True)):
        resid_td = model(input_ids=ids_t[None], output_hidden_states=True).hidden_states[asked["layer"]][0]
        acts_tf = torch.relu((resid_td[content_t].float() - sae["b_dec"]) @ sae["W_dec"].T + sae["b_enc"])
        if not len(acts_tf):
            continue
        peak_f, position_f = acts_tf.max(dim=0)
        for feature in torch.nonzero(peak_f > 0)[:, 0].tolist():
            found = (peak_f[feature].item(), number, position_f[feature].item())
            kept = best.setdefault(feature, [])
            active += 1
            if len(kept) < asked["top"]:
                heapq.heappush(kept, found)
            elif found > kept[0]:
                heapq.heapreplace(kept, found)
    (Path(asked["folder"]) / "spans.json").write_text(json.dumps(best))
    return active


def delphi(asked: dict[str, Any], model: Any, ids: list[torch.Tensor], content: list[torch.Tensor]) -> int:
    """Returns how many activations were cached."""
    from delphi.latents.cache import LatentCache

    sae = _sae(asked)

    def encode(resid_btd: torch.Tensor) -> torch.Tensor:
        pre_btf = (resid_btd.float() - sae["b_dec"]) @ sae["W_dec"].T + sae["b_enc"]
        values, places = pre_btf.topk(asked["k"], dim=-1, sorted=False)
        return torch.zeros_like(pre_btf).scatter_(-1, places, torch.relu(values))

    tokens_bt = pad_sequence(ids, batch_first=True)
    tokens_bt = torch.cat([tokens_bt, tokens_bt[: -len(tokens_bt) % BATCH]])  # it drops what does not fill a batch
    cache = LatentCache(model, {f"layers.{asked['layer'] - 1}": encode}, BATCH)
    cache.run(tokens_bt.numel(), tokens_bt)
    cache.save_splits(SPLITS, Path(asked["folder"]))
    return sum(len(found) for found in cache.cache.latent_activations.values())


CONTENDERS: dict[str, Callable[..., int]] = {"official": official, "delphi": delphi}


def _sae(asked: dict[str, Any]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(asked["sae"], device=str(torch.get_default_device()))


def main() -> None:
    """Time the scan that the argument describes, after a few documents that warm up."""
    asked = json.loads(sys.argv[1])
    try:
        import transformers

        if asked["contender"] == "delphi":
            import delphi.latents.cache  # noqa: F401
    except ImportError as error:
        print(json.dumps({"absent": f"cannot be imported here ({error})"}))
        return
    torch.set_default_device("cuda" if asked["device"] == "gpu" else "cpu")
    transformers.utils.logging.disable_progress_bar()
    kind = transformers.AutoModel if asked["contender"] == "delphi" else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(asked["hf_model"], dtype=getattr(torch, asked["dtype"])).to(torch.get_default_device())
    documents = json.loads(Path(asked["ids"]).read_text())
    ids = [torch.tensor(one) for one in documents["ids"]]
    content = [torch.tensor(one, dtype=torch.bool) for one in documents["content"]]
    scan = CONTENDERS[asked["contender"]]
    with torch.inference_mode():
        scan(asked, model, ids[:BATCH], content[:BATCH])
        started = time.perf_counter()
        active = scan(asked, model, ids, content)
        seconds = time.perf_counter() - started
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    if asked["contender"] == "delphi":
        versions = f"delphi {version('eai-delphi')}, {versions}"
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if asked["device"] == "gpu" else of_process
    found = {"seconds": [seconds], "count": sum(map(len, ids)), "active": active, "version": versions}
    print(json.dumps({**found, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
