"""Every content token of the corpus once, with its own residual; interrupted anywhere, the same bytes."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fac_jax.activations import harvest as module
from fac_jax.activations.harvest import describe, harvest, harvest_documents, writer_name
from fac_jax.activations.store import SPLITS, StoreReader, complete_store, create_store, read_manifest
from fac_jax.config import BackboneConfig, Config, DataSet, HarvestConfig, RunConfig, Source
from fac_jax.errors import UserError
from fac_jax.mesh import DATA, sharding
from fac_jax.packing import encode
from fac_jax.text import document_hash, read_documents
from tests.activations.tiny_store import contents

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

    def residual_fn(self, layer: int) -> Any:
        def compute(tokens: Any, segments: Any, positions: Any) -> Any:
            if self.batches == self.stop_at and self.stop_with is not None:
                raise self.stop_with
            self.batches += 1
            made = residual(tokens, positions)
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


def stored(out: Path) -> dict[str, set[tuple[int, int, int]]]:
    """The same from the store; every row's residual is checked to be the one of its token and position."""
    found: dict[str, set[tuple[int, int, int]]] = {}
    for split in SPLITS:
        reader = StoreReader(out, split)
        rows = reader.read_blocks(range(len(reader.block_rows)))
        np.testing.assert_array_equal(rows.resid.astype(np.float32), residual(rows.token, rows.position))
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
    assert summary["dropped_template"] == summary["real_tokens"] - summary["rows"]
    assert summary["dropped_padding"] == summary["computed_tokens"] - summary["real_tokens"]
    assert summary["packing_efficiency"] == summary["real_tokens"] / summary["computed_tokens"] > 0.9
    assert summary["bytes"] == sum(f.stat().st_size for f in (tmp_path / "out").rglob("*") if f.is_file())
    json.dumps(summary, allow_nan=False)
    manifest = read_manifest(tmp_path / "out")
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
    own_to_a_call = ("seconds", "tokens_per_second")
    assert all(resumed[name] == value for name, value in summary.items() if name not in own_to_a_call)


def test_what_is_done_is_not_done_again(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, config, tmp_path / "out", FakeBackbone())
    before, again = contents(tmp_path / "out"), FakeBackbone()
    assert run(monkeypatch, config, tmp_path / "out", again)["tokens_per_second"] == 0
    assert again.batches == 0 and contents(tmp_path / "out") == before


def test_the_next_batch_begins_before_this_one_is_fetched(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []
    store, begin = module._store, module._residual

    def begun(loaded: Any, batch: Any, layer: int) -> Any:
        events.append(("begun", batch.first))
        return begin(loaded, batch, layer)

    def fetched(writer: Any, fraction: float, batch: Any, *rest: Any) -> None:
        events.append(("fetched", batch.first))
        store(writer, fraction, batch, *rest)

    monkeypatch.setattr(module, "_residual", begun)
    monkeypatch.setattr(module, "_store", fetched)
    run(monkeypatch, config, tmp_path / "out", FakeBackbone())
    firsts = [first for name, first in events if name == "begun"]
    assert len(firsts) > 10
    for here, following in zip(firsts, firsts[1:], strict=False):
        assert events.index(("begun", following)) < events.index(("fetched", here))


def test_processes_share_the_corpus(config: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(config, harvest=dataclasses.replace(config.harvest, tokens=None))
    loaded: Any = FakeBackbone()
    manifest = describe(config, loaded, writers=3)
    create_store(tmp_path / "out", manifest)
    for index in (2, 0, 1):
        assert harvest_documents(config, loaded, manifest, tmp_path / "out", index) > 0
    totals = complete_store(tmp_path / "out", [writer_name(index) for index in range(3)])
    assert totals.counts["documents"] == 300
    assert stored(tmp_path / "out") == expected(config)


def test_a_store_of_another_layer_is_left_alone(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, config, tmp_path / "out", FakeBackbone())
    deeper = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, layer=4))
    with pytest.raises(UserError, match="holds layer 3, config asks 4: harvest into another run.dir, or delete"):
        run(monkeypatch, deeper, tmp_path / "out", FakeBackbone())


def with_text(config: Config, path: Path, text: str, **changes: Any) -> Config:
    path.write_text(text)
    dataset = DataSet(sources=(Source(path=str(path)),), max_tokens=24, **changes)
    return dataclasses.replace(config, data={"corpus": dataset})


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
