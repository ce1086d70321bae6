"""The activation store: rows of the residual stream on disk or in an object store, and where each row came from.

Writes, below one folder or URL (what the JSON files hold is in manifest.py):

    manifest.json                       what the rows are; once the harvest is complete also totals and the shard list
    arrays/WRITER/NUMBER/SPLIT/resid    [rows, d_model]: bfloat16, float16 or int8
    arrays/WRITER/NUMBER/SPLIT/origin   uint64 [rows, 3]: document id, position in the document, token id
                                        (int8: [rows, 4], the last one the bits of the row's float32 scale)
    records/WRITER/NUMBER.json          commit record: only with it does the shard exist
    finished/WRITER.json                this writer saw the end of its part of the corpus
    claims/WRITER.*                     who is this writer (claim.py)
    quarantine.json                     blocks that `fac store verify` found damaged (upkeep.py)

A shard holds the training and the validation rows of one stretch of the corpus, as arrays of their own. It is written
whole, under a path of its own, and then committed by one atomic write of its record, which also says where the next
shard begins. So a kill at any moment loses no row and doubles none, writers share nothing, and a restarted writer
makes the same bytes. Rows are shuffled inside a shard, because readers fetch blocks and neighbouring rows of one
document are far from independent.

Stores of several layers lie side by side as `layer-NN/`, and `layers.json` lists them. writer.py and reader.py write
and read one store.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fac_jax.activations.arrays import Root, open_array, open_root, read_json, storage, write_json
from fac_jax.activations.manifest import (
    SPLITS,
    Finished,
    Layers,
    Manifest,
    Part,
    Quarantine,
    Record,
    Reduction,
    Split,
    Totals,
    check_holds,
    identity,
)
from fac_jax.config.file import Config
from fac_jax.errors import UserError

log = logging.getLogger(__name__)


def layer_path(path: str | Path, layer: int) -> str:
    """Where the store of one layer lies below a folder or URL of several."""
    return f"{str(path).rstrip('/')}/layer-{layer:02d}"


def add_layers(path: str | Path, layers: Sequence[int]) -> None:
    """Note in `layers.json` that there are, or will be, stores of these layers."""
    root = open_root(path)
    there = read_json(root, "layers.json", Layers)
    listed = Layers(tuple(sorted({*layers, *(there.layers if there else ())})))
    if listed != there:
        write_json(root, "layers.json", listed)


def stores_at(path: str | Path) -> list[str]:
    """The store at `path`, or those of its layers. Raises UserError when there is none."""
    root = open_root(path)
    if read_json(root, "manifest.json", Manifest) is not None:
        return [str(path)]
    listed = read_json(root, "layers.json", Layers)
    if listed is None:
        raise UserError(f"no activation store at {path}: run `fac harvest` first or set train.store")
    return [layer_path(path, layer) for layer in listed.layers]


def find_store(path: str | Path, layer: int) -> str:
    """The store of `layer` at `path`, or the only one there, whichever layer it holds. Raises UserError for neither."""
    found = stores_at(path)
    if found == [str(path)]:
        return found[0]
    wanted = layer_path(path, layer)
    if wanted not in found:
        held = ", ".join(str(int(name[-2:])) for name in found)
        raise UserError(
            f"store at {path} holds layers {held}, config asks {layer}: set harvest.layers and run `fac harvest` "
            "again, or set train.store"
        )
    return wanted


def store_of(config: Config, inputs: Mapping[str, Path]) -> str | None:
    """The store of `backbone.layer` that a stage with these inputs reads; None when it has neither run nor setting."""
    place: str | Path | None = config.train.store
    if place is None and "activations" in inputs:
        place = config.harvest.store or inputs["activations"]
    return None if place is None else find_store(place, config.backbone.layer)


def create_store(path: str | Path, manifest: Manifest) -> None:
    """Begin the store, or go on with one that is there. Raises UserError when that one holds something else."""
    root = open_root(path)
    there = read_json(root, "manifest.json", Manifest)
    if there is None:
        write_json(root, "manifest.json", manifest)
    else:
        asked = identity(manifest) | ({} if there.files_digest else {"files_digest": ""})
        check_holds(there, path, "harvest into another run.dir or harvest.store, or delete that folder", **asked)


def read_manifest(path: str | Path) -> Manifest:
    """The manifest. Raises UserError when there is no store at `path` or it is of another version."""
    manifest = read_json(open_root(path), "manifest.json", Manifest)
    if manifest is None:
        raise UserError(f"no activation store at {path}: run `fac harvest` first or set train.store")
    return manifest


def finished_counts(path: str | Path, writer: str) -> dict[str, int] | None:
    """What `writer` counted, if it finished and all its shards are there; otherwise None: it has to go on."""
    root = open_root(path)
    finished = read_json(root, finished_key(writer), Finished)
    if finished is None or committed(root, read_manifest(path), writer) < finished.shards:
        return None
    return finished.counts


def complete_store(path: str | Path, writers: Sequence[str]) -> Totals:
    """Reduce the commit records to totals and write them into the manifest: from now on the store can be read."""
    root, manifest = open_root(path), read_manifest(path)
    counts: dict[str, int] = {}
    for writer in writers:
        finished = read_json(root, finished_key(writer), Finished)
        if finished is None:
            raise UserError(f"store at {path}: writer {writer} has not finished; run `fac harvest` again")
        for name, value in finished.counts.items():
            counts[name] = counts.get(name, 0) + value
    totals = totals_of(manifest, parts_of(root, writers), counts)
    write_json(root, "manifest.json", dataclasses.replace(manifest, totals=totals))
    return totals


def stored_bytes(path: str | Path) -> int:
    """Bytes of a complete store: of its files in a local folder, and elsewhere of its rows, uncompressed."""
    root, manifest = open_root(path), read_manifest(path)
    if root.folder is not None:
        return sum(file.stat().st_size for file in root.folder.rglob("*") if file.is_file())
    rows = sum(split.rows for split in manifest.totals.splits.values()) if manifest.totals else 0
    return rows * (manifest.d_model * (1 if manifest.dtype == "int8" else 2) + 8 * origin_width(manifest))


PlacedPart = tuple[Split, str, Part]
"""Split, path, and what the record says of it."""


def parts_of(root: Root, writers: Sequence[str], prefix: str = "") -> Iterator[PlacedPart]:
    """Every part of every shard of finished writers; `prefix` goes before each path. Read as they are asked for: the
    records of a store of 1e9 rows hold gigabytes of sums."""
    for writer in writers:
        finished = read_json(root, finished_key(writer), Finished)
        for number in range(finished.shards if finished else 0):
            parts = read_record(root, writer, number).parts
            for split in SPLITS:
                yield split, prefix + part_path(writer, number, split), parts[split]


def totals_of(manifest: Manifest, parts: Iterable[PlacedPart], counts: dict[str, int]) -> Totals:
    """Totals over the parts of one or more stores."""
    reductions = {split: Reduction(manifest.d_model) for split in SPLITS}
    for split, path, part in parts:
        reductions[split].add(path, part)
    return Totals({split: reduction.totals() for split, reduction in reductions.items()}, counts)


def writer_name(index: int) -> str:
    """Name of the writer that is process `index`."""
    return f"p{index:04d}"


def part_path(writer: str, number: int, split: str) -> str:
    """Where the rows of one split of a shard lie."""
    return f"arrays/{writer}/{number:06d}/{split}"


def record_key(writer: str, number: int) -> str:
    """Where a shard's commit record lies."""
    return f"records/{writer}/{number:06d}.json"


