"""Every content token of the corpus once, with its own residual; interrupted anywhere, the same bytes."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fac_jax import distributed
from fac_jax.activations import harvest as module
from fac_jax.activations import writer
from fac_jax.activations.arrays import open_root, read_json, write_json
from fac_jax.activations.harvest import describe, harvest, harvest_documents
from fac_jax.activations.manifest import SPLITS, Manifest
from fac_jax.activations.reader import StoreReader
from fac_jax.activations.store import (
    complete_store,
    create_store,
    find_store,
    layer_path,
    read_manifest,
    read_quarantine,
    store_of,
    writer_name,
)
from fac_jax.activations.upkeep import verify
from fac_jax.config.activations import BackboneConfig, HarvestConfig
from fac_jax.config.data import DataSet, Source
from fac_jax.config.file import Config
from fac_jax.config.machine import RunConfig
from fac_jax.errors import UserError
from fac_jax.mesh import DATA, sharding
from fac_jax.packing import encode
from fac_jax.text import document_hash, read_documents
from tests.activations.tiny_store import contents
from tests.refused import ALTERNATE, with_refused

WIDTH, WORDS = 8, 50
TEMPLATE = "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s>{% endfor %}"


def residual(tokens: Any, positions: Any) -> Any:
    """Stands for the backbone: a row that tells token and position, exact in bfloat16."""
    return np.stack([tokens, positions] + [(tokens * i + positions) % 64 for i in range(2, WIDTH)], -1).astype(
        np.float32
    )


class FakeBackbone:
    """What harvest uses of `Loaded`; raises `stop_with` instead of computing batch number `stop_at`."""

    def __init__(self, mesh: Mesh | None = None, stop_at: int | None = None, stop_with: BaseException | None = None):
        vocabulary = {"<s>": 0, "</s>": 1, "user": 2, **{f"w{i}": i + 3 for i in range(WORDS)}}
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
        self.tokenizer.chat_template = TEMPLATE
        self.config = SimpleNamespace(d_model=WIDTH)
        self.digest, self.tokenizer_digest, self.dtype = "0123", "4567", "float32"
        self.mesh, self.stop_at, self.stop_with, self.batches = mesh, stop_at, stop_with, 0

    def residuals_fn(self, layers: tuple[int, ...], dtype: str) -> Any:
        def compute(tokens: Any, segments: Any, positions: Any) -> Any:
            if self.batches == self.stop_at and self.stop_with is not None:
                raise self.stop_with
            self.batches += 1
            made = tuple((residual(tokens, positions) * 2.0 ** (layer - 3)).astype(dtype) for layer in layers)
            return jax.device_put(made, None if self.mesh is None else sharding(self.mesh, DATA, None, None))

        return compute


@pytest.fixture
def config(tmp_path: Path) -> Config:
    generator = np.random.default_rng(0)
    texts = [" ".join(f"w{w}" for w in generator.integers(0, WORDS, generator.integers(2, 30))) for _ in range(300)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Config(
        run=RunConfig(seed=1),
        backbone=BackboneConfig(model="fake", layer=3, rows_per_batch=4, row_tokens=64),
        data={"corpus": DataSet(sources=(Source(path=str(tmp_path / "corpus.jsonl")),), max_tokens=24)},
        harvest=HarvestConfig(shard_rows=500, validation_fraction=0.2),
    )


def run(monkeypatch: pytest.MonkeyPatch, config: Config, out: Path, backbone: FakeBackbone) -> dict[str, Any]:
    monkeypatch.setattr(module, "load_backbone", lambda *arguments: backbone)
    out.mkdir(exist_ok=True)
    return harvest(config, out, {})


def expected(config: Config) -> dict[str, set[tuple[int, int, int]]]:
    """(document, position, token) of every content token by split, from the documents one by one."""
    found: dict[str, set[tuple[int, int, int]]] = {split: set() for split in SPLITS}
    dataset = config.dataset("corpus")
    for document in read_documents(dataset, "corpus"):
        item = encode(document, FakeBackbone().tokenizer, dataset.max_tokens)
        split = "validation" if document_hash(document.id, "validation") < 0.2 else "train"
        found[split] |= {(int(document.id, 16), int(p), int(item.ids[p])) for p in np.flatnonzero(item.content)}
    return found


def stored(out: Path, layer: int = 3) -> dict[str, set[tuple[int, int, int]]]:
    """The same from the store; every row's residual is checked to be the one of its token and position."""
    found: dict[str, set[tuple[int, int, int]]] = {}
    for split in SPLITS:
        reader = StoreReader(layer_path(out, layer), split)
        rows = reader.read_blocks(range(len(reader.block_rows)))
        np.testing.assert_array_equal(
            rows.resid.astype(np.float32), residual(rows.token, rows.position) * 2.0 ** (layer - 3)
        )
        origin = list(zip(rows.doc.tolist(), rows.position.tolist(), rows.token.tolist(), strict=True))
        found[split] = set(origin)
        assert len(found[split]) == len(origin)
    return found


