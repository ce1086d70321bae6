"""Stage `harvest`: a corpus through the backbone's lower blocks, and the residuals of the users' own words kept.

Reads a data set and the backbone below `backbone.layer`; writes an activation store (store.py) of one row per content
token: template, prefix and special tokens are masked (paper: user turns only), padding was never real. Documents are
dealt to training or validation by a hash of their content, so a document's rows are all on one side, in any run.

The device works on the next batch while the host stores this one. A killed harvest goes on after its last shard and
ends with the same bytes, because a batch depends on nothing but the document it begins with. With several processes,
each harvests every n-th document on its own devices and writes shards of its own; nothing passes between them.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, BFloat16

from fac_jax.activations.manifest import Manifest, Totals
from fac_jax.activations.store import Rows, StoreWriter, complete_store, create_store, finished_counts
from fac_jax.backbone.weights import Loaded, load_backbone
from fac_jax.config import Config, MeshConfig
from fac_jax.distributed import Process, wait_for_all
from fac_jax.errors import UserError
from fac_jax.mesh import make_mesh
from fac_jax.packing import PackedBatch, encode, pack
from fac_jax.plain import digest
from fac_jax.progress import Bar, progress
from fac_jax.text import document_hash, read_documents

log = logging.getLogger(__name__)


def harvest(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Fill the store at `out`, going on with what is there. `inputs` is empty: the corpus is named in the config.

    Raises UserError for an empty corpus, a layer the model does not have, a store of something else, a full disk.
    """
    del inputs
    index, count = Process.index, Process.count
    mesh = harvest_mesh(config.mesh, jax.local_devices())
    loaded = load_backbone(config.backbone.model, config.backbone.layer, config.backbone.dtype, mesh)
    manifest = describe(config, loaded, writers=count)
    if index == 0:
        create_store(out, manifest)
    wait_for_all("harvest: store created")
    started = time.monotonic()
    tokens = harvest_documents(config, loaded, manifest, out, index)
    if count > 1:
        tokens = int(multihost_utils.process_allgather(np.asarray(tokens)).sum())  # waits until all are written
    seconds = time.monotonic() - started
    totals = complete_store(out, [writer_name(i) for i in range(count)]) if index == 0 else None
    wait_for_all("harvest: complete")
    return _summary(config, out, totals, tokens, seconds) if totals is not None else {}


