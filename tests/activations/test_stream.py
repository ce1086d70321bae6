"""A batch depends on its step alone; an epoch holds every row once; rows of one document are far apart."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fac_jax.activations import reader as reader_module
from fac_jax.activations import stream
from fac_jax.activations.reader import StoreReader
from fac_jax.activations.rows import Rows
from fac_jax.activations.store import complete_store, create_store
from fac_jax.activations.stream import batch_function, batches, streams_for
from fac_jax.activations.writer import StoreWriter
from fac_jax.config.activations import HarvestConfig
from fac_jax.errors import UserError
from tests.activations.tiny_store import WIDTH, fill, manifest


def same(a: Rows, b: Rows) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("resid", "doc", "position", "token"))


@pytest.fixture
def reader(store: Path) -> StoreReader:
    return StoreReader(store)


def test_a_batch_is_a_pure_function_of_its_step(reader: StoreReader, store: Path) -> None:
    in_order = dict(islice(batches(reader, 100, seed=3), 40))
    assert list(in_order) == list(range(40))
    other = batch_function(StoreReader(store), 100, seed=3)
    for step in (39, 0, 17, 16, 15, 38):  # across windows and epochs, backwards
        assert same(other(step), in_order[step])
    assert not same(batch_function(reader, 100, seed=4)(0), in_order[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_rows_without_their_origin(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the same, and the store's arrays of origins are left alone: but for int8, whose scales lie there."""
    fill(tmp_path, replace(manifest(), dtype=dtype), batches=8, rows=250)
    reader, steps, read = StoreReader(tmp_path), (0, 1, 20), set[str]()
    whole = batch_function(reader, 100, seed=3)
    wanted = [whole(step) for step in steps]
    begin_read = reader_module.begin_read
    monkeypatch.setattr(
        reader_module, "begin_read", lambda array, *args: (read.add(array.dtype.name), begin_read(array, *args))[1]
    )
    bare = batch_function(reader, 100, seed=3, with_origin=False)
    for step, rows in zip(steps, wanted, strict=True):
        found = bare(step)
        assert np.array_equal(found.resid, rows.resid)
        assert len(found) == 100 and len(found.doc) == len(found.position) == len(found.token) == 0
    assert read == ({"int8", "uint64"} if dtype == "int8" else {"bfloat16"})


def test_it_resumes_from_its_step_and_from_grains_state(reader: StoreReader) -> None:
    iterator = batches(reader, 100, seed=0)
    for _ in range(7):
        next(iterator)
    state = iterator.get_state()
    wanted = [next(iterator) for _ in range(12)]
    restored = batches(reader, 100, seed=0)
    restored.set_state(state)
    for resumed in (restored, batches(reader, 100, seed=0, start_step=7)):
        for step, rows in wanted:
            found = next(resumed)
            assert found[0] == step and same(found[1], rows)


def test_every_epoch_holds_every_row_once_in_another_order(reader: StoreReader) -> None:
    assert reader.rows == 1500  # in blocks of which some are short
    epochs = []
    iterator = batches(reader, 100, seed=0)
    for _ in range(3):
        tokens = np.concatenate([rows.token for _, rows in islice(iterator, 15)])
        assert len(np.unique(tokens)) == len(tokens) == reader.rows
        epochs.append(tokens)
    assert (epochs[0] != epochs[1]).mean() > 0.9 < (epochs[1] != epochs[2]).mean()


def test_the_rows_are_those_of_the_store(reader: StoreReader) -> None:
    stored = reader.read_blocks(range(len(reader.block_rows)))
    stored = stored.take(np.argsort(stored.token))
    rows = batch_function(reader, 300, seed=0)(2)
    assert same(rows, stored.take(np.searchsorted(stored.token, rows.token)))
    assert rows.resid.dtype == ml_dtypes.bfloat16 and rows.resid.shape == (300, WIDTH)


@pytest.mark.parametrize("spans", [[(0, 60), (60, 120)], [(0, 15), (15, 100), (100, 120)], [(0, 120)], [(40, 41)]])
@pytest.mark.parametrize("streams", [1, 4, 12])
def test_hosts_read_their_rows_of_the_same_batch(
    spans: list[tuple[int, int]], streams: int, reader: StoreReader
) -> None:
    whole = batch_function(reader, 120, seed=0, streams=streams)
    for start, stop in spans:
        share = batch_function(reader, 120, seed=0, streams=streams, spans=[(start, stop)])
        for step in (0, 5, 30):
            assert same(share(step), whole(step).span(start, stop))
    parted = batch_function(reader, 120, seed=0, streams=streams, spans=[(0, 20), (50, 70)])(7)
    assert same(parted, whole(7).take(np.r_[0:20, 50:70]))


def test_a_host_reads_only_the_streams_of_its_rows(reader: StoreReader, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[int] = set()
    begin = reader.begin
    monkeypatch.setattr(reader, "begin", lambda blocks, *args: (read.update(map(int, blocks)), begin(blocks, *args))[1])
    for start, stop in ((0, 60), (60, 120)):
        before, read = read, set()
        share = batch_function(reader, 120, seed=0, streams=2, spans=[(start, stop)])
        for step in range(3):
            share(step)
        assert read and not before & read


def test_streams_fit_the_store_and_the_batch(reader: StoreReader) -> None:
    assert [streams_for(reader, 120, most) for most in (1, 8, 13, 100)] == [1, 8, 12, 12]
    assert streams_for(reader, 121, 10) == 1


def test_sizes_that_do_not_fit(reader: StoreReader) -> None:
    with pytest.raises(UserError, match="batch_rows 100 must be a multiple of streams 8"):
        batches(reader, 100, 0, streams=8)
    with pytest.raises(UserError, match="has 14 blocks, fewer than 50 streams"):
        batches(reader, 100, 0, streams=50)


def test_a_damaged_shard_stops_the_stream(store: Path) -> None:
    file = store / "arrays/p0000/000000/train/resid/c/0/0"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="shard arrays/p0000/000000/train of the store"):
        list(islice(batches(StoreReader(store), 100, 0), 20))