def test_every_content_token_once(config: Config, tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = run(monkeypatch, config, tmp_path / "out", FakeBackbone(mesh))
    wanted = expected(config)
    assert stored(tmp_path / "out") == wanted
    assert summary["train_rows"] == len(wanted["train"]) and summary["validation_rows"] == len(wanted["validation"])
    assert summary["rows"] == summary["content_tokens"] == len(wanted["train"]) + len(wanted["validation"])
    assert summary["documents"] == 300 and summary["documents_at_max_tokens"] > 20 and summary["malformed_rows"] == 0
    # <s> user ... </s>: two special tokens and one of the template a document, where it was not cut before the end
    documents = [
        encode(document, FakeBackbone().tokenizer, 24) for document in read_documents(config.data["corpus"], "")
    ]
    assert summary["dropped_special"] == sum(int(np.isin(item.ids, (0, 1)).sum()) for item in documents) > 300
    assert summary["dropped_template"] == sum(int((item.ids == 2).sum()) for item in documents) == 300
    dropped = sum(summary[f"dropped_{reason}"] for reason in ("special", "template", "other_turns", "outliers"))
    assert dropped == summary["real_tokens"] - summary["rows"]
    assert summary["dropped_padding"] == summary["computed_tokens"] - summary["real_tokens"]
    assert summary["packing_efficiency"] == summary["real_tokens"] / summary["computed_tokens"] > 0.9
    assert summary["bytes"] == sum(f.stat().st_size for f in (tmp_path / "out/layer-03").rglob("*") if f.is_file())
    json.dumps(summary, allow_nan=False)
    manifest = read_manifest(tmp_path / "out/layer-03")
    assert (manifest.layer, manifest.d_model, manifest.model_digest) == (3, WIDTH, "0123")


@pytest.mark.parametrize(("tokens", "stops"), [(None, (1, 5, 3, 6)), (1500, (1, 4, 3))])
def test_interrupted_anywhere_it_ends_with_the_same_bytes(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int | None, stops: tuple[int, ...]
) -> None:
    config = dataclasses.replace(config, harvest=dataclasses.replace(config.harvest, tokens=tokens))
    backbone = FakeBackbone()
    summary = run(monkeypatch, config, tmp_path / "whole", backbone)
    if tokens is not None:
        assert tokens <= summary["rows"] < tokens + 4 * 64
    for stop_at in stops:  # batches that the run computes before it is interrupted
        with pytest.raises(KeyboardInterrupt):
            run(monkeypatch, config, tmp_path / "cut", FakeBackbone(stop_at=stop_at, stop_with=KeyboardInterrupt()))
    last = FakeBackbone()
    resumed = run(monkeypatch, config, tmp_path / "cut", last)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert last.batches < backbone.batches
    own_to_a_call = ("seconds", "tokens_per_second", "store_wait")
    assert all(resumed[name] == value for name, value in summary.items() if name not in own_to_a_call)


def test_what_is_done_is_not_done_again(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, config, tmp_path / "out", FakeBackbone())
    before, again = contents(tmp_path / "out"), FakeBackbone()
    assert run(monkeypatch, config, tmp_path / "out", again)["tokens_per_second"] == 0
    assert again.batches == 0 and contents(tmp_path / "out") == before


def test_how_many_shards_are_written_at_once_changes_no_byte(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, config, tmp_path / "one", FakeBackbone())
    several = dataclasses.replace(config, harvest=dataclasses.replace(config.harvest, shards_at_once=3))
    run(monkeypatch, several, tmp_path / "three", FakeBackbone())
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_a_harvest_that_waits_for_its_store_says_so(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(monkeypatch, config, tmp_path / "fast", FakeBackbone())["store_wait"] < 1
    caplog.clear()
    write = writer.write_arrays

    def slowly(*arguments: Any) -> None:
        time.sleep(0.3)
        write(*arguments)

    monkeypatch.setattr(writer, "write_arrays", slowly)
    monkeypatch.setattr(module, "LONG_WAIT_S", 0.1)
    assert run(monkeypatch, config, tmp_path / "slow", FakeBackbone())["store_wait"] > 0.1
    assert re.search(r"\d\d% of the harvest's time .* --harvest.shards_at_once writes more", caplog.text)


def test_the_next_batch_begins_before_this_one_is_fetched(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    store, backbone = module._store, FakeBackbone()

    def fetched(*arguments: Any) -> None:
        events.append(f"fetched with {backbone.batches} begun")
        store(*arguments)

    monkeypatch.setattr(module, "_store", fetched)
    run(monkeypatch, config, tmp_path / "out", backbone)
    assert backbone.batches > 10
    expected = [f"fetched with {min(number + 2, backbone.batches)} begun" for number in range(backbone.batches)]
    assert events == expected


def test_every_batch_and_every_document_is_a_sign_of_life(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Recorder:
        beats: ClassVar[list[tuple[str, float | None]]] = []

        def beat(self, doing: str, limit_s: float | None) -> None:
            self.beats.append((doing, limit_s))

    monkeypatch.setattr(distributed.Process, "watchdog", Recorder())
    backbone = FakeBackbone()
    run(monkeypatch, config, tmp_path / "out", backbone)
    *before, last = Recorder.beats
    assert [doing for doing, _ in before].count("a harvested batch") == backbone.batches > 10
    assert [doing for doing, _ in before].count("a document") >= 300
    assert {limit_s for _, limit_s in before} == {module.BATCH_S} and last[1] == math.inf, "others may have more"


def test_processes_share_the_corpus(config: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(config, harvest=dataclasses.replace(config.harvest, tokens=None))
    loaded: Any = FakeBackbone()
    manifest, path = describe(config, loaded, 3, writers=3), layer_path(tmp_path / "out", 3)
    create_store(path, manifest)
    for index in (2, 0, 1):
        assert harvest_documents(config, loaded, {path: manifest}, index).tokens > 0
    totals = complete_store(path, [writer_name(index) for index in range(3)])
    assert totals.counts["documents"] == 300
    assert stored(tmp_path / "out") == expected(config)


def test_a_store_of_something_else_is_left_alone(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, config, tmp_path / "out", FakeBackbone())
    other = harvesting(config, norm_filter=10.0)
    with pytest.raises(
        UserError,
        match="holds .*norm_filter 0.0, config asks .*harvest into another run.dir or harvest.store, or delete",
    ):
        run(monkeypatch, other, tmp_path / "out", FakeBackbone())


def test_several_layers_from_one_pass(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several, backbone = harvesting(config, layers=(6, 1)), FakeBackbone()
    summary = run(monkeypatch, several, tmp_path / "out", backbone)
    assert summary["layers"] == "1 3 6"
    for layer in (1, 3, 6):
        assert stored(tmp_path / "out", layer) == expected(config)
        found = find_store(tmp_path / "out", layer)
        assert read_manifest(found).layer == layer and found == str(tmp_path / f"out/layer-{layer:02d}")
    with pytest.raises(UserError, match="holds layers 1, 3, 6, config asks 4: set harvest.layers"):
        find_store(tmp_path / "out", 4)
    single = FakeBackbone()
    run(monkeypatch, config, tmp_path / "single", single)
    assert single.batches == backbone.batches
    assert contents(tmp_path / "single/layer-03") == contents(tmp_path / "out/layer-03")


def test_a_layer_is_added_to_a_store(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several = harvesting(config, layers=(6,))
    run(monkeypatch, several, tmp_path / "together", FakeBackbone())
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, several, tmp_path / "out", FakeBackbone(stop_at=5, stop_with=KeyboardInterrupt()))
    shutil.rmtree(tmp_path / "out/layer-06")  # layer 3 is ahead of layer 6 now
    run(monkeypatch, several, tmp_path / "out", FakeBackbone())
    assert contents(tmp_path / "out") == contents(tmp_path / "together")


def test_rows_of_an_outlying_norm_are_left_out_and_counted(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(monkeypatch, config, tmp_path / "plain", FakeBackbone())
    summary = run(monkeypatch, harvesting(config, norm_filter=1.2), tmp_path / "out", FakeBackbone())
    wanted, dropped = 0, 0
    for number in range(100):  # shard by shard of the unfiltered store: each has its own median
        parts = [
            np.linalg.norm(residual(rows.token, rows.position).astype(np.float64), axis=1)
            for split in SPLITS
            if (rows := shard_rows(tmp_path / "plain/layer-03", number, split)) is not None
        ]
        if parts:
            norms = np.concatenate(parts)
            dropped += int((norms > 1.2 * np.median(norms)).sum())
            wanted += int((norms <= 1.2 * np.median(norms)).sum())
    assert summary["dropped_outliers"] == dropped > 10 and summary["rows"] == wanted == plain["rows"] - dropped
    assert plain["dropped_outliers"] == 0 and summary["content_tokens"] == plain["content_tokens"]


def shard_rows(path: Path, number: int, split: Any) -> Any:
    """The rows of one part of one shard."""
    reader = StoreReader(path, split)
    chosen = [i for i, (name, _) in enumerate(reader._parts) if f"/{number:06d}/" in name]
    return reader.read_blocks(np.flatnonzero(np.isin(reader._shard_of, chosen))) if chosen else None


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_other_storage_types(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Literal["float16", "int8"]
) -> None:
    summary = run(monkeypatch, harvesting(config, dtype=dtype), tmp_path / "out", FakeBackbone())
    reader = StoreReader(tmp_path / "out/layer-03")
    rows = reader.read_blocks(range(len(reader.block_rows)))
    exact = residual(rows.token, rows.position)
    error = np.square(rows.resid.astype(np.float64) - exact).sum(1).mean()
    variance = np.square(exact - exact.mean(0)).sum(1).mean()
    if dtype == "float16":
        assert rows.resid.dtype == np.float16 and error == 0 and "rounding_fvu" not in summary
    else:
        assert np.abs(rows.resid.astype(np.float32) - exact).max() <= exact.max() / 127 / 2 + exact.max() * 2**-9
        # the reader's bfloat16 adds its own rounding to that of int8
        assert 0.5 * error / variance < summary["rounding_fvu"] <= error / variance < 1e-3


def test_the_rows_may_lie_elsewhere(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = (tmp_path / "elsewhere").as_uri()
    summary = run(monkeypatch, harvesting(config, store=url), tmp_path / "out", FakeBackbone())
    assert stored(tmp_path / "elsewhere") == expected(config) and summary["bytes"] > 0
    assert json.loads((tmp_path / "out/store.json").read_text()) == {"store": url, "layers": [3]}
    assert store_of(harvesting(config, store=url), {"activations": tmp_path / "out"}) == layer_path(url, 3)


def harvesting(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, harvest=dataclasses.replace(config.harvest, **changes))


def with_text(config: Config, path: Path, text: str, **changes: Any) -> Config:
    path.write_text(text)
    dataset = DataSet(sources=(Source(path=str(path)),), max_tokens=24, **changes)
    return dataclasses.replace(config, data={"corpus": dataset})


def test_a_store_of_the_same_settings_and_another_corpus_is_left_alone(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, config, tmp_path / "out", FakeBackbone())
    before = contents(tmp_path / "out")
    path = Path(config.data["corpus"].sources[0].path)
    path.write_text(path.read_text().replace("w1", "w2"))
    with pytest.raises(UserError, match=r"holds files_digest \w+, config asks \w+: harvest into another"):
        run(monkeypatch, config, tmp_path / "out", FakeBackbone())
    assert contents(tmp_path / "out") == before
    # A store from before the files were noted is gone on with.
    root = open_root(layer_path(tmp_path / "out", 3))
    there = read_json(root, "manifest.json", Manifest)
    assert there is not None
    write_json(root, "manifest.json", dataclasses.replace(there, files_digest=""))
    assert run(monkeypatch, config, tmp_path / "out", FakeBackbone())["tokens_per_second"] == 0


def test_what_is_quarantined_stays_so_until_it_is_made_anew(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = harvesting(config, shard_rows=2000), tmp_path / "out"  # of more than one block
    run(monkeypatch, config, out, FakeBackbone())
    whole, store = contents(out), layer_path(out, 3)
    damaged = Path(store) / "arrays/p0000/000001/train/resid/c/0/0"
    content = bytearray(damaged.read_bytes())
    content[1000] ^= 1  # in the first block; the last one would be seen without `fac store verify`
    damaged.write_bytes(content)
    assert len(verify(store)) == 1
    run(monkeypatch, config, out, FakeBackbone())  # all of it is there
    assert read_quarantine(open_root(store)) and StoreReader(store, "train", "skip").left_out > 0
    (Path(store) / "records/p0000/000001.json").unlink()
    run(monkeypatch, config, out, FakeBackbone())
    assert contents(out) == whole and StoreReader(store).left_out == 0


def test_an_empty_corpus(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = with_text(config, tmp_path / "empty.jsonl", "")
    with pytest.raises(UserError, match="data.corpus has no documents"):
        run(monkeypatch, empty, tmp_path / "out", FakeBackbone())


def test_a_corpus_too_small_to_hold_anything_out(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = with_text(config, tmp_path / "small.txt", "w1 w2 w3\n")
    with pytest.raises(UserError, match="1 documents gave 3 training and 0 validation rows: give it more documents"):
        run(monkeypatch, small, tmp_path / "out", FakeBackbone())


def test_a_corpus_smaller_than_asked_is_said(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    greedy = dataclasses.replace(config, harvest=dataclasses.replace(config.harvest, tokens=10**6))
    with caplog.at_level(logging.WARNING):
        rows = run(monkeypatch, greedy, tmp_path / "out", FakeBackbone())["rows"]
    assert f"data.corpus has only {rows} content tokens, harvest.tokens asks 1000000" in caplog.text


def test_malformed_rows_are_counted(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = (tmp_path / "corpus.jsonl").read_text()
    broken = with_text(config, tmp_path / "broken.jsonl", good + "{oh\n[]\n", on_bad_row="skip")
    assert run(monkeypatch, broken, tmp_path / "out", FakeBackbone())["malformed_rows"] == 2


def test_what_the_chat_template_refuses_is_a_malformed_row(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is that of the other rows, in an interrupted harvest and in one of several processes too."""
    text, refused = with_refused((tmp_path / "corpus.jsonl").read_text())
    mixed = with_text(config, tmp_path / "mixed.jsonl", text, on_bad_row="skip")
    monkeypatch.setitem(globals(), "TEMPLATE", ALTERNATE + TEMPLATE)
    summary = run(monkeypatch, mixed, tmp_path / "whole", FakeBackbone())
    assert summary["malformed_rows"] == refused > 40 and summary["documents"] == 300
    assert stored(tmp_path / "whole") == expected(config)
    for stop_at in (1, 5, 3):
        with pytest.raises(KeyboardInterrupt):
            run(monkeypatch, mixed, tmp_path / "cut", FakeBackbone(stop_at=stop_at, stop_with=KeyboardInterrupt()))
    assert run(monkeypatch, mixed, tmp_path / "cut", FakeBackbone())["malformed_rows"] == refused
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    loaded: Any = FakeBackbone()
    manifest, path = describe(mixed, loaded, 3, writers=3), layer_path(tmp_path / "shared", 3)
    create_store(path, manifest)
    for index in range(3):
        harvest_documents(mixed, loaded, {path: manifest}, index)
    totals = complete_store(path, [writer_name(index) for index in range(3)])
    assert totals.counts["malformed_rows"] == refused and stored(tmp_path / "shared") == expected(config)
    with pytest.raises(UserError, match="mixed.jsonl:1: the chat template refuses turns of user, user"):
        run(monkeypatch, with_text(config, tmp_path / "mixed.jsonl", text), tmp_path / "stop", FakeBackbone())
