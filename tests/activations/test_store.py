"""What is appended is read back once and whole; a kill at any moment changes nothing; damage is named, never zeros."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fac_jax.activations import writer as module
from fac_jax.activations.manifest import SPLITS, Cursor, Split, check_holds, rows_per_block
from fac_jax.activations.reader import StoreReader
from fac_jax.activations.rows import Rows
from fac_jax.activations.store import complete_store, create_store, finished_counts, read_manifest
from fac_jax.activations.writer import StoreWriter
from fac_jax.errors import UserError
from tests.activations.tiny_store import WIDTH, batch_rows, contents, fill, manifest

SHARD = "arrays/p0000/000001/train/resid/c/0/0"


@pytest.mark.parametrize(
    ("d_model", "dtype", "rows"),
    [(576, "bfloat16", 1024), (2304, "float16", 256), (4096, "bfloat16", 128), (4096, "int8", 256), (2, "int8", 1024)],
)
def test_a_block_is_about_a_mebibyte(d_model: int, dtype: str, rows: int) -> None:
    assert rows_per_block(d_model, dtype) == rows
    assert 2**19.5 <= rows * d_model * (1 if dtype == "int8" else 2) <= 2**20.5 or rows in (32, 1024)


def everything(path: Path, split: Split) -> Rows:
    reader = StoreReader(path, split)
    return reader.read_blocks(range(len(reader.block_rows)))


def test_every_row_is_read_back_once_with_its_origin(store: Path) -> None:
    appended = [batch_rows(index, 250) for index in range(8)]
    for split in SPLITS:
        rows = everything(store, split)
        chosen = [held_out == (split == "validation") for _, held_out in appended]
        order = np.argsort(rows.token)
        for name in ("resid", "doc", "position", "token"):
            wanted = np.concatenate([getattr(r, name)[c] for (r, _), c in zip(appended, chosen, strict=True)])
            found = getattr(rows, name)
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(found[order], wanted)
        assert not (rows.token[:100] == np.sort(rows.token[:100])).all()  # shuffled within the shard


def test_blocks_come_in_the_order_asked_for(store: Path) -> None:
    reader = StoreReader(store)
    each = [reader.read_blocks([block]) for block in range(len(reader.block_rows))]
    together = reader.read_blocks([5, 0, 3])
    np.testing.assert_array_equal(together.token, np.concatenate([each[b].token for b in (5, 0, 3)]))
    assert [len(rows) for rows in each] == reader.block_rows.tolist()
    assert max(reader.block_rows) == 128 and reader.rows == sum(reader.block_rows)


def test_totals_are_those_of_the_rows(store: Path) -> None:
    for split in SPLITS:
        reader, rows = StoreReader(store, split), everything(store, split)
        resid = rows.resid.astype(np.float64)
        norms = np.linalg.norm(resid, axis=1)
        np.testing.assert_allclose(reader.mean, resid.mean(0), rtol=1e-6)
        np.testing.assert_allclose(reader.mean_square, (norms**2).mean(), rtol=1e-6)
        assert reader.rows == len(rows) and reader.d_model == WIDTH
        assert abs((norms < reader.median_norm).mean() - 0.5) < 0.06  # from a sample
    totals = read_manifest(store).totals
    assert totals is not None and totals.counts == {"batches": 8}


def test_a_restarted_writer_takes_up_where_the_last_commit_ended(tmp_path: Path, store: Path) -> None:
    described = manifest()
    create_store(tmp_path / "again", described)
    for stop in (3, 5, 8):  # each time a new writer, which loses what was not committed
        with StoreWriter(tmp_path / "again", described, "p0000") as writer:
            for index in range(writer.cursor.first // 10, stop):
                writer.append(index * 10, {"batches": index}, *batch_rows(index, 250))
            if stop == 8:
                writer.finish({"batches": 8})
    assert writer.cursor == Cursor(40, 24, {"batches": 4})  # 1,024 rows in two shards: row 24 of the fifth batch
    complete_store(tmp_path / "again", ["p0000"])
    assert contents(tmp_path / "again") == contents(store)


WRITE = """
import sys
from pathlib import Path
from tests.activations.tiny_store import announce_appends, fill, manifest
announce_appends()
print("begun", flush=True)
fill(Path(sys.argv[1]), manifest(), batches=500, rows=250, shards_at_once=int(sys.argv[2]))
"""


def test_fifty_kills_at_any_moment_and_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    fill(tmp_path / "undisturbed", manifest(), batches=500, rows=250)
    chance, store = random.Random(0), tmp_path / "killed"
    command = [sys.executable, "-c", WRITE, str(store)]
    root = Path(__file__).parents[2]
    moments = []
    for _ in range(50):
        given = [*command, str(chance.randrange(1, 5))]
        with subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root) as child:
            assert child.stdout is not None
            for _ in range(chance.randrange(0, 24)):
                child.stdout.readline()
            time.sleep(chance.random() * 0.01)
            child.kill()
            assert child.wait() == -9, child.stderr and child.stderr.read()
        moments.append(len(list(store.glob("records/p0000/*"))))
    print(moments)
    assert 20 < len(set(moments)) and moments[-1] < 244, "the kills were spread over the writing, and before its end"
    with pytest.raises(UserError, match="not complete: run `fac harvest` again"):
        StoreReader(store)
    subprocess.run([*command, "3"], check=True, stdout=subprocess.DEVNULL, cwd=root)
    assert contents(store) == contents(tmp_path / "undisturbed")
    token = np.concatenate([everything(store, split).token for split in SPLITS])
    assert np.array_equal(np.sort(token), np.arange(500 * 250))


def test_shards_written_together_are_committed_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "one by one", manifest(), batches=20, rows=250)
    write, events, together = module.write_arrays, list[str](), threading.Barrier(4)

    def slow_at_first(root: Any, values: dict[str, np.ndarray], form: Any) -> None:
        number = int(next(iter(values)).split("/")[2])
        if number < 4:  # until four of them are being written, and then the last one first
            together.wait(timeout=60)
            time.sleep(0.05 * (3 - number))
        write(root, values, form)
        events.append(f"wrote {number}")

    def noted(root: Any, key: str, value: Any) -> None:
        events.append(f"committed {key}")
        write_json(root, key, value)

    write_json = module.write_json
    monkeypatch.setattr(module, "write_arrays", slow_at_first)
    monkeypatch.setattr(module, "write_json", noted)
    fill(tmp_path / "together", manifest(), batches=20, rows=250, shards_at_once=4)
    assert events[:4] == [f"wrote {number}" for number in (3, 2, 1, 0)]
    assert [event for event in events if "records" in event] == sorted(event for event in events if "records" in event)
    assert contents(tmp_path / "together") == contents(tmp_path / "one by one")


def test_no_shard_is_committed_after_one_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = module.write_arrays

    def failing(root: Any, values: dict[str, np.ndarray], form: Any) -> None:
        if any("/000002/" in path for path in values):
            raise UserError("no space left")
        write(root, values, form)

    monkeypatch.setattr(module, "write_arrays", failing)
    with pytest.raises(UserError, match="no space left"):
        fill(tmp_path / "store", manifest(), batches=20, rows=250, shards_at_once=3)
    assert [path.name for path in sorted(tmp_path.glob("store/records/p0000/*"))] == ["000000.json", "000001.json"]
    monkeypatch.undo()
    fill(tmp_path / "store", manifest(), batches=20, rows=250)
    fill(tmp_path / "undisturbed", manifest(), batches=20, rows=250)
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")


def test_a_second_writer_of_one_name_is_stopped(tmp_path: Path) -> None:
    create_store(tmp_path, manifest())
    with StoreWriter(tmp_path, manifest(), "p0000"), StoreWriter(tmp_path, manifest(), "p0001"):
        message = (
            rf"writer p0000 of the store at {tmp_path} is process {os.getpid()} on .* already: wait for it or stop it"
        )
        with pytest.raises(UserError, match=message):
            StoreWriter(tmp_path, manifest(), "p0000")
    with StoreWriter(tmp_path, manifest(), "p0000") as writer:
        assert writer.shards == 0


def test_writers_share_one_store(tmp_path: Path) -> None:
    described = manifest(writers=2)
    create_store(tmp_path, described)
    writers = [StoreWriter(tmp_path, described, name) for name in ("p0000", "p0001")]
    for index, writer in enumerate(writers):
        writer.append(0, {}, *batch_rows(index, 700))
    writers[0].finish({"documents": 3})
    with pytest.raises(UserError, match="writer p0001 has not finished; run `fac harvest` again"):
        complete_store(tmp_path, ["p0000", "p0001"])
    writers[1].finish({"documents": 4})
    totals = complete_store(tmp_path, ["p0000", "p0001"])
    assert totals.counts == {"documents": 7} and sum(split.rows for split in totals.splits.values()) == 1400
    tokens = np.concatenate([everything(tmp_path, split).token for split in SPLITS])
    assert sorted(tokens) == list(range(1400))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[: len(data) // 2], "OUT_OF_RANGE"),
        (lambda data: data[:1000] + bytes([data[1000] ^ 1]) + data[1001:], "DATA_LOSS.*Digest mismatch"),
        (lambda data: bytearray(), "not valid for value of size 0"),
    ],
    ids=["truncated", "bit flipped", "emptied"],
)
def test_a_damaged_shard_is_named_and_never_read_as_zeros(
    damage: Callable[..., Path], change: Callable[[bytearray], bytearray], reason: str
) -> None:
    store = damage(SHARD, change)
    with pytest.raises(
        UserError, match=rf"block . of shard arrays/p0000/000001/train of the store at .*({reason})"
    ) as raised:
        everything(store, "train")
    assert "delete records/p0000/000001.json and the run's activations/stage.json, then run `fac harvest` again" in str(
        raised.value
    )


def test_a_missing_shard_is_named(store: Path) -> None:
    shutil.rmtree(store / "arrays/p0000/000001/train")
    with pytest.raises(UserError, match=r"shard arrays/p0000/000001/train of the store at .*is missing.*fac harvest"):
        everything(store, "train")


@pytest.mark.parametrize("how", ["flipped, its record deleted as told", "truncated", "missing"])
def test_the_remedy_makes_the_shard_anew(store: Path, how: str) -> None:
    whole = contents(store)
    if how == "missing":
        shutil.rmtree(store / "arrays/p0000/000001")
    elif how == "truncated":
        (store / SHARD).write_bytes((store / SHARD).read_bytes()[:-5])
    else:
        (store / SHARD).write_bytes(b"x" + (store / SHARD).read_bytes()[1:])
        (store / "records/p0000/000001.json").unlink()
    assert finished_counts(store, "p0000") is None
    fill(store, manifest(), batches=8, rows=250)
    assert contents(store) == whole


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:-10], "JSONDecodeError"),
        (lambda data: bytearray(data.replace(b'"rows":3', b'"rows":4')), "its SHA-256 does not match its content"),
        (lambda data: bytearray(b"[]"), "cannot be read"),
    ],
)
def test_an_unreadable_record_is_named(
    damage: Callable[..., Path], change: Callable[[bytearray], bytearray], reason: str
) -> None:
    store = damage("records/p0000/000001.json", change)
    with pytest.raises(
        UserError, match=rf"records/p0000/000001.json .*{reason}.*delete it and run `fac harvest` again"
    ):
        StoreWriter(store, manifest(), "p0000")


def test_an_unreadable_manifest_is_named(damage: Callable[..., Path]) -> None:
    store = damage("manifest.json", lambda data: data[:100])
    with pytest.raises(UserError, match=r"manifest.json cannot be read"):
        StoreReader(store)


def test_a_store_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    create_store(tmp_path, replace(manifest(), version=7))
    with pytest.raises(UserError, match=r"manifest.json is of store version 7, this program reads up to 2: upgrade"):
        read_manifest(tmp_path)


def test_a_store_of_another_layer_or_model(store: Path) -> None:
    held = read_manifest(store)
    check_holds(held, store, layer=14, model="tiny")
    wanted = f"store at {store} holds layer 14, config asks 16: run `fac harvest` again or set train.store"
    with pytest.raises(UserError, match=re.escape(wanted)):
        check_holds(held, store, layer=16, model="tiny")
    with pytest.raises(UserError, match="holds layer 14, model tiny, config asks layer 16, model other: "):
        check_holds(held, store, layer=16, model="other")
    with pytest.raises(UserError, match="holds layer 14, config asks 15: harvest into another run.dir"):
        create_store(store, manifest(layer=15))


def test_no_store_and_no_rows(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no activation store at .*nowhere: run `fac harvest` first or set train.store"
    ):
        StoreReader(tmp_path / "nowhere")
    fill(tmp_path / "empty", manifest(), batches=1, rows=100)  # two documents, neither held out
    with pytest.raises(UserError, match="has no validation rows: harvest more documents"):
        StoreReader(tmp_path / "empty", "validation")


FILL = """
import sys
from pathlib import Path
from fac_jax.errors import UserError
from tests.activations.tiny_store import fill, manifest
try:
    fill(Path(sys.argv[1]), manifest(), batches=40, rows=250)