DOCUMENT_TOKENS, DOCUMENTS, EFFECTS = 286, 3600, 64


def variance_of_a_document_effect(path: Path, blocks_mixed: int) -> float:
    """Variance of the mean over a batch of 4,096 of effects that each document has, in units of what independent rows
    would give."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "WINDOW_BLOCKS", blocks_mixed)
        batch = batch_function(StoreReader(path), 4096, seed=0, streams=8)
    effect_de = np.random.default_rng(1).standard_normal((DOCUMENTS, EFFECTS))
    steps = DOCUMENTS * DOCUMENT_TOKENS // 4096  # one epoch
    means_se = np.stack([effect_de[batch(step).doc.astype(int)].mean(0) for step in range(steps)])
    return float(np.var(means_se, axis=0).mean() * 4096)


def test_rows_of_a_document_are_far_apart(tmp_path: Path) -> None:
    described = replace(manifest(shard_rows=HarvestConfig().shard_rows), d_model=2)
    create_store(tmp_path, described)
    with StoreWriter(tmp_path, described, "p0000") as writer:
        for index in range(36):  # in the order of the corpus
            token = np.arange(100 * DOCUMENT_TOKENS, dtype=np.int32)
            doc = (token // DOCUMENT_TOKENS + index * 100).astype(np.uint64)
            resid = np.ones((len(token), 2), ml_dtypes.bfloat16)
            rows = Rows(resid, doc, token % DOCUMENT_TOKENS, token)
            writer.append(index, {}, rows, np.zeros(len(token), bool))
        writer.finish({})
    complete_store(tmp_path, ["p0000"])
    mixed, unmixed = (variance_of_a_document_effect(tmp_path, blocks) for blocks in (stream.WINDOW_BLOCKS, 8))
    print(f"variance of a per-document effect: {mixed:.2f} mixed, {unmixed:.2f} with windows of one block a stream")
    assert 0.9 < mixed < 1.2 < 1.4 < unmixed


def test_hosts_come_and_go(reader: StoreReader) -> None:
    """1, 2 and 4 hosts give the same rows at every step; stopped at 4 hosts, it goes on with 2."""
    alone = dict(islice(batches(reader, 120, seed=5, streams=4), 30))

    def of_hosts(count: int, start: int, stop: int) -> dict[int, Rows]:
        size = 120 // count
        spans = [[(host * size, (host + 1) * size)] for host in range(count)]
        each = [dict(islice(batches(reader, 120, 5, start, 4, span), stop - start)) for span in spans]
        return {step: joined([host[step] for host in each]) for step in range(start, stop)}

    for count in (2, 4):
        assert all(same(rows, alone[step]) for step, rows in of_hosts(count, 0, 30).items())
    resumed = of_hosts(4, 0, 13) | of_hosts(2, 13, 30)
    assert list(resumed) == list(alone) and all(same(resumed[step], alone[step]) for step in alone)
    blocks = np.random.default_rng([5, 0]).permutation(len(reader.block_rows))
    lengths = [int(reader.block_rows[blocks[index::4]].sum()) for index in range(4)]
    of_stream = [
        np.concatenate([rows.token[index * 30 : (index + 1) * 30] for rows in resumed.values()])[:length]
        for index, length in enumerate(lengths)
    ]
    every = reader.read_blocks(range(len(reader.block_rows))).token
    assert np.array_equal(np.sort(np.concatenate(of_stream)), np.sort(every)), "an epoch holds every row once"


def joined(parts: list[Rows]) -> Rows:
    return Rows(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Rows)))


MEMORY = """
import resource, sys
from itertools import islice
from fac_jax.activations.reader import StoreReader
from fac_jax.activations.stream import batches
rows = 0
for step, batch in islice(batches(StoreReader(sys.argv[1]), 1024, seed=0, streams=8), int(sys.argv[2])):
    rows += len(batch)
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_store(tmp_path: Path) -> None:
    peaks = []
    for name, shards in (("small", 8), ("large", 80)):  # four windows, and forty
        described = replace(manifest(shard_rows=8192), d_model=256)
        create_store(tmp_path / name, described)
        with StoreWriter(tmp_path / name, described, "p0000") as writer:
            for index in range(shards):
                resid = np.full((8192, 256), index, ml_dtypes.bfloat16)
                token = np.arange(8192, dtype=np.int32)
                rows = Rows(resid, token.astype(np.uint64), token, token)
                writer.append(index, {}, rows, np.zeros(8192, bool))
            writer.finish({})
        complete_store(tmp_path / name, ["p0000"])
        command = [sys.executable, "-c", MEMORY, str(tmp_path / name), "640"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        seen, peak = map(int, done.stdout.split())
        assert seen == 80 * 8192  # ten epochs of the small one
        peaks.append(peak)
    print(f"peak RSS: {peaks[0] / 1024:.0f} MiB for 32 MiB of rows, {peaks[1] / 1024:.0f} MiB for 320 MiB")
    assert peaks[1] < 1.1 * peaks[0]
