"""A batch depends on its step alone; an epoch holds every row once; rows of one document are far apart."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fac_jax.activations import stream
from fac_jax.activations.store import Rows, StoreReader, StoreWriter, complete_store, create_store
from fac_jax.activations.stream import batch_function, batches, streams_for
from fac_jax.errors import UserError
from tests.activations.tiny_store import WIDTH, manifest


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
    read_blocks = reader.read_blocks
    monkeypatch.setattr(reader, "read_blocks", lambda blocks: (read.update(map(int, blocks)), read_blocks(blocks))[1])
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


def variance_of_a_document_effect(path: Path, shuffle_seed: int, blocks_mixed: int) -> float:
    """Variance of the batch mean of an effect that each document has, in units of what independent rows would give."""
    stream.WINDOW_BLOCKS, kept = blocks_mixed, stream.WINDOW_BLOCKS
    try:
        batch = batch_function(StoreReader(path), 256, seed=shuffle_seed)
    finally:
        stream.WINDOW_BLOCKS = kept
    effect = np.random.default_rng(1).standard_normal(1000)
    means = [effect[batch(step).doc.astype(int)].mean() for step in range(250)]  # one epoch
    return float(np.var(means) * 256)


def test_rows_of_a_document_are_far_apart(tmp_path: Path) -> None:
    described = manifest(shard_rows=8_192)
    create_store(tmp_path, described)
    writer = StoreWriter(tmp_path, described, "p0000")
    for index in range(64):  # 64,000 rows, 64 of each document, in the order of the corpus
        token = np.arange(index * 1000, (index + 1) * 1000, dtype=np.int32)
        resid = np.zeros((1000, WIDTH), ml_dtypes.bfloat16)
        rows = Rows(resid, (token // 64).astype(np.uint64), (token % 64).astype(np.int32), token)
        writer.append(index, {}, rows, np.zeros(1000, bool))
    writer.finish({})
    complete_store(tmp_path, ["p0000"])
    mixed = np.mean([variance_of_a_document_effect(tmp_path, seed, 64) for seed in range(3)])
    unmixed = np.mean([variance_of_a_document_effect(tmp_path, seed, 1) for seed in range(3)])
    print(f"variance of a per-document effect: {mixed:.2f} mixed, {unmixed:.2f} with windows of one block")
    assert mixed < 1.3 < unmixed
