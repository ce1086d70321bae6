"""`fac store info | verify | merge | drop`: what a store holds, whether it is whole; stores put together or thinned.

Each works on the store at a path or URL, or on all layers there. verify reads every block, names each damaged one and
the documents whose rows it holds, and lists them in `quarantine.json`, which training heeds (`train.on_bad_chunk`).
merge writes a manifest that names the shards of other stores, and copies none. drop deletes what one writer wrote.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fac_jax.activations.arrays import Root, array_keys, open_root, read_json, remove, storage, write_json
from fac_jax.activations.claim import claim
from fac_jax.activations.manifest import SPLITS, Finished, Manifest, Quarantine, SplitTotals, identity, sums_of
from fac_jax.activations.rows import from_int8
from fac_jax.activations.store import (
    PlacedPart,
    add_layers,
    finished_key,
    layer_path,
    open_part,
    part_path,
    parts_of,
    read_manifest,
    read_quarantine,
    read_record,
    record_key,
    record_of,
    records,
    stored_bytes,
    stores_at,
    totals_of,
    writer_name,
)
from fac_jax.errors import UserError
from fac_jax.progress import progress

BLOCKS_AT_ONCE = 64
"""Read together, so that requests to an object store overlap."""
DOCUMENTS_NAMED = 8
SUM_TOLERANCE = 1e-6
"""Relative: sums over rows that are read again in the same pieces are the same but for the piece's last bits."""


def info(path: str) -> list[str]:
    """Lines about every store at `path`."""
    return [line for store in stores_at(path) for line in _describe(store)]


def _describe(store: str) -> Iterator[str]:
    manifest = read_manifest(store)
    yield f"{store}: layer {manifest.layer} of {manifest.model}, width {manifest.d_model}, {_form(manifest)}"
    if manifest.totals is None:
        yield "  not complete: `fac harvest` goes on where it stopped"
        return
    yield f"  {stored_bytes(store) / 1e9:,.3f} GB" + (
        f" in {len(manifest.members)} member stores: {', '.join(manifest.members)}" if manifest.members else ""
    )
    for split, totals in manifest.totals.splits.items():
        quantiles = ", ".join(f"{float(q):.0%} {value:,.1f}" for q, value in totals.norm_quantiles.items())
        yield f"  {split}: {totals.rows:,} rows in {len(totals.parts)} shards; norms {quantiles}{_extra(totals)}"
    for name, value in manifest.totals.counts.items():
        yield f"  {name.replace('_', ' ')}: {value:,}"
    roots = [open_root(member) for member in manifest.members or (store,)]
    damaged = sum(len(blocks) for root in roots for blocks in read_quarantine(root).values())
    if damaged:
        yield f"  quarantined: {damaged} blocks (`fac store verify {store}` names them)"
    for writer, rows in _writers(store, manifest).items():
        yield f"  writer {writer}: {rows:,} rows"


def _form(manifest: Manifest) -> str:
    compressed = "" if manifest.compression == "none" else f", {manifest.compression}"
    return f"{manifest.dtype}{compressed} (computed in {manifest.compute_dtype})"


def _extra(totals: SplitTotals) -> str:
    outliers = f"; {totals.outliers:,} rows left out for their norm" if totals.outliers else ""
    rounding = f"; rounding costs an FVU of {totals.rounding / totals.variance:.2e}" if totals.rounding else ""
    return outliers + rounding


def _writers(store: str, manifest: Manifest) -> dict[str, int]:
    """Rows of each writer, by name; none for a merged store."""
    assert manifest.totals is not None
    rows: dict[str, int] = {}
    for totals in manifest.totals.splits.values() if not manifest.members else ():
        for path, count in totals.parts:
            writer = path.split("/")[1]
            rows[writer] = rows.get(writer, 0) + count
    return rows


