"""fac_jax's own scan in a process of its own, as `fac bench scan` times it beside the torch ones.

    python -m fac_jax.scale.scan_contender '{"model": SOURCE, "layer": 15, "sae_folder": FOLDER, "acts": "topk",
        "dtype": "float32", "geometry": "8x512", "documents": FILE.jsonl, "warm_up": FILE.jsonl, "max_tokens": 256,
        "top": 10, "peaks": "none", "folder": EMPTY}'

The last line it prints is JSON: seconds, what was counted, peak memory in bytes. It is what `fac scan` does once the
weights are loaded and the programs are compiled: documents read, tokenized and packed, the forward pass, encoder and
top-k, statistics, and the files. `parts` times each alone, waiting for the device after each.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from fac_jax.backbone.weights import Loaded
from fac_jax.config.activations import BackboneConfig
from fac_jax.config.data import DataSet, Source
from fac_jax.config.features import ScanConfig
from fac_jax.config.file import Config
from fac_jax.packing import batches
from fac_jax.runs import versions
from fac_jax.sae.checkpoint import LoadedSae
from fac_jax.scale.sae_contender import peak_bytes
from fac_jax.scan import parts as files
from fac_jax.scan.parts import Identity
from fac_jax.scan.peaks import tables_of
from fac_jax.scan.scan import kept_features, scan_share
from fac_jax.scan.scorer import load_scorer
from fac_jax.scan.stretch import Stretch
from fac_jax.scan.units import Share

DATA = "documents"


def main() -> None:
    """Time the scan that the argument describes."""
    asked = json.loads(sys.argv[1])
    folder, config = Path(asked["folder"]), scan_config(asked, asked["documents"])
    loaded, sae = load_scorer(config, {})
    scanned(scan_config(asked, asked["warm_up"]), loaded, sae, folder / "warm_up")
    started = time.perf_counter()
    counts = scanned(config, loaded, sae, folder / "scan")
    found: dict[str, Any] = {"seconds": [time.perf_counter() - started], "count": counts["tokens"]}
    found |= {"active": counts["peaks"], "content": counts["content_tokens"]}
    if asked.get("parts"):
        found["parts"] = parts(config, loaded, sae, folder / "parts")
    found["peak_bytes"] = peak_bytes()
    print(json.dumps({**found, "version": f"jax {versions()['jax']}"}))


def scan_config(asked: Mapping[str, Any], documents: str) -> Config:
    """The config of a scan of the file `documents`."""
    rows, tokens = map(int, asked["geometry"].split("x"))
    return Config(
        backbone=BackboneConfig(asked["model"], asked["layer"], asked["dtype"], rows, tokens),
        data={DATA: DataSet(sources=(Source(path=documents, text="messages"),), max_tokens=asked["max_tokens"])},
        scan=ScanConfig(acts=asked["acts"], sae=asked["sae_folder"], top_spans=asked["top"], peaks=asked["peaks"]),
    )


def identity_of(config: Config, loaded: Loaded, sae: LoadedSae) -> Identity:
    """What the timed scans are made with."""
    scan = config.scan
    made = (DATA, "data", loaded.digest, sae.layer, sae.digest, sae.features, sae.k)
    return Identity(*made, scan.acts, scan.top_spans, scan.span_tokens, scan.peaks)


def scanned(config: Config, loaded: Loaded, sae: LoadedSae, out: Path) -> dict[str, int]:
    """A whole scan; returns its counts."""
    out.mkdir()
    share, (_, kept_f) = Share(0, 1), kept_features(config.scan.peaks, sae.features)
    scan_share(config, out, identity_of(config, loaded, sae), kept_f, loaded, sae, share, config.dataset(DATA))
    files.finish(out, [files.shares_folder(out) / share.name])
    counts: dict[str, int] = json.loads((out / "scan.json").read_text(encoding="utf-8"))["counts"]
    return counts


def parts(config: Config, loaded: Loaded, sae: LoadedSae, out: Path) -> dict[str, float]:
    """Seconds of each part, one after the other; in a scan the host's work runs beside the device's."""
    identity = identity_of(config, loaded, sae)
    _, kept_f = kept_features(config.scan.peaks, sae.features)
    state, summary = files.begin(out, identity, Share(0, 1))
    names = ("read and pack", "backbone", "encoder and top-k", "bookkeeping")
    spent = dict.fromkeys(names, 0.0)

    def timed(name: str, since: float) -> float:
        now = time.perf_counter()
        spent[name] += now - since
        return now

    at = time.perf_counter()
    packed = list(batches(config.dataset(DATA), DATA, loaded.tokenizer, config.backbone))
    at = timed("read and pack", at)
    stretch = Stretch(identity, loaded, kept_f)
    for batch in packed:
        resid_btd = jax.block_until_ready(loaded.residual_fn(sae.layer)(batch.tokens, batch.segments, batch.positions))
        at = timed("backbone", at)
        tables = jax.block_until_ready(tables_of(batch, resid_btd, sae, identity.acts, loaded.mesh))
        at = timed("encoder and top-k", at)
        stretch.add(batch, tables)
        jax.block_until_ready(stretch.tally)
        at = timed("bookkeeping", at)
    state, summary = stretch.commit(out, 0, state, summary)
    files.commit(out, replace(state, finished=True), summary)
    files.finish(out, [files.shares_folder(out) / state.share.name])
    timed("bookkeeping", at)
    return spent


if __name__ == "__main__":
    main()
