"""Live rows are those of a store, each once a pass; a batch depends on its step alone; killed, the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from jax.sharding import Mesh

from fac_jax.activations import harvest as harvest_module
from fac_jax.activations import live as module
from fac_jax.activations.harvest import harvest, held_out
from fac_jax.activations.live import LiveRows
from fac_jax.activations.positions import Dealer, Position
from fac_jax.activations.reader import StoreReader
from fac_jax.activations.rows import Rows
from fac_jax.activations.store import find_store
from fac_jax.config.activations import BackboneConfig, HarvestConfig
from fac_jax.config.data import DataSet, Source
from fac_jax.config.file import Config
from fac_jax.config.machine import MeshConfig, RunConfig
from fac_jax.config.sae import SaeConfig, SpliceConfig, SweepConfig, TrainConfig
from fac_jax.errors import UserError
from fac_jax.packing import encode
from fac_jax.plain import to_plain
from fac_jax.sae.checkpoint import read_card
from fac_jax.sae.splice import splice
from fac_jax.sae.train import sweep, train
from fac_jax.text import Turn, make_document, read_documents
from tests.activations.test_harvest import FakeBackbone
from tests.backbone.tiny_backbone import write_gguf
from tests.gang import command as fac
from tests.gang import environment, run_gang
from tests.refused import ALTERNATE, with_refused

BATCH, STREAMS = 24, 4
Origin = tuple[int, int, int]


def corpus(path: Path, documents: int = 300) -> dict[str, DataSet]:
    generator = np.random.default_rng(0)
    texts = [" ".join(f"w{w}" for w in generator.integers(0, 50, generator.integers(2, 30))) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"corpus": DataSet(sources=(Source(path=str(path)),), max_tokens=24)}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """About 3,600 training rows, buffers of 15 batches."""
    return Config(
        run=RunConfig(seed=1),
        backbone=BackboneConfig(model="fake", layer=3, rows_per_batch=4, row_tokens=64),
        data=corpus(tmp_path / "corpus.jsonl"),
        harvest=HarvestConfig(shard_rows=500, validation_fraction=0.2),
        train=TrainConfig(
            activations="live", live_buffer_rows=15 * BATCH + 5, batch_rows=BATCH, streams=STREAMS, steps=405
        ),
    )


@pytest.fixture
def backbone(monkeypatch: pytest.MonkeyPatch) -> FakeBackbone:
    fake = FakeBackbone()
    for one in (module, harvest_module):
        monkeypatch.setattr(one, "load_backbone", lambda *arguments: fake)
    return fake


def origins(rows: Rows) -> list[Origin]:
    return list(zip(rows.doc.tolist(), rows.position.tolist(), rows.token.tolist(), strict=True))


def same(a: Rows, b: Rows) -> bool:
    return all(
        getattr(a, name).tobytes() == getattr(b, name).tobytes() for name in ("resid", "doc", "position", "token")
    )


def training_tokens(config: Config) -> list[list[Origin]]:
    """(document, position, token) of the training documents' content tokens, by stream, from the documents alone."""
    dataset, found = config.dataset("corpus"), [list[Origin]() for _ in range(STREAMS)]
    kept = [document for document in read_documents(dataset, "corpus") if not held_out(document.id, 0.2)]
    for ordinal, document in enumerate(kept):
        place = np.random.default_rng(ordinal // STREAMS).permutation(STREAMS)[ordinal % STREAMS]
        item = encode(document, FakeBackbone().tokenizer, dataset.max_tokens)
        places = np.flatnonzero(item.content)
        found[place] += [(int(document.id, 16), int(p), int(item.ids[p])) for p in places]
    return found


def test_a_pass_holds_every_training_token_once(config: Config, tmp_path: Path, backbone: FakeBackbone) -> None:
    """Each pass of each stream; and the residuals are those of a harvested store."""
    harvest(replace(config, train=TrainConfig()), tmp_path / "activations", {})
    reader = StoreReader(find_store(tmp_path / "activations", 3), "train")
    rows = reader.read_blocks(range(len(reader.block_rows)))
    stored = {origin: row.tobytes() for origin, row in zip(origins(rows), rows.resid, strict=True)}
    with closing(LiveRows(config, tmp_path)) as live:
        windows = [{i: rows for i, (rows, _) in live._windows(number).items()} for number in range(25)]
        drawn = [live.batch(step) for step in range(15 * 25)]
    streams = {i: [o for window in windows for o in origins(window[i])] for i in range(STREAMS)}
    wanted = training_tokens(config)
    assert {o for stream in wanted for o in stream} == set(stored)
    for index, stream in enumerate(wanted):
        length = len(stream)
        assert len(streams[index]) > 2 * length
        for start in (0, length):
            assert sorted(streams[index][start : start + length]) == sorted(stream)
    from_windows = sorted(o for stream in streams.values() for o in stream)
    assert sorted(o for batch in drawn for o in origins(batch)) == from_windows
    for batch in drawn:
        assert [row.tobytes() for row in batch.resid] == [stored[o] for o in origins(batch)]
    assert live.whole_epochs() == 2


def test_streams_keep_pace_where_long_and_short_documents_alternate() -> None:
    """Dealt in turn, 9,200 documents of the stream of short ones' rival waited after 50 of these windows."""
    lengths = [make_document((Turn("user", f"{i}"),), None, "") for i in range(2000)]
    dealer = Dealer(lambda: lengths, 2, {0: Position(), 1: Position()})

    def rows(index: int) -> Iterator[int]:
        while True:
            for document in dealer.documents(index):
                yield 20 if int(document.turns[0].content) % 2 else 200

    streams, most = (rows(0), rows(1)), 0
    for _ in range(200):
        for stream in streams:
            got = 0
            while got < 4096:
                got += next(stream)
        most = max(most, *(len(waiting) for waiting in dealer._waiting.values()))
    assert most < 500


def test_a_batch_is_an_equal_share_of_every_stream(config: Config, tmp_path: Path, backbone: FakeBackbone) -> None:
    owner = {o[0]: index for index, stream in enumerate(training_tokens(config)) for o in stream}
    with closing(LiveRows(config, tmp_path)) as live:
        for step in (0, 14, 15):
            found = [owner[doc] for doc in live.batch(step).doc.tolist()]
            assert found == sorted(found) and [found.count(i) for i in range(STREAMS)] == [BATCH // STREAMS] * STREAMS


def test_a_batch_is_a_pure_function_of_its_step(config: Config, tmp_path: Path, backbone: FakeBackbone) -> None:
    """Forwards, backwards, and in a folder that knows nothing of what was computed before."""
    with closing(LiveRows(config, tmp_path / "a")) as live:
        in_order = [live.batch(step) for step in range(60)]
    with closing(LiveRows(config, tmp_path / "b")) as live:
        for step in (59, 0, 17, 16, 15, 14, 38):
            assert same(live.batch(step), in_order[step])
    with closing(LiveRows(replace(config, run=RunConfig(seed=2)), tmp_path / "c")) as live:
        assert not same(live.batch(0), in_order[0])
        assert live.statistics.mean == read_statistics_of(tmp_path / "a")  # of rows, not of their order


def test_rows_are_those_of_what_the_chat_template_takes(config: Config, tmp_path: Path, backbone: FakeBackbone) -> None:
    with closing(LiveRows(config, tmp_path / "a")) as live:
        expected = [live.batch(step) for step in range(60)]
    (tmp_path / "mixed.jsonl").write_text(with_refused((tmp_path / "corpus.jsonl").read_text())[0])
    mixed = DataSet(sources=(Source(path=str(tmp_path / "mixed.jsonl")),), max_tokens=24, on_bad_row="skip")
    backbone.tokenizer.chat_template = ALTERNATE + str(backbone.tokenizer.chat_template)
    with closing(LiveRows(replace(config, data={"corpus": mixed}), tmp_path / "b")) as live:
        assert all(same(live.batch(step), rows) for step, rows in enumerate(expected))


def read_statistics_of(folder: Path) -> tuple[float, ...]:
    return module.read_statistics(folder).mean


@pytest.mark.parametrize("hosts", [1, 2, 4, 3])
def test_hosts_compute_their_rows_of_the_same_batch(
    hosts: int, config: Config, tmp_path: Path, backbone: FakeBackbone
) -> None:
    with closing(LiveRows(config, tmp_path / "alone")) as live:
        whole = {step: live.batch(step) for step in range(90)}
    alone = backbone.batches
    statistics = (tmp_path / "alone/live.json").read_bytes()
    for host in range(hosts):
        spans = [(host * BATCH // hosts, (host + 1) * BATCH // hosts)]
        before = backbone.batches
        with closing(LiveRows(config, tmp_path / "several", spans)) as live:
            for step, rows in whole.items():
                assert same(live.batch(step), rows.span(*spans[0]))
        if hosts in (2, 4):
            assert backbone.batches - before < 0.8 * alone
    assert (tmp_path / "several/live.json").read_bytes() == statistics


@pytest.mark.parametrize("left", ["whole", "cut", "shorter", "none", "one stream less", "another process's"])
def test_it_resumes_from_what_is_noted(left: str, config: Config, tmp_path: Path, backbone: FakeBackbone) -> None:
    """What is not noted is found without computing a row."""
    with closing(LiveRows(config, tmp_path)) as live:
        wanted = [live.batch(step) for step in range(300, 330)]
        before = [live.batch(step) for step in range(30)]
    file = tmp_path / "positions/p0000.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) > 20 * STREAMS
    if left == "cut":
        file.write_bytes(b"".join(lines[:9]) + lines[9][:7])
    elif left == "shorter":
        file.write_bytes(b"".join(lines[:50]))
    elif left == "none":
        file.unlink()
    elif left == "one stream less":
        file.write_bytes(b"".join(line for line in lines if json.loads(line)["stream"] != 2))
    elif left == "another process's":
        file.rename(file.with_name("p0003.jsonl"))
    backbone.batches = 0
    with closing(LiveRows(config, tmp_path)) as live:
        assert all(same(live.batch(300 + i), rows) for i, rows in enumerate(wanted))
        computed = backbone.batches
        assert all(same(live.batch(i), rows) for i, rows in enumerate(before))
    assert computed < 70, "rows that were not asked for were computed"
    if left in ("cut", "shorter", "none"):
        found = file.read_bytes().splitlines(keepends=True)
        assert found[: len(lines)] == lines[: len(found)]


def test_damaged_positions(config: Config, tmp_path: Path, backbone: FakeBackbone) -> None:
    LiveRows(config, tmp_path).close()
    (tmp_path / "positions/p0000.jsonl").write_text("{oh\n")
    with pytest.raises(UserError, match=r"p0000.jsonl is damaged \(.*delete it, its positions will be found anew"):
        LiveRows(config, tmp_path)
    old = {"stream": 0, "window": 1, "begins": {"epoch": 0, "document": 3, "skip": 1}}  # dealt in turn
    (tmp_path / "positions/p0000.jsonl").write_text(json.dumps(old) + "\n")
    with pytest.raises(UserError, match="of a version of fac_jax that dealt documents to streams in another way"):
        LiveRows(config, tmp_path)


def test_the_next_window_is_computed_meanwhile(config: Config, tmp_path: Path, backbone: FakeBackbone) -> None:
    with closing(LiveRows(config, tmp_path)) as live:
        live.batch(0)
        live._ready[1].result(timeout=20)
        assert set(live._ready) == {0, 1}
        live.batch(15)
        assert set(live._ready) == {1, 2}
    with closing(LiveRows(replace(config, train=replace(config.train, steps=16)), tmp_path / "short")) as live:
        live.batch(7)
        assert set(live._ready) == {0, 1} and live.window_rows == 8 * live.share
        live.batch(8)
        assert set(live._ready) == {1}, "rows that no step needs were begun"


def test_an_error_surfaces_and_no_thread_is_left(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeBackbone(stop_at=40, stop_with=UserError("the backbone is out of memory"))
    monkeypatch.setattr(module, "load_backbone", lambda *arguments: fake)
    with pytest.raises(UserError, match="the backbone is out of memory"), closing(LiveRows(config, tmp_path)) as live:
        for step in range(400):
            live.batch(step)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("live")]


def test_settings_that_do_not_fit(config: Config, tmp_path: Path, backbone: FakeBackbone) -> None:
    with pytest.raises(UserError, match=r"train.live_buffer_rows 23 holds less than train.batch_rows 24"):
        replace(config.train, live_buffer_rows=23)
    with pytest.raises(UserError, match="live reads no store, but train.store is there"):
        replace(config.train, store="there")
    with pytest.raises(UserError, match=r"harvest.norm_filter 10 filters the rows of a store.*train.norm_filter"):
        LiveRows(replace(config, harvest=replace(config.harvest, norm_filter=10)), tmp_path)
    few = replace(config, data=corpus(tmp_path / "few.jsonl", 3))
    with pytest.raises(UserError, match=r"part \d of 4 of its training documents has no content token.*train.streams"):
        LiveRows(replace(few, harvest=replace(config.harvest, validation_fraction=0.4)), tmp_path / "few")
    with pytest.raises(UserError, match="no content token in held-out documents.*validation_fraction"):
        LiveRows(replace(few, harvest=replace(config.harvest, validation_fraction=1e-9)), tmp_path / "none")


def test_a_run_of_another_model_is_not_gone_on_with(config: Config, tmp_path: Path, backbone: FakeBackbone) -> None:
    LiveRows(config, tmp_path).close()
    backbone.digest = "4321"
    with pytest.raises(UserError, match="is of model_digest 0123, the backbone has 4321: delete"):
        LiveRows(config, tmp_path)


def variance_of_a_document_effect(live_buffer_rows: int, batch_rows: int, windows: int) -> float:
    """Variance of the batch mean of an effect that each document has, in units of what independent rows would give.

    Documents of 64 rows; the order of rows is that of `LiveRows`, whose rows are not computed.
    """
    streams, found = 8, []
    share, per_window = batch_rows // streams, live_buffer_rows // batch_rows
    effects = np.random.default_rng(1)
    for window in range(windows):
        documents = effects.standard_normal((streams, per_window * share // 64))
        orders = [np.random.default_rng([0, window, i]).permutation(per_window * share) // 64 for i in range(streams)]
        drawn = np.stack([documents[i][orders[i]] for i in range(streams)])
        found.append(drawn.reshape(streams, per_window, share).mean(axis=(0, 2)))
    return float(np.mean(np.square(np.concatenate(found))) * batch_rows)


def test_how_well_a_buffer_mixes() -> None:
    """Independent rows give 1; in a buffer of n rows, documents of m rows give 1 + (m - 1) batch / n."""
    for buffer, batch, windows in ((131_072, 256, 50), (131_072, 4_096, 300), (1_048_576, 4_096, 40)):
        found = variance_of_a_document_effect(buffer, batch, windows)
        print(f"variance of a per-document effect: {found:.2f} in batches of {batch} from a buffer of {buffer}")
        assert 0.8 < found / (1 + 63 * batch / buffer) < 1.2


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A tiny random Llama, on real files; of a folder's tokenizer every process would import torch first."""
    folder = tmp_path_factory.mktemp("real")
    write_gguf(folder / "model.gguf")
    return Config(
        run=RunConfig(dir=str(folder / "run")),
        mesh=MeshConfig(data=2, feature=4),
        backbone=BackboneConfig(model=str(folder / "model.gguf"), layer=2, rows_per_batch=4, row_tokens=64),
        data={"corpus": replace(corpus(folder / "corpus.jsonl")["corpus"], max_tokens=64)},
        sae=SaeConfig(features=64, k=4),
        harvest=HarvestConfig(validation_fraction=0.2),
        train=TrainConfig(
            activations="live", live_buffer_rows=256, batch_rows=64, streams=2, steps=24, k_start=8, anneal_steps=8,
            aux_k=8, log_every=3, checkpoint_every=4, select_dtype="float32", dead_after_rows=1000,
        ),
    )  # fmt: skip


def test_rows_of_a_real_backbone(real: Config, tmp_path: Path, mesh: Mesh) -> None:
    """Those of a store, but for the rounding that another place in a batch brings."""
    on = replace(real, mesh=MeshConfig(data=mesh.shape["data"], feature=mesh.shape["feature"]))
    harvest(replace(on, train=TrainConfig()), tmp_path / "activations", {})
    reader = StoreReader(find_store(tmp_path / "activations", 2), "train")
    rows = reader.read_blocks(range(len(reader.block_rows)))
    stored = dict(zip(origins(rows), rows.resid.astype(np.float32), strict=True))
    with closing(LiveRows(on, tmp_path)) as live:
        batch = live.batch(30)
        assert abs(live.statistics.median_norm / reader.median_norm - 1) < 0.05
    wanted = np.stack([stored[o] for o in origins(batch)])
    np.testing.assert_allclose(batch.resid.astype(np.float32), wanted, rtol=1e-2, atol=1e-2)


def test_train_and_sweep(real: Config, tmp_path: Path) -> None:
    """On eight devices; a member of a sweep is the very SAE that training makes alone."""
    summary = train(real, tmp_path / "sae", {})
    assert summary["rows"] == 24 * 64 and summary["activations"] == "live" and summary["live_buffer_rows"] == 256
    assert 0 < summary["fvu"] < 1 and summary["validation_rows"] > 200 and 0 <= summary["data_wait"] <= 1
    card = read_card(tmp_path / "sae")
    assert card.layer == 2 and card.model == real.backbone.model and card.model_digest
    figures = splice(replace(real, splice=SpliceConfig(documents=4, new_tokens=2)), tmp_path, {"sae": tmp_path / "sae"})
    assert figures["ce_mean"] > 0 and figures["ce_mean"] != figures["ce_zero"]
    swept = sweep(replace(real, sweep=SweepConfig(k=(4, 5))), tmp_path / "sweep", {})
    assert swept["saes"] == 2
    alone, among = (tmp_path / name / "sae.safetensors" for name in ("sae", "sweep/topk-64-k4-seed0"))
    assert alone.read_bytes() == among.read_bytes()


def command(config: Config, folder: Path, *more: str) -> list[str]:
    path = folder.parent / "config.yaml"
    path.write_text(yaml.safe_dump(to_plain(replace(config, mesh=MeshConfig()))))
    return ["train", str(path), "--run.dir", str(folder), *more]


def test_killed_it_ends_with_the_same_bytes(real: Config, tmp_path: Path) -> None:
    """kill -9 at a checkpoint; half of the positions are lost as well."""

    def run(folder: str, until: str | None = None) -> None:
        arguments = fac("none", *command(real, tmp_path / folder))
        with subprocess.Popen(arguments, env=environment(1), stderr=subprocess.PIPE, text=True) as process:
            while until is not None and not (tmp_path / folder / "sae/checkpoints" / until).exists():
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.01)
            if until is not None:
                process.send_signal(signal.SIGKILL)
            else:
                said = process.communicate()[1]
                assert process.returncode == 0, said

    run("whole")
    run("cut", until="12")
    file = tmp_path / "cut/sae/positions/p0000.jsonl"
    file.write_bytes(file.read_bytes()[:99])
    run("cut")
    names = ["sae.safetensors", "config.json", "metrics.jsonl", "validation.jsonl", "live.json"]
    names.append("positions/p0000.jsonl")
    for name in names:
        assert (tmp_path / "cut/sae" / name).read_bytes() == (tmp_path / "whole/sae" / name).read_bytes(), name


def test_two_processes_are_one(real: Config, tmp_path: Path) -> None:
    """Each computes the rows of its own devices."""
    for name, processes in (("one", 1), ("two", 2)):
        given = command(real, tmp_path / name, "--mesh.feature", "2")
        for ended in run_gang(tmp_path, *given, processes=processes, devices=4 // processes):
            assert ended.status == 0, ended.output
    found = []
    for name in ("one", "two"):
        lines = (tmp_path / name / "sae/metrics.jsonl").read_text().splitlines()
        found.append([list(json.loads(line).values()) for line in lines])
        assert len(list((tmp_path / name / "sae/positions").iterdir())) == (1 if name == "one" else 2)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)