@dataclass(frozen=True)
class Damage:
    """A block that cannot be read, or a shard whose content is not what its record says."""

    store: str
    path: str
    """Of the part of the shard."""
    blocks: tuple[int, ...]
    reason: str
    documents: tuple[str, ...]
    """Whose rows are in it; none where that cannot be read either."""

    def __str__(self) -> str:
        count = len(self.documents)
        named = ", ".join(self.documents[:DOCUMENTS_NAMED]) + (", ..." if count > DOCUMENTS_NAMED else "")
        whose = f"rows of {count} documents ({named})" if count else "of which documents cannot be read either"
        blocks = f"block {self.blocks[0]}" if len(self.blocks) == 1 else f"{len(self.blocks)} blocks"
        return f"{self.store}: {self.path}: {blocks}: {self.reason}; {whose}"


def verify(path: str) -> list[Damage]:
    """Read every block of every complete store at `path`; list in `quarantine.json` what is damaged, or remove it."""
    found = []
    for store in stores_at(path):
        members = read_manifest(store).members or (store,)
        for member in members:
            found += _verify_one(member)
    return found


def remedies(found: Sequence[Damage]) -> list[str]:
    """What to do about damage, as commands."""
    records = list(dict.fromkeys(f"{one.store.rstrip('/')}/{record_of(one.path)}" for one in found))
    return [
        "to make them and every shard after them anew: delete the run's activations/stage.json and these commit "
        "records, then run `fac harvest`:",
        *(f"  {record}" for record in records),
        "or train without them: --train.on-bad-chunk skip",
    ]


def _verify_one(store: str) -> list[Damage]:
    root, manifest = open_root(store), read_manifest(store)
    if manifest.totals is None:
        raise UserError(f"store at {store} is not complete: run `fac harvest` again, it goes on where it stopped")
    parts = [part for split in SPLITS for part in manifest.totals.splits[split].parts]
    found: list[Damage] = []
    with progress("verify", sum(rows for _, rows in parts), "rows") as bar:
        for path, rows in parts:
            found += _verify_part(root, manifest, path, rows)
            bar.advance(rows)
    _note_quarantine(root, found)
    return found


def look_again(store: str) -> list[Damage]:
    """Verify the parts of a complete store that are quarantined: those that were made anew are no longer."""
    root, manifest = open_root(store), read_manifest(store)
    assert manifest.totals is not None
    rows = {path: count for split in SPLITS for path, count in manifest.totals.splits[split].parts}
    quarantined = [path for path in read_quarantine(root) if path in rows]
    found = [damage for path in quarantined for damage in _verify_part(root, manifest, path, rows[path])]
    _note_quarantine(root, found)
    return found


def _note_quarantine(root: Root, found: Sequence[Damage]) -> None:
    blocks: dict[str, tuple[int, ...]] = {}
    for one in found:
        blocks[one.path] = tuple(sorted({*blocks.get(one.path, ()), *one.blocks}))
    _write_quarantine(root, blocks)


def _write_quarantine(root: Root, blocks: dict[str, tuple[int, ...]]) -> None:
    if blocks:
        write_json(root, "quarantine.json", Quarantine(blocks))
    else:
        remove(root, "quarantine.json")


