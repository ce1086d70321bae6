"""What is in a store; damage by name, and past it only when told; stores merged without a copy; a writer dropped."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fac_jax.activations.manifest import SPLITS, check_holds
from fac_jax.activations.reader import StoreReader
from fac_jax.activations.rows import Rows
from fac_jax.activations.store import add_layers, complete_store, create_store, layer_path, read_manifest
from fac_jax.activations.stream import batch_function
from fac_jax.activations.upkeep import drop, info, merge, remedies, verify
from fac_jax.activations.writer import StoreWriter
from fac_jax.cli import main
from fac_jax.errors import UserError
from tests.activations.tiny_store import batch_rows, contents, fill, manifest

SHARD = "arrays/p0000/000001/train/resid/c/0/0"
BLOCK_BYTES = 128 * 16 * 2 + 4  # rows x width x bfloat16, and a checksum


def everything(path: Path | str, **skip: str) -> Rows:
    reader = StoreReader(path, "train", **skip)  # type: ignore[arg-type]
    return reader.read_blocks(range(len(reader.block_rows)))


def flip(block: int) -> Callable[[bytearray], bytearray]:
    def change(data: bytearray) -> bytearray:
        data[len(data) % BLOCK_BYTES + block * BLOCK_BYTES + 7] ^= 16  # after the index of the blocks
        return data

    return change


def test_info_says_what_is_there(store: Path) -> None:
    said = "\n".join(info(str(store)))
    for part in ("layer 14 of tiny, width 16, bfloat16", "train: 1,500 rows in 4 shards", "validation: 500 rows"):
        assert part in said
    assert "writer p0000: 2,000 rows" in said and "batches: 8" in said
    size = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    assert f"{size / 1e9:,.3f} GB" in said


def test_a_whole_store_is_whole(store: Path) -> None:
    before = contents(store)
    assert verify(str(store)) == []
    assert contents(store) == before


def test_every_damaged_block_is_named_with_its_documents(store: Path, damage: Callable[..., Path]) -> None:
    (_, rows), (part, _), *_ = read_manifest(store).totals.splits["train"].parts  # type: ignore[union-attr]
    whole = StoreReader(store).read_blocks([-(-rows // 128) + 2])  # block 2 of the second shard
    damage(SHARD, flip(2))
    damage("arrays/p0000/000002/validation/resid/c/0/0", lambda data: data[:100])
    shutil.rmtree(store / "arrays/p0000/000000/train/origin")
    found = verify(str(store))
    assert len(found) == len({(one.path, one.blocks) for one in found})
    by_part = {path: [one for one in found if one.path == path] for path in {one.path for one in found}}
    assert {path.removeprefix("arrays/p0000/") for path in by_part} == {
        "000001/train",
        "000002/validation",
        "000000/train",
    }
    (flipped,) = by_part[part]
    assert flipped.blocks == (2,) and "Digest mismatch" in flipped.reason
    assert flipped.documents == tuple(f"{doc:016x}" for doc in np.unique(whole.doc))
    assert [one.blocks for one in by_part["arrays/p0000/000000/train"]] == [(i,) for i in range(-(-rows // 128))]
    assert all("of which documents cannot be read either" in str(one) for one in by_part["arrays/p0000/000000/train"])
    said = "\n".join(remedies(found))
    assert f"{store}/records/p0000/000001.json" in said and "--train.on-bad-chunk skip" in said


def test_training_goes_past_a_quarantine_only_when_told(damage: Callable[..., Path]) -> None:
    store = damage(SHARD, flip(1))
    whole = set(range(2000)) - {int(t) for t in everything_held_out(store)}
    with pytest.raises(UserError, match=r"block 1 of shard arrays/p0000/000001/train .*fac store verify"):
        everything(store)
    (found,) = verify(str(store))
    with pytest.raises(UserError, match=r"1 quarantined blocks hold 128 of 1,500 train rows .*on_bad_chunk to skip"):
        StoreReader(store)
    reader = StoreReader(store, "train", "skip")
    assert reader.left_out == 128 and reader.rows == 1372
    rows = everything(store, on_bad_chunk="skip")
    assert len(set(rows.token.tolist())) == 1372 and set(rows.token.tolist()) < whole
    assert StoreReader(store, "validation").left_out == 0  # nothing of it is damaged
    seen = np.concatenate([batch_function(reader, 98, seed=0)(step).token for step in range(14)])
    assert np.array_equal(np.sort(seen), np.sort(rows.token))
    assert "quarantined: 1 blocks" in "\n".join(info(str(store)))
    (Path(found.store) / "records/p0000/000001.json").unlink()
    fill(store, manifest(), batches=8, rows=250)  # as the remedy says
    assert verify(str(store)) == [] and StoreReader(store).rows == 1500


def everything_held_out(store: Path) -> np.ndarray:
    reader = StoreReader(store, "validation")
    return reader.read_blocks(range(len(reader.block_rows))).token


def test_a_shard_of_another_store_is_found(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    create_store(other, manifest())
    with StoreWriter(other, manifest(), "p0000") as writer:
        for index in range(8):
            rows, held = batch_rows(index, 250)
            writer.append(index * 10, {}, replace(rows, resid=rows.resid * rows.resid.dtype.type(2)), held)
        writer.finish({})
    shutil.copytree(other / "arrays/p0000/000001/train", store / "arrays/p0000/000001/train", dirs_exist_ok=True)
    (found,) = verify(str(store))
    assert found.path == "arrays/p0000/000001/train" and re.search("squares sum to .* its record says", found.reason)


def two_writers(path: Path, offset: int = 0) -> None:
    described = manifest(writers=2)
    create_store(path, described)
    for index, name in enumerate(("p0000", "p0001")):
        with StoreWriter(path, described, name) as writer:
            writer.append(0, {}, *batch_rows(offset + index, 700))
            writer.finish({"documents": 14})
    complete_store(path, ["p0000", "p0001"])


def test_stores_are_merged_without_a_copy(store: Path, tmp_path: Path) -> None:
    two_writers(tmp_path / "second", offset=10)
    before = contents(store), contents(tmp_path / "second")
    said = merge(str(tmp_path / "both"), [str(store), str(tmp_path / "second")])
    assert [file.name for file in (tmp_path / "both").rglob("*") if file.is_file()] == ["manifest.json"]
    assert (contents(store), contents(tmp_path / "second")) == before
    merged, parts = everything(tmp_path / "both"), [everything(store), everything(tmp_path / "second")]
    np.testing.assert_array_equal(np.sort(merged.token), np.sort(np.concatenate([part.token for part in parts])))
    reader = StoreReader(tmp_path / "both")
    resid = np.concatenate([part.resid for part in parts]).astype(np.float64)
    np.testing.assert_allclose(reader.mean, resid.mean(0), rtol=1e-6)
    np.testing.assert_allclose(reader.mean_square, np.square(resid).sum(1).mean(), rtol=1e-6)
    assert reader.rows == len(resid) and any(line.startswith("  train: 2,") for line in said)
    check_holds(reader.manifest, "both", layer=14, model="tiny")
    assert verify(str(tmp_path / "both")) == []
    thrice = merge(str(tmp_path / "thrice"), [str(tmp_path / "both"), str(store_of_another_kind(tmp_path))])
    assert "in 3 member stores" in "\n".join(thrice)


def store_of_another_kind(tmp_path: Path) -> Path:
    fill(tmp_path / "third", replace(manifest(), corpus_digest="other"), batches=2, rows=400)
    return tmp_path / "third"


def test_damage_in_a_member_is_seen_through_the_merged_store(store: Path, tmp_path: Path) -> None:
    two_writers(tmp_path / "second", offset=10)
    merge(str(tmp_path / "both"), [str(tmp_path / "second"), str(store)])
    file = store / SHARD
    file.write_bytes(flip(0)(bytearray(file.read_bytes())))
    (found,) = verify(str(tmp_path / "both"))
    assert (found.store, found.path, found.blocks) == (str(store), "arrays/p0000/000001/train", (0,))
    with pytest.raises(UserError, match="1 quarantined blocks hold 128 of"):
        StoreReader(tmp_path / "both")
    assert StoreReader(tmp_path / "both", "train", "skip").left_out == 128


def test_layers_are_merged_one_by_one(tmp_path: Path) -> None:
    for name, corpus in (("a", "c"), ("b", "d")):
        add_layers(tmp_path / name, [3, 14])
        for layer in (3, 14):
            described = replace(manifest(layer=layer), corpus_digest=corpus)
            fill(Path(layer_path(tmp_path / name, layer)), described, batches=2, rows=400)
    merge(str(tmp_path / "both"), [str(tmp_path / "a"), str(tmp_path / "b")])
    for layer in (3, 14):
        both = read_manifest(layer_path(tmp_path / "both", layer))
        assert both.layer == layer and both.totals is not None and both.totals.splits["train"].rows == 2 * 600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_digest": "other"}, "has model_digest other, .* only stores of one model"),
        ({"layer": 15}, "holds layers .15., .* .14.: only the same can be merged"),
        ({"dtype": "float16"}, "has dtype float16"),
    ],
)
def test_what_is_unlike_is_not_merged(store: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    other = replace(manifest(), **change)  # type: ignore[arg-type]
    fill(tmp_path / "other", other, batches=1, rows=400)
    with pytest.raises(UserError, match=message):
        merge(str(tmp_path / "both"), [str(store), str(tmp_path / "other")])
    assert not (tmp_path / "both").exists()


def test_rows_are_not_merged_twice(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "copy")
    for again in (store, tmp_path / "copy"):
        with pytest.raises(UserError, match="holds the rows of .*they would count twice"):
            merge(str(tmp_path / "both"), [str(store), str(again)])
    with pytest.raises(UserError, match="holds a store with rows of its own"):
        two_writers(tmp_path / "second", offset=10)
        merge(str(store), [str(tmp_path / "second"), str(tmp_path / "copy")])


def test_a_writer_is_dropped_and_made_anew(tmp_path: Path) -> None:
    two_writers(tmp_path / "store")
    whole = contents(tmp_path / "store")
    said = drop(str(tmp_path / "store"), "p0001")
    assert not any("writer p0001" in line for line in said)
    assert not [file for file in (tmp_path / "store/arrays/p0001").rglob("*") if file.is_file()]
    tokens = [everything(tmp_path / "store").token, everything_held_out(tmp_path / "store")]
    assert sorted(np.concatenate(tokens)) == list(range(700))
    totals = read_manifest(tmp_path / "store").totals
    assert (
        totals is not None and totals.counts == {"documents": 14} and sum(totals.splits[s].rows for s in SPLITS) == 700
    )
    two_writers(tmp_path / "store")
    assert contents(tmp_path / "store") == whole


def test_what_cannot_be_dropped(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without p0000 no training rows are left"):
        drop(str(store), "p0000")
    with pytest.raises(UserError, match="has no writer 'p0007'; it has p0000"):
        drop(str(store), "p0007")
    two_writers(tmp_path / "second", offset=10)
    with (
        StoreWriter(tmp_path / "second", manifest(writers=2), "p0001"),
        pytest.raises(UserError, match=f"is process {os.getpid()} on .* already"),
    ):
        drop(str(tmp_path / "second"), "p0001")
    merge(str(tmp_path / "both"), [str(store), str(tmp_path / "second")])
    with pytest.raises(UserError, match="is merged from others"):
        drop(str(tmp_path / "both"), "p0001")


def test_the_command_line(damage: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    store = damage(SHARD, lambda data: data)
    assert main(["store", "verify", str(store)]) == 0 and "every block is whole" in capsys.readouterr().out
    assert main(["store", "info", str(store)]) == 0 and "1,500 rows" in capsys.readouterr().out
    damage(SHARD, flip(0))
    assert main(["store", "verify", str(store)]) == 1
    assert "arrays/p0000/000001/train: block 0: " in capsys.readouterr().out
    assert main(["store", "info", str(store.parent / "nowhere")]) == 1
    assert "no activation store at" in capsys.readouterr().err
    assert main(["store"]) == 2
    for wrong, said in (
        (["inf", "x"], "no 'inf' (did you mean 'info'?)"),
        (["merge", "x", "y"], "`fac store merge x y` has too few or too many words"),
        (["info", "--all"], "`fac store info --all` has too few or too many words"),
    ):
        assert main(["store", *wrong]) == 1
        shown = capsys.readouterr().err
        assert said in shown and "fac store merge INTO PATH PATH" in shown