def record_of(path: str) -> str:
    """The key of the commit record of the shard that the part at `path` belongs to."""
    _, writer, number, _ = path.rsplit("/", 3)
    return record_key(writer, int(number))


def finished_key(writer: str) -> str:
    """Where a writer's last word lies."""
    return f"finished/{writer}.json"


def read_record(root: Root, writer: str, number: int) -> Record:
    """A commit record. Raises UserError when it is missing or damaged."""
    key = record_key(writer, number)
    record = read_json(root, key, Record)
    if record is None:
        raise UserError(
            f"{root.url}/{key} is missing: run `fac harvest` again, it makes that shard and those after it anew"
        )
    return record


def records(root: Root, writer: str) -> Iterator[Record]:
    """A writer's commit records, as far as they follow each other."""
    number = 0
    while (record := read_json(root, record_key(writer, number), Record)) is not None:
        yield record
        number += 1


def committed(root: Root, manifest: Manifest, writer: str) -> int:
    """How many leading shards of a writer have a record and files that open: it goes on after them.

    The last row of each array is read, whose block lies at the end of its file, so a missing or truncated one shows.
    """
    number = 0
    for number, record in enumerate(records(root, writer), 1):
        for split, part in record.parts.items():
            path = part_path(writer, number - 1, split)
            try:
                with storage(path, "it is made anew"):
                    for array in open_part(root, path, part.rows, manifest) if part.rows else ():
                        array[part.rows - 1 : part.rows].read().result()
            except UserError as error:
                log.warning("store at %s: %s", root.url, error)
                return number - 1
    return number


def open_part(root: Root, path: str, rows: int, manifest: Manifest) -> tuple[Any, Any]:
    """The arrays `resid` and `origin` of one part."""
    resid = open_array(root, f"{path}/resid", rows, manifest.d_model, manifest.dtype, manifest.form)
    return resid, open_array(root, f"{path}/origin", rows, origin_width(manifest), "uint64", manifest.form)


def origin_width(manifest: Manifest) -> int:
    """Columns of `origin`: document, position, token, and for int8 the bits of the row's scale."""
    return 4 if manifest.dtype == "int8" else 3


def read_quarantine(root: Root) -> dict[str, tuple[int, ...]]:
    """Damaged blocks by part; none when nothing was found."""
    found = read_json(root, "quarantine.json", Quarantine)
    return {} if found is None else found.blocks