def _verify_part(root: Root, manifest: Manifest, path: str, rows: int) -> Iterator[Damage]:
    """Every block of one part, and the sums of the whole against its record."""
    resid, origin = open_part(root, path, rows, manifest)
    size = manifest.block_rows
    count = -(-rows // size)
    squares, whole = np.zeros(manifest.d_model), True
    for begin in range(0, count, BLOCKS_AT_ONCE):
        blocks = range(begin, min(begin + BLOCKS_AT_ONCE, count))
        spans = {block: slice(block * size, min((block + 1) * size, rows)) for block in blocks}
        reads = {block: (resid[span].read(), origin[span].read()) for block, span in spans.items()}
        for block, (resid_read, origin_read) in reads.items():
            origin_bc, origin_fault = _result(origin_read, f"{path}/origin")
            resid_bd, resid_fault = _result(resid_read, f"{path}/resid")
            if resid_bd is None or origin_bc is None:
                whole = False
                documents = () if origin_bc is None else tuple(f"{doc:016x}" for doc in np.unique(origin_bc[:, 0]))
                yield Damage(root.url, path, (block,), resid_fault or origin_fault, documents)
            else:
                squares += sums_of(_decoded(resid_bd, origin_bc, manifest)).squares_d
    if whole and (reason := _differs(root, path, rows, squares, manifest)):
        yield Damage(root.url, path, tuple(range(count)), reason, ())


def _result(read: Any, what: str) -> tuple[np.ndarray | None, str]:
    """What was read, or None and why not."""
    try:
        with storage(what, "it is damaged"):
            return read.result(), ""
    except UserError as error:
        return None, str(error).removesuffix(": it is damaged")


def _decoded(resid_bd: np.ndarray, origin_bc: np.ndarray, manifest: Manifest) -> np.ndarray:
    if manifest.dtype != "int8":
        return resid_bd
    found = np.empty(resid_bd.shape, np.float32)
    from_int8(resid_bd, origin_bc[:, 3].astype(np.uint32).view(np.float32), found)
    return found


def _differs(root: Root, path: str, rows: int, squares_d: np.ndarray, manifest: Manifest) -> str:
    """Why a part whose checksums are right is not what was committed, such as one copied from another store."""
    _, writer, number, split = path.split("/")
    part = read_record(root, writer, int(number)).parts[split]
    if part.rows != rows:
        return f"its record says {part.rows} rows, the manifest {rows}"
    tolerance = SUM_TOLERANCE if manifest.dtype != "int8" else 0.05  # the record's sums are those before rounding
    total, recorded = float(squares_d.sum()), float(sum(part.squares))
    if abs(total - recorded) > tolerance * max(recorded, 1e-30):
        return f"its squares sum to {total:.9g}, its record says {recorded:.9g}"
    return ""


def merge(into: str, sources: Sequence[str]) -> list[str]:
    """A store at `into` of the rows of all `sources`, layer by layer, which stay where they are; lines about it.

    Raises UserError unless all hold the same layers of the same model in the same form, each of them complete, and none
    the rows of another.
    """
    found = [stores_at(source) for source in sources]
    layers = [[read_manifest(store).layer for store in stores] for stores in found]
    for source, listed in zip(sources, layers, strict=True):
        if listed != layers[0]:
            raise UserError(f"{source} holds layers {listed}, {sources[0]} {layers[0]}: only the same can be merged")
    single = [len(stores) == 1 and stores[0] == str(source) for stores, source in zip(found, sources, strict=True)]
    for layer, stores in zip(layers[0], zip(*found, strict=True), strict=True):
        target = into if all(single) else layer_path(into, layer)
        _merge_one(target, [member for store in stores for member in read_manifest(store).members or (store,)])
    if not all(single):
        add_layers(into, layers[0])
    return info(into)


def _merge_one(into: str, members: Sequence[str]) -> None:
    manifests = [read_manifest(member) for member in members]
    first = manifests[0]
    same = ("model_digest", "layer", "d_model", "tokenizer_digest", "dtype", "compression", "block_rows")
    for member, manifest in zip(members, manifests, strict=True):
        for name in same:
            if getattr(manifest, name) != getattr(first, name):
                raise UserError(
                    f"{member} has {name} {getattr(manifest, name)}, {members[0]} has {getattr(first, name)}: "
                    "only stores of one model, layer and form can be merged"
                )
        if manifest.totals is None:
            raise UserError(f"store at {member} is not complete: run `fac harvest` there first")
    names = [_absolute(member) for member in members]
    rows = [digest_of_rows(manifest) for manifest in manifests]
    for index, name in enumerate(names):
        if name in names[:index] or rows[index] in rows[:index]:
            earlier = members[names.index(name) if name in names[:index] else rows.index(rows[index])]
            raise UserError(f"{members[index]} holds the rows of {earlier}: merged, they would count twice")
    parts = chain.from_iterable(
        _numbered(name, of, i) for i, (name, of) in enumerate(zip(names, manifests, strict=True))
    )
    counts: dict[str, int] = {}
    for manifest in manifests:
        assert manifest.totals is not None
        for key, value in manifest.totals.counts.items():
            counts[key] = counts.get(key, 0) + value
    files = first.files_digest if len({manifest.files_digest for manifest in manifests}) == 1 else ""
    writers = sum(manifest.writers for manifest in manifests)
    merged = dataclasses.replace(first, writers=writers, members=tuple(names), files_digest=files)
    root = open_root(into)
    there = read_json(root, "manifest.json", Manifest)
    if there is not None and not there.members:
        raise UserError(f"{into} holds a store with rows of its own: merge into another folder")
    write_json(root, "manifest.json", dataclasses.replace(merged, totals=totals_of(merged, parts, counts)))


def digest_of_rows(manifest: Manifest) -> tuple[Any, ...]:
    """Equal for two stores that were harvested alike, and so hold the same rows."""
    totals = manifest.totals
    assert totals is not None
    held = identity(manifest) | {"writers": 0, "model": "", "members": (), "files_digest": ""}
    mean = tuple(f"{value:.9g}" for value in totals.splits["train"].mean)  # versions add up in other orders
    return (*held.values(), *(split.rows for split in totals.splits.values()), mean)


def _absolute(store: str) -> str:
    return store.rstrip("/") if "://" in store else str(Path(store).absolute())


def _numbered(member: str, manifest: Manifest, index: int) -> Iterator[PlacedPart]:
    """The parts of one member, as the merged manifest names them."""
    writers = [writer_name(number) for number in range(manifest.writers)]
    return parts_of(open_root(member), writers, f"{index}:")


def drop(path: str, writer: str) -> list[str]:
    """Delete what `writer` wrote in every store at `path`; lines about what is left.

    The manifest is written first, so that a kill leaves files that nobody names, which the same command deletes.
    """
    for store in stores_at(path):
        root, manifest = open_root(store), read_manifest(store)
        if manifest.members:
            raise UserError(f"store at {store} is merged from others: drop the writer in the one that holds it")
        known = [writer_name(number) for number in range(manifest.writers)]
        held = claim(root, writer) if writer in known else None
        if held is None:
            raise UserError(f"store at {store} has no writer {writer!r}; it has {', '.join(known)}")
        try:
            _drop_one(root, manifest, writer, [name for name in known if name != writer])
        finally:
            held.release()
    own = any((Path(path) / up / "stage.json").exists() for up in (".", "..")) if "://" not in path else False
    hint = f"the run that made it would make {writer} again: train on what is left with --train.store {path}"
    return [*info(path), *([hint] if own else [])]


def _drop_one(root: Root, manifest: Manifest, writer: str, others: Sequence[str]) -> None:
    if not any(part.rows for split, _, part in parts_of(root, others) if split == "train"):
        raise UserError(f"store at {root.url}: without {writer} no training rows are left; delete the folder instead")
    counts: dict[str, int] = {}
    for name in others:
        finished = read_json(root, finished_key(name), Finished)
        for key, value in (finished.counts if finished else {}).items():
            counts[key] = counts.get(key, 0) + value
    if manifest.totals is not None:
        totals = totals_of(manifest, parts_of(root, others), counts)
        write_json(root, "manifest.json", dataclasses.replace(manifest, totals=totals))
    quarantined = read_quarantine(root).items()
    _write_quarantine(root, {path: blocks for path, blocks in quarantined if path.split("/")[1] != writer})
    last = read_json(root, finished_key(writer), Finished)
    shards = max(last.shards if last else 0, sum(1 for _ in records(root, writer)))
    remove(root, finished_key(writer))
    for number in range(shards + 1):  # the one after the last commit may be half written
        paths = [f"{part_path(writer, number, split)}/{name}" for split in SPLITS for name in ("resid", "origin")]
        for key in (record_key(writer, number), *(key for path in paths for key in array_keys(path))):
            remove(root, key)