def harvest_mesh(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of one process's devices, which harvests by itself.

    With several processes `mesh.feature` may be more than one has: it then splits the model over all of its own.
    """
    if config.coordinator is None:
        return make_mesh(config, devices)
    return make_mesh(replace(config, data=None, feature=math.gcd(config.feature, len(devices))), devices)


def describe(config: Config, loaded: Loaded, writers: int) -> Manifest:
    """The manifest of the store that this config makes."""
    rows = {
        "data": config.dataset(config.harvest.data),
        "harvest": config.harvest,
        "rows_per_batch": config.backbone.rows_per_batch,
        "row_tokens": config.backbone.row_tokens,
    }
    return Manifest(
        model=config.backbone.model,
        model_digest=loaded.digest,
        layer=config.backbone.layer,
        d_model=loaded.config.d_model,
        compute_dtype=loaded.dtype,
        tokenizer_digest=loaded.tokenizer_digest,
        corpus_digest=digest(rows),
        shard_rows=config.harvest.shard_rows,
        seed=config.run.seed,
        writers=writers,
    )


def held_out(document_id: str, validation_fraction: float) -> bool:
    """Whether a document's rows are held out of training: fixed by its content."""
    return document_hash(document_id, "validation") < validation_fraction


def writer_name(index: int) -> str:
    """Name of the writer that is process `index`."""
    return f"p{index:04d}"


def harvest_documents(config: Config, loaded: Loaded, manifest: Manifest, out: Path, index: int) -> int:
    """Harvest documents index, index + writers, ... and commit them all; returns the real tokens computed by this call.

    Stops at the end of the batch in which the writer's share of `harvest.tokens` is reached.
    """
    if finished_counts(out, writer_name(index)) is not None:
        return 0
    with StoreWriter(out, manifest, writer_name(index)) as writer:
        return _harvest_into(writer, config, loaded, manifest, index)


def _harvest_into(writer: StoreWriter, config: Config, loaded: Loaded, manifest: Manifest, index: int) -> int:
    share = None if config.harvest.tokens is None else -(-config.harvest.tokens // manifest.writers)
    skipped: list[str] = []
    begun = counts = writer.cursor.counts
    waiting: tuple[PackedBatch, dict[str, int], Array] | None = None
    with _progress(config, share, manifest.writers, counts) as bar:
        for batch in _batches(config, loaded, index, manifest.writers, writer.cursor.first, skipped):
            resid_btd = _residual(loaded, batch, manifest.layer)  # begins now; nobody waits for it yet
            if waiting is not None:
                _store(writer, config.harvest.validation_fraction, *waiting)
            waiting = batch, counts, resid_btd
            counts = _counted(counts, batch, config.dataset(config.harvest.data).max_tokens)
            bar.advance(len(batch.documents) if share is None else int(batch.content.sum()))
            if share is not None and counts["content_tokens"] >= share:
                break
        if waiting is not None:
            _store(writer, config.harvest.validation_fraction, *waiting)
    malformed = len(skipped) if index == 0 else 0  # every process reads all rows
    writer.finish({**counts, "malformed_rows": malformed})
    return counts.get("real_tokens", 0) - begun.get("real_tokens", 0)


def _progress(
    config: Config, share: int | None, writers: int, counts: Mapping[str, int]
) -> AbstractContextManager[Bar]:
    """A bar over what is left: content tokens where so many are asked, otherwise documents."""
    if share is not None:
        return progress("harvest", max(share - counts.get("content_tokens", 0), 0), "tokens")
    dataset, name = config.dataset(config.harvest.data), config.harvest.data
    if dataset.on_bad_row == "skip":  # counting would log every malformed row twice
        return progress("harvest", None, "documents")
    documents = sum(1 for _ in read_documents(dataset, name)) // writers
    return progress("harvest", max(documents - counts.get("documents", 0), 0), "documents")


def _batches(
    config: Config, loaded: Loaded, index: int, writers: int, first: int, skipped: list[str]
) -> Iterator[PackedBatch]:
    """Packed batches of this writer's documents; `first` counts its own documents only."""
    dataset = config.dataset(config.harvest.data)
    own = islice(read_documents(dataset, config.harvest.data, skipped), index, None, writers)
    encoded = (encode(document, loaded.tokenizer, dataset.max_tokens) for document in islice(own, first, None))
    return pack(encoded, config.backbone.rows_per_batch, config.backbone.row_tokens, first)


def _residual(loaded: Loaded, batch: PackedBatch, layer: int) -> BFloat16[Array, "b t d"]:
    """In the store's type already on the device: half the bytes to fetch."""
    return loaded.residual_fn(layer)(batch.tokens, batch.segments, batch.positions).astype(jnp.bfloat16)


def _store(
    writer: StoreWriter,
    validation_fraction: float,
    batch: PackedBatch,
    counts: dict[str, int],
    resid_btd: BFloat16[Array, "b t d"],
) -> None:
    """Hand the batch's content rows to the writer, row by packed row."""
    chosen = np.flatnonzero(batch.content)
    slot = batch.slot.reshape(-1)[chosen]
    documents = [item.document.id for item in batch.documents]
    ids = np.asarray([int(name, 16) for name in documents], np.uint64)
    held = np.asarray([held_out(name, validation_fraction) for name in documents], bool)
    resid_nd = np.asarray(resid_btd).reshape(-1, resid_btd.shape[-1])
    rows = Rows(
        resid=resid_nd.view(np.uint16)[chosen].view(ml_dtypes.bfloat16),
        doc=ids[slot],
        position=batch.positions.reshape(-1)[chosen],
        token=batch.tokens.reshape(-1)[chosen],
    )
    writer.append(batch.first, counts, rows, held[slot])


def _counted(counts: Mapping[str, int], batch: PackedBatch, max_tokens: int) -> dict[str, int]:
    """`counts` with this batch's added: every token computed is real or padding, every real one content or template."""
    real, content = int((batch.segments > 0).sum()), int(batch.content.sum())
    found = {
        "documents": len(batch.documents),
        "documents_at_max_tokens": sum(len(item.ids) == max_tokens for item in batch.documents),
        "computed_tokens": batch.tokens.size,
        "real_tokens": real,
        "content_tokens": content,
        "dropped_padding": batch.tokens.size - real,
        "dropped_template": real - content,
    }
    return {name: counts.get(name, 0) + value for name, value in found.items()}


def _summary(config: Config, out: Path, totals: Totals, tokens: int, seconds: float) -> dict[str, Any]:
    data, counts = config.harvest.data, totals.counts
    train, validation = totals.splits["train"], totals.splits["validation"]
    for split, fraction in ((train, "lower"), (validation, "raise")):
        if split.rows == 0:
            raise UserError(
                f"data.{data}: {counts['documents']} documents gave {train.rows} training and {validation.rows} "
                f"validation rows: give it more documents, or {fraction} harvest.validation_fraction "
                f"({config.harvest.validation_fraction})"
            )
    if config.harvest.tokens is not None and counts["content_tokens"] < config.harvest.tokens:
        found, asked = counts["content_tokens"], config.harvest.tokens
        log.warning("data.%s has only %d content tokens, harvest.tokens asks %d", data, found, asked)
    return {
        "rows": train.rows + validation.rows,
        "train_rows": train.rows,
        "validation_rows": validation.rows,
        "median_norm": train.norm_quantiles["0.5"],
        **counts,
        "packing_efficiency": counts["real_tokens"] / counts["computed_tokens"],
        "tokens_per_second": tokens / seconds,  # real tokens of this call: an interrupted harvest had computed others
        "seconds": seconds,
        "bytes": sum(file.stat().st_size for file in Path(out).rglob("*") if file.is_file()),
    }
