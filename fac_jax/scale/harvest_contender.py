"""fac_jax's own harvest in a process of its own, as `fac bench activations` times it beside the torch ones.

    python -m fac_jax.scale.harvest_contender '{"model": SOURCE, "layer": 15, "dtype": "bfloat16", "geometry": "8x512",
        "documents": FILE.jsonl, "warm_up": FILE.jsonl, "max_tokens": 256, "folder": EMPTY, "writes": true}'

The last line it prints is JSON: seconds, what was counted, peak memory in bytes. It is what `fac harvest` does once the
weights are loaded and the program is compiled: documents read, tokenized and packed, the forward pass, and (if
`writes`) rows shuffled, written and committed. `parts` times each of these alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fac_jax.activations import harvest as harvesting
from fac_jax.activations.harvest import content_rows, describe, harvest_documents
from fac_jax.activations.manifest import Cursor, Manifest
from fac_jax.activations.rows import row_dtype
from fac_jax.activations.store import complete_store, create_store, writer_name
from fac_jax.activations.writer import StoreWriter
from fac_jax.backbone.weights import Loaded, load_backbone
from fac_jax.config.activations import BackboneConfig, HarvestConfig
from fac_jax.config.data import DataSet, Source
from fac_jax.config.file import Config
from fac_jax.mesh import own_mesh
from fac_jax.packing import batches
from fac_jax.runs import versions
from fac_jax.scale.sae_contender import peak_bytes

DATA = "documents"


def main() -> None:
    """Time the harvest that the argument describes."""
    asked = json.loads(sys.argv[1])
    folder, config = Path(asked["folder"]), harvest_config(asked, asked["documents"])
    mesh = own_mesh(config.mesh, jax.local_devices())
    loaded = load_backbone(config.backbone.model, config.backbone.layer, config.backbone.dtype, mesh)
    manifest = describe(config, loaded, config.backbone.layer, writers=1)
    written(harvest_config(asked, asked["warm_up"]), loaded, manifest, folder / "warm_up")
    run = written if asked["writes"] else unwritten
    started = time.perf_counter()
    counts = run(config, loaded, manifest, folder / "store")
    found: dict[str, Any] = {"seconds": [time.perf_counter() - started]}
    found |= {"count": counts["real_tokens"], "rows": counts["content_tokens"]}
    if asked.get("parts") and asked["writes"]:
        found["parts"] = parts(config, loaded, manifest, folder / "parts")
    found["peak_bytes"] = peak_bytes()
    print(json.dumps({**found, "version": f"jax {versions()['jax']}"}))


def harvest_config(asked: Mapping[str, Any], documents: str) -> Config:
    """The config of a harvest of the file `documents`."""
    rows, tokens = map(int, asked["geometry"].split("x"))
    return Config(
        backbone=BackboneConfig(asked["model"], asked["layer"], asked["dtype"], rows, tokens),
        data={DATA: DataSet(sources=(Source(path=documents, text="messages"),), max_tokens=asked["max_tokens"])},
        harvest=HarvestConfig(data=DATA),
    )


def written(config: Config, loaded: Loaded, manifest: Manifest, out: Path) -> dict[str, int]:
    """A whole harvest; returns what it counted."""
    create_store(out, manifest)
    harvest_documents(config, loaded, {str(out): manifest}, 0)
    return complete_store(out, [writer_name(0)]).counts


class Discard:
    """Stands for a StoreWriter, and writes nothing."""

    cursor = Cursor()

    def append(self, *batch: object) -> None:
        """Forget the batch."""

    def finish(self, counts: dict[str, int]) -> None:
        """Keep the counts."""
        self.counts = counts


def unwritten(config: Config, loaded: Loaded, manifest: Manifest, out: Path) -> dict[str, int]:
    """The same, but for the writing; returns what it counted."""
    discard = Discard()
    harvesting._harvest_into({manifest.layer: discard}, config, loaded, 0, 1)  # type: ignore[dict-item]
    return discard.counts


def parts(config: Config, loaded: Loaded, manifest: Manifest, out: Path) -> dict[str, float]:
    """Seconds of each part alone; in a harvest, packing and storing run beside the forward pass."""
    times = [time.perf_counter()]
    packed = list(batches(config.dataset(DATA), DATA, loaded.tokenizer, config.backbone))
    times.append(time.perf_counter())
    compute = loaded.residuals_fn((manifest.layer,), str(row_dtype(config.harvest.dtype)))
    resid = [compute(batch.tokens, batch.segments, batch.positions)[0] for batch in packed]
    jax.block_until_ready(resid)
    times.append(time.perf_counter())
    create_store(out, manifest)
    with StoreWriter(out, manifest, writer_name(0)) as writer:
        for batch, resid_btd in zip(packed, resid, strict=True):
            rows, held = content_rows(batch, np.asarray(resid_btd), config.harvest.validation_fraction)
            writer.append(batch.first, {}, rows, held)
        writer.finish({})
    complete_store(out, [writer_name(0)])
    times.append(time.perf_counter())
    names = ("read and pack", "forward", "store")
    return {name: stop - start for name, start, stop in zip(names, times, times[1:], strict=False)}


if __name__ == "__main__":
    main()
