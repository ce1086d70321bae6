"""Stage `harvest`: a corpus through the backbone's lower blocks, and the residuals of the users' own words kept.

Reads a data set and the backbone below `backbone.layer`; writes an activation store (store.py) of one row per content
token: template, prefix and special tokens are masked (paper: user turns only), padding was never real. Documents are
dealt to training or validation by a hash of their content, so a document's rows are all on one side, in any run.

The device works on the next batch while the host stores this one. A killed harvest goes on after its last shard and
ends with the same bytes, because a batch depends on nothing but the document it begins with. With several processes,
each harvests every n-th document on its own devices and writes shards of its own; nothing passes between them.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from fac_jax.activations.manifest import Manifest, Totals, rows_per_block
from fac_jax.activations.rows import Rows, row_dtype
from fac_jax.activations.store import (
    add_layers,
    complete_store,
    create_store,
    finished_counts,
    layer_path,
    stored_bytes,
    writer_name,
)
from fac_jax.activations.upkeep import look_again
from fac_jax.activations.writer import StoreWriter
from fac_jax.backbone.weights import Loaded, load_backbone
from fac_jax.config.file import Config
from fac_jax.distributed import Process, beat, from_all, wait_for_all
from fac_jax.errors import UserError
from fac_jax.mesh import own_mesh
from fac_jax.packing import PackedBatch, encodable_documents, encode_all, pack
from fac_jax.plain import digest
from fac_jax.progress import Bar, progress
from fac_jax.runs import write_text
from fac_jax.text import Document, count_documents, document_hash, files_digest

log = logging.getLogger(__name__)
BATCH_S = 600.0
"""Seconds for a batch of the backbone, or the last shards, before a run of several processes is given up."""
LONG_WAIT, LONG_WAIT_S = 0.1, 10.0
"""Share of a harvest's time, and seconds, from which on it says that it waited for its store."""


class Harvested(NamedTuple):
    """What one call did: it may have gone on where another one was killed."""

    tokens: int
    """Real tokens computed."""
    waited_s: float
    """Seconds for which the loop waited for shards to be written."""