except UserError as error:
    sys.exit(str(error))
"""
# A file system of its own, of half a megabyte and then of more room, that vanishes with the shell.
FULL = """
set -e
mount -t tmpfs -o size=512k none "$1"
! "$2" -c "$3" "$1/store" || exit 3
ls "$1/store/records/p0000" | wc -l
mount -o remount,size=64m "$1"
"$2" -c "$3" "$1/store"
cp -r "$1/store" "$4"
"""


def test_a_full_disk_keeps_what_is_committed(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no right to mount a file system here")
    fill(tmp_path / "undisturbed", manifest(), batches=40, rows=250)
    (tmp_path / "disk").mkdir()
    names = str(tmp_path / "disk"), sys.executable, FILL, str(tmp_path / "copy")
    command = ["unshare", "-rm", "bash", "-c", FULL, "bash", *names]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert re.search(r"no space left for .*arrays/p0000.*free some, then run the same command again", done.stderr)
    assert 0 < int(done.stdout) < 20
    assert contents(tmp_path / "copy") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("how", [{}, {"dtype": "int8"}, {"norm_filter": 10.0}])
def test_a_residual_that_is_not_finite_is_not_stored(tmp_path: Path, how: dict[str, Any]) -> None:
    """Nor taken for an outlier, whose norm is just large."""
    described = replace(manifest(), **how)
    create_store(tmp_path, described)
    writer = StoreWriter(tmp_path, described, "p0000")
    rows, held_out = batch_rows(0, 200)
    rows.resid[70, 3] = ml_dtypes.bfloat16(np.inf)
    writer.append(0, {}, rows, held_out)
    with pytest.raises(UserError, match=r"document 8000000000000001 at token 20 is not finite, .*layer 14 of tiny"):
        writer.finish({})


def test_a_store_by_url(tmp_path: Path) -> None:
    url = (tmp_path / "by url").as_uri()
    create_store(url, manifest())
    assert read_manifest(url) == manifest() == read_manifest(tmp_path / "by url")