def harvest(config: Config, out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Fill the store of each layer below `harvest.store` or `out`, going on with what is there; returns the summary.

    `inputs` is empty: the corpus is named in the config. Raises UserError for an empty corpus, a layer the model does
    not have, a store of something else, a full disk.
    """
    del inputs
    index, count = Process.index, Process.count
    place = config.harvest.store or str(out)
    layers = config.harvested_layers
    mesh = own_mesh(config.mesh, jax.local_devices())
    loaded = load_backbone(config.backbone.model, layers[-1], config.backbone.dtype, mesh)
    manifests = {layer_path(place, layer): describe(config, loaded, layer, writers=count) for layer in layers}
    if index == 0:
        add_layers(place, layers)
        for path, manifest in manifests.items():
            create_store(path, manifest)
    wait_for_all("harvest: store created")
    started = time.monotonic()
    done = harvest_documents(config, loaded, manifests, index)
    beat("the harvest of this process; others may have more", math.inf)  # the dead have no pulse
    tokens, waited_s = from_all(np.asarray(done, np.float64)).T  # until all are written
    done = Harvested(int(tokens.sum()), float(waited_s.max()))
    seconds = time.monotonic() - started
    writers = [writer_name(i) for i in range(count)]
    totals = {path: complete_store(path, writers) for path in manifests} if index == 0 else {}
    for path in totals:
        look_again(path)
    wait_for_all("harvest: complete")
    if index:
        return {}
    if config.harvest.store is not None:
        write_text(out / "store.json", json.dumps({"store": place, "layers": layers}, indent=1))
    main = totals[layer_path(place, config.backbone.layer)]
    return _summary(config, place, layers, main, done, seconds)


def describe(config: Config, loaded: Loaded, layer: int, writers: int) -> Manifest:
    """The manifest of the store that this config makes of one layer."""
    settings, dataset = config.harvest, config.dataset(config.harvest.data)
    rows = {
        "data": dataset,
        "harvest": {**settings.content, "layers": [], "store": None},  # where, and beside which others, changes no row
        "rows_per_batch": config.backbone.rows_per_batch,
        "row_tokens": config.backbone.row_tokens,
    }
    return Manifest(
        model=config.backbone.model,
        model_digest=loaded.digest,
        layer=layer,
        d_model=loaded.config.d_model,
        compute_dtype=loaded.dtype,
        tokenizer_digest=loaded.tokenizer_digest,
        corpus_digest=digest(rows),
        shard_rows=settings.shard_rows,
        seed=config.run.seed,
        writers=writers,
        dtype=settings.dtype,
        compression=settings.compression,
        block_rows=rows_per_block(loaded.config.d_model, settings.dtype),
        norm_filter=settings.norm_filter,
        files_digest=files_digest(dataset),
    )


def held_out(document_id: str, validation_fraction: float) -> bool:
    """Whether a document's rows are held out of training: fixed by its content."""
    return document_hash(document_id, "validation") < validation_fraction


def harvest_documents(config: Config, loaded: Loaded, manifests: Mapping[str, Manifest], index: int) -> Harvested:
    """Harvest documents index, index + writers, ... into the store at each path, and commit them all.

    Stops at the end of the batch in which the writer's share of `harvest.tokens` is reached.
    """
    name, at_once = writer_name(index), config.harvest.shards_at_once
    unfinished = {path: manifest for path, manifest in manifests.items() if finished_counts(path, name) is None}
    with ExitStack() as stack:
        writers = {
            manifest.layer: stack.enter_context(StoreWriter(path, manifest, name, at_once))
            for path, manifest in sorted(unfinished.items(), key=lambda item: item[1].layer)
        }
        if not writers:
            return Harvested(0, 0.0)
        tokens = _harvest_into(writers, config, loaded, index, next(iter(manifests.values())).writers)
        return Harvested(tokens, sum(writer.waited_s for writer in writers.values()))


def _harvest_into(
    writers: Mapping[int, StoreWriter], config: Config, loaded: Loaded, index: int, processes: int
) -> int:
    """Every layer's writer is given every batch from the earliest place on; each leaves out what it has committed."""
    share = None if config.harvest.tokens is None else -(-config.harvest.tokens // processes)
    earliest = min((writer.cursor for writer in writers.values()), key=lambda cursor: cursor.first)
    fraction, skipped = config.harvest.validation_fraction, list[str]()
    begun = counts = earliest.counts
    compute = loaded.residuals_fn(tuple(writers), str(row_dtype(config.harvest.dtype)))
    waiting: tuple[PackedBatch, dict[str, int], tuple[Array, ...]] | None = None
    with _progress(config, share, processes, counts) as bar:
        for batch in _batches(config, loaded, index, processes, earliest.first, skipped):
            resid = compute(batch.tokens, batch.segments, batch.positions)  # begins now; nobody waits for it yet
            if waiting is not None:
                _store(writers.values(), fraction, *waiting)
            waiting = batch, counts, resid
            beat("a harvested batch", BATCH_S)
            counts = _counted(counts, batch, config.dataset(config.harvest.data).max_tokens)
            bar.advance(len(batch.documents) if share is None else int(batch.content.sum()))
            if share is not None and counts["content_tokens"] >= share:
                break
        if waiting is not None:
            _store(writers.values(), fraction, *waiting)
    malformed = len(skipped) if index == 0 else 0  # every process reads all rows
    for writer in writers.values():
        beat("the last batch, or the last shards of a layer", BATCH_S)
        writer.finish({**counts, "malformed_rows": malformed})
    return counts.get("real_tokens", 0) - begun.get("real_tokens", 0)


def _progress(
    config: Config, share: int | None, writers: int, counts: Mapping[str, int]
) -> AbstractContextManager[Bar]:
    """A bar over what is left: content tokens where so many are asked, otherwise documents."""
    if share is not None:
        return progress("harvest", max(share - counts.get("content_tokens", 0), 0), "tokens")
    dataset, name = config.dataset(config.harvest.data), config.harvest.data
    total = count_documents(dataset, name)
    left = None if total is None else max(total // writers - counts.get("documents", 0), 0)
    return progress("harvest", left, "documents")


def _batches(
    config: Config, loaded: Loaded, index: int, writers: int, first: int, skipped: list[str]
) -> Iterator[PackedBatch]:
    """Packed batches of this writer's documents; `first` counts its own documents only."""
    dataset = config.dataset(config.harvest.data)
    documents = _alive(encodable_documents(dataset, config.harvest.data, loaded.tokenizer, skipped))
    own = islice(documents, index, None, writers)
    encoded = encode_all(islice(own, first, None), loaded.tokenizer, dataset.max_tokens)
    return pack(encoded, config.backbone.rows_per_batch, config.backbone.row_tokens, first)


def _alive(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents, each a sign of life: those of other processes, and those harvested already, can take hours."""
    for document in documents:
        beat("a document", BATCH_S)
        yield document


def _store(
    writers: Iterable[StoreWriter],
    validation_fraction: float,
    batch: PackedBatch,
    counts: dict[str, int],
    resid: tuple[Array, ...],
) -> None:
    """Hand the batch's content rows to the writer of each layer."""
    for writer, resid_btd in zip(writers, resid, strict=True):
        rows, held = content_rows(batch, np.asarray(resid_btd), validation_fraction)
        writer.append(batch.first, counts, rows, held)


def content_rows(
    batch: PackedBatch, resid_btd: Float[np.ndarray, "b t d"], validation_fraction: float
) -> tuple[Rows, Bool[np.ndarray, " n"]]:
    """The rows of a batch's content tokens, packed row by packed row, and which of them are held out."""
    chosen = np.flatnonzero(batch.content)
    slot = batch.slot.reshape(-1)[chosen]
    documents = [item.document.id for item in batch.documents]
    ids = np.asarray([int(name, 16) for name in documents], np.uint64)
    held = np.asarray([held_out(name, validation_fraction) for name in documents], bool)
    flat = batch.positions.reshape(-1), batch.tokens.reshape(-1)
    every = Rows(resid_btd.reshape(-1, resid_btd.shape[-1]), np.zeros(flat[0].size, np.uint64), *flat)
    rows = every.take(chosen)
    return replace(rows, doc=ids[slot]), held[slot]


def _counted(counts: Mapping[str, int], batch: PackedBatch, max_tokens: int) -> dict[str, int]:
    """`counts` with this batch's added: every token computed is padding or real, every real one content or dropped."""
    real, content = int((batch.segments > 0).sum()), int(batch.content.sum())
    found = {
        "documents": len(batch.documents),
        "documents_at_max_tokens": sum(len(item.ids) == max_tokens for item in batch.documents),
        "computed_tokens": batch.tokens.size,
        "real_tokens": real,
        "content_tokens": content,
        "dropped_padding": batch.tokens.size - real,
    }
    for reason in ("special", "other_turns", "template"):
        found[f"dropped_{reason}"] = sum(item.dropped[reason] for item in batch.documents)
    return {name: counts.get(name, 0) + value for name, value in found.items()}


def _summary(
    config: Config, place: str, layers: tuple[int, ...], totals: Totals, done: Harvested, seconds: float
) -> dict[str, Any]:
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
    if done.waited_s > max(LONG_WAIT * seconds, LONG_WAIT_S):
        log.warning(
            "%.0f%% of the harvest's time went into waiting for shards to be written: --harvest.shards_at_once writes "
            "more of them at a time, and takes memory for each",
            100 * done.waited_s / seconds,
        )
    return {
        "layers": " ".join(map(str, layers)),
        "rows": train.rows + validation.rows,
        "train_rows": train.rows,
        "validation_rows": validation.rows,
        "median_norm": train.norm_quantiles["0.5"],
        **counts,
        "dropped_outliers": train.outliers + validation.outliers,
        "packing_efficiency": counts["real_tokens"] / counts["computed_tokens"],
        "tokens_per_second": done.tokens / seconds,
        "store_wait": done.waited_s / seconds,
        "seconds": seconds,
        **_rounding(config, totals),
        "bytes": sum(stored_bytes(layer_path(place, layer)) for layer in layers),
    }


def _rounding(config: Config, totals: Totals) -> dict[str, float]:
    """What int8 costs: the error it leaves, as a fraction of the rows' variance (an FVU)."""
    train = totals.splits["train"]
    return {"rounding_fvu": train.rounding / train.variance} if config.harvest.dtype == "int8" else {}
