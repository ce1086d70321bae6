"""The scan stage on a toy backbone: its files against brute force, interrupted anywhere, and its errors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fac_jax.config.activations import BackboneConfig
from fac_jax.config.data import DataSet, Source
from fac_jax.config.features import ScanConfig
from fac_jax.config.file import Config
from fac_jax.errors import Unfinished, UserError
from fac_jax.packing import encode
from fac_jax.sae.checkpoint import LoadedSae, load_sae, save_sae
from fac_jax.sae.model import SAE
from fac_jax.scan import parts, scorer, stretch, units
from fac_jax.scan.merge import merge_scans
from fac_jax.scan.product import check_sae, load_scan
from fac_jax.scan.scan import kept_features, scan
from fac_jax.scan.scorer import peaks_of
from fac_jax.text import read_documents
from tests.refused import ALTERNATE, with_refused
from tests.word_tokenizer import word_tokenizer

WORDS = ["<pad>", "<user>", "red", "green", "blue", "cat", "dog", "sun", "moon", "sea"]
D, FEATURES, K = 6, 16, 3


@pytest.fixture(scope="module")
def backbone() -> Any:
    tokenizer = word_tokenizer(WORDS)
    table = np.random.default_rng(0).normal(size=(len(WORDS), 64, D)).astype(np.float32)
    return SimpleNamespace(
        tokenizer=tokenizer, table=table, digest="model-1", config=SimpleNamespace(d_model=D),
        residual_fn=lambda layer: lambda tokens, segments, positions: jnp.asarray(table[tokens, positions]),
    )  # fmt: skip


def sae_of(seed: int) -> LoadedSae:
    w = np.random.default_rng(seed).normal(size=(FEATURES, D)).astype(np.float32)
    sae = SAE(jnp.asarray(w), jnp.zeros(FEATURES), jnp.zeros(D))
    return LoadedSae(sae, FEATURES, K, D, f"sae-{seed}", 3, "toy", "model-1")


@pytest.fixture
def config(tmp_path: Path, backbone: Any, monkeypatch: pytest.MonkeyPatch) -> Config:
    def load_backbone(model: str, layers: int, dtype: str, mesh: Any) -> Any:
        return SimpleNamespace(mesh=mesh, **vars(backbone))

    monkeypatch.setattr(scorer, "load_backbone", load_backbone)
    monkeypatch.setattr(scorer, "load_sae", lambda folder, *expected: sae_of(int(folder.name.removeprefix("sae"))))
    monkeypatch.setattr(scorer, "own_mesh", lambda config, devices: _mesh())
    generator = np.random.default_rng(3)
    rows = [
        {"text": " ".join(generator.choice(WORDS[2:], generator.integers(1, 12))), "harm": int(i % 2)}
        for i in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSet(sources=(Source(path=str(tmp_path / "rows.jsonl"), label="harm"),), max_tokens=16)
    return Config(
        backbone=BackboneConfig(layer=3, rows_per_batch=2, row_tokens=16),
        data={"anchor": data, "seed": dataclasses.replace(data, sample=0.5)},
        scan=ScanConfig(top_spans=4, span_tokens=5),
    )


def _mesh() -> Any:
    from fac_jax.config.machine import MeshConfig
    from fac_jax.mesh import make_mesh

    return make_mesh(MeshConfig(data=1, feature=1))


def run(config: Config, out: Path, name: str = "anchor", sae: str = "sae1", **inputs: Path) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return scan(config, out, {"sae": Path(sae), **inputs}, name, config.scan.peaks)


def fingerprints(out: Path) -> dict[str, str]:
    return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in out.rglob("*") if f.is_file()}


def reference(config: Config, backbone: Any, acts: str = "topk") -> list[dict[int, tuple[float, int]]]:
    """Per document: feature -> (peak, position), by a loop over tokens."""
    w = np.asarray(sae_of(1).sae.w_fd[...])
    found = []
    for document in read_documents(config.data["anchor"], "anchor"):
        encoded = encode(document, backbone.tokenizer, 16)
        best: dict[int, tuple[float, int]] = {}
        for position in np.flatnonzero(encoded.content):
            pre = backbone.table[encoded.ids[position], position] @ w.T
            kept = np.argsort(-pre)[: K if acts == "topk" else FEATURES]
            for f in kept[pre[kept] > 0].tolist():
                if pre[f] > best.get(f, (0, 0))[0]:
                    best[f] = float(pre[f]), int(position)
        found.append(best)
    return found


@pytest.mark.parametrize("acts", ["topk", "relu"])
def test_files_hold_what_a_loop_finds(config: Config, tmp_path: Path, backbone: Any, acts: Any) -> None:
    config = dataclasses.replace(config, scan=dataclasses.replace(config.scan, acts=acts))
    counts = run(config, tmp_path / "out")
    expected = reference(config, backbone, acts)
    found = load_scan(tmp_path / "out")
    assert counts["documents"] == len(expected) == found.peaks_nf.shape[0]
    assert counts["peaks"] == sum(map(len, expected)) == found.peaks_nf.nnz
    documents = found.documents().to_pylist()
    means = found.mean_residuals()
    for row, best in enumerate(expected):
        content = np.flatnonzero(documents[row]["content"])
        tokens = np.array(documents[row]["token_ids"])[content]
        np.testing.assert_allclose(means[row], backbone.table[tokens, content].mean(0), atol=1e-6)
        span = slice(found.peaks_nf.indptr[row], found.peaks_nf.indptr[row + 1])
        assert found.peaks_nf.indices[span].tolist() == sorted(best)
        for at in range(span.start, span.stop):
            peak, position = best[int(found.peaks_nf.indices[at])]
            assert found.peaks_nf.data[at] == pytest.approx(peak, rel=1e-5)
            assert found.positions_m[at] == position
            assert found.token_ids_m[at] == documents[row]["token_ids"][position]
    for row in found.features().to_pylist():
        mine = sorted(-best[row["feature"]][0] for best in expected if row["feature"] in best)
        assert row["documents"] == len(mine) == sum(row["histogram"])
        assert row["tokens"] >= row["documents"] and [s["score"] for s in row["spans"]] == pytest.approx(
            [-p for p in mine[:4]]
        )
        assert row["max"] == pytest.approx(-mine[0] if mine else 0)


def test_spans_show_the_activating_token(config: Config, tmp_path: Path) -> None:
    run(config, tmp_path / "out")
    found = load_scan(tmp_path / "out")
    texts = {row["id"]: row for row in found.documents().to_pylist()}
    spans = [span for row in found.features().to_pylist() for span in row["spans"]]
    assert spans
    for span in spans:
        document = texts[span["document_id"]]
        assert span["token"].strip() == WORDS[document["token_ids"][span["position"]]]
        text = " ".join(f"{span['before']} {span['token']} {span['after']}".split())
        assert text in document["text"] and len(text.split()) == min(5, document["content_tokens"])
        assert "<user>" not in text


def test_documents_keep_their_identity(config: Config, tmp_path: Path) -> None:
    run(config, tmp_path / "out")
    documents = list(read_documents(config.data["anchor"], "anchor"))
    rows = load_scan(tmp_path / "out").documents().to_pylist()
    assert [row["id"] for row in rows] == [d.id for d in documents] and [row["index"] for row in rows] == list(
        range(len(rows))
    )
    assert [row["label"] for row in rows] == [d.label for d in documents]
    assert [row["text"] for row in rows] == [d.text for d in documents]
    assert rows[0]["turns"] == [{"role": "user", "content": documents[0].text}] and rows[0]["source"] == "rows.jsonl:1"


@pytest.mark.parametrize("peaks", ["all", "none"])
@pytest.mark.parametrize("dies_at", [0, 1, 4, 6])
@pytest.mark.parametrize("last", ["written", "not written"])
def test_killed_and_run_again_gives_the_same_bytes(
    config: Config, tmp_path: Path, peaks: str, dies_at: int, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, scan=dataclasses.replace(config.scan, peaks=peaks))
    monkeypatch.setattr(stretch, "COMMIT_DOCUMENTS", 6)
    monkeypatch.setattr(units, "UNIT_DOCUMENTS", 25)
    monkeypatch.setattr(parts, "UNIT_DOCUMENTS", 25)
    whole = run(config, tmp_path / "whole")
    dispatched, commits, done = _count_calls(monkeypatch), parts.commit, []

    def dying(*args: Any) -> None:
        if len(done) == dies_at:
            if last == "written":  # killed just behind a commit, or between the piece and its state
                commits(*args)
            raise KeyboardInterrupt
        commits(*args)
        done.append(args[1].counts.documents)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parts, "commit", dying)
        run(config, tmp_path / "cut")
    if peaks == "all":
        (tmp_path / "cut" / "shares" / "1-of-1" / "pieces" / ".half-written").mkdir()
    state = parts.read_state(tmp_path / "cut" / "shares" / "1-of-1")
    at = 0 if state is None else state.counts.documents
    assert at >= (done[-1] if done else 0)
    before = dispatched()
    assert run(config, tmp_path / "cut") == whole
    left = list(read_documents(config.data["anchor"], "a"))[at:]
    assert dispatched() - before <= len(left), "committed documents are not computed again"
    assert fingerprints(tmp_path / "cut") == fingerprints(tmp_path / "whole")


@pytest.mark.parametrize("peaks", ["all", "none"])
def test_shares_together_are_what_one_makes(
    config: Config, tmp_path: Path, peaks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_DOCUMENTS", 7)
    monkeypatch.setattr(parts, "UNIT_DOCUMENTS", 7)
    config = dataclasses.replace(config, scan=dataclasses.replace(config.scan, peaks=peaks))
    whole = run(config, tmp_path / "whole")
    for share in ("3/3", "1/3"):
        one = dataclasses.replace(config, scan=dataclasses.replace(config.scan, share=share))
        with pytest.raises(Unfinished, match="not finished in"):
            run(one, tmp_path / "shared")
    other = dataclasses.replace(config, scan=dataclasses.replace(config.scan, share="1/2"))
    with pytest.raises(UserError, match="is a share of 3, this is one of 2: go on with as many"):
        run(other, tmp_path / "shared")
    last = dataclasses.replace(config, scan=dataclasses.replace(config.scan, share="2/3"))
    assert run(last, tmp_path / "shared") == whole
    assert fingerprints(tmp_path / "shared") == fingerprints(tmp_path / "whole")


def test_shares_of_other_files_are_not_one_scan(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (units, parts):
        monkeypatch.setattr(module, "UNIT_DOCUMENTS", 7)

    def share(place: str, of: str) -> Path:
        out = tmp_path / place
        with pytest.raises(Unfinished):
            run(dataclasses.replace(config, scan=dataclasses.replace(config.scan, share=of)), out)
        return out

    first, other_number = share("first", "1/2"), share("thirds", "2/3")
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows.replace("red", "dog"))
    other = share("other", "2/2")
    with pytest.raises(UserError, match="is a share of another scan than .* with {'files': .*} instead of {'files': "):
        merge_scans(tmp_path / "into", [first, other])
    with pytest.raises(UserError, match="2-of-3 is one of 3 shares, .*1-of-2 one of 2"):
        merge_scans(tmp_path / "into", [first, other_number])
    (tmp_path / "rows.jsonl").write_text(rows)
    second = share("second", "2/2")
    merge_scans(tmp_path / "whole", [second, first])
    run(config, tmp_path / "alone")
    assert fingerprints(tmp_path / "whole") == fingerprints(tmp_path / "alone")
    for out in (first, other):  # as a version wrote them that noted no files
        _forget_files(next((out / "shares").glob("*-of-*")))
    merge_scans(tmp_path / "unknown", [first, other])


def _forget_files(share: Path) -> None:
    state = pq.read_table(share / "state.parquet")
    said = json.loads(state.schema.metadata[b"fac_jax"])
    del said["identity"]["files"]
    pq.write_table(state.replace_schema_metadata({"fac_jax": json.dumps(said)}), share / "state.parquet")


def test_a_pass_that_noted_no_files_goes_on(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parts, "finish", _interrupt)
        run(config, tmp_path / "out")
    _forget_files(tmp_path / "out" / "shares" / "1-of-1")
    assert run(config, tmp_path / "out")["documents"] == load_scan(tmp_path / "out").counts["documents"]
    assert load_scan(tmp_path / "out").identity.files is None


def test_without_single_documents(config: Config, tmp_path: Path) -> None:
    run(config, tmp_path / "all")
    bare = dataclasses.replace(config, scan=dataclasses.replace(config.scan, peaks="none"))
    run(bare, tmp_path / "none")
    assert {file.name for file in (tmp_path / "none").iterdir()} == {"features.parquet", "scan.json"}
    every, found = load_scan(tmp_path / "all").features().to_pylist(), load_scan(tmp_path / "none").features()
    for row in every:
        for span in row["spans"]:
            assert span["document"] is not None
            span["document"] = None
    assert found.to_pylist() == every
    with pytest.raises(UserError, match="kept no single documents .*: run `fac scan CONFIG --data anchor --scan.peaks"):
        load_scan(tmp_path / "none").peaks_nf  # noqa: B018


def test_peaks_of_chosen_features(config: Config, tmp_path: Path) -> None:
    run(config, tmp_path / "all")
    pq.write_table(pa.table({"feature": [11, 2, 11]}), tmp_path / "wanted.parquet")
    chosen = dataclasses.replace(config, scan=dataclasses.replace(config.scan, peaks=str(tmp_path / "wanted.parquet")))
    run(chosen, tmp_path / "chosen")
    every, found = load_scan(tmp_path / "all"), load_scan(tmp_path / "chosen")
    assert set(found.peaks_nf.indices.tolist()) == {2, 11}
    assert (found.peaks_nf[:, [2, 11]] != every.peaks_nf[:, [2, 11]]).nnz == 0
    assert found.features().equals(every.features())
    for setting, message in (("some", "must be all, none, or a parquet file"), (str(tmp_path / "no"), "must be all")):
        with pytest.raises(UserError, match=message):
            kept_features(setting, FEATURES)
    for features in ([], [FEATURES], [-1]):
        pq.write_table(pa.table({"feature": pa.array(features, pa.int64())}), tmp_path / "wrong.parquet")
        with pytest.raises(UserError, match="scan.peaks: .*wrong.parquet lists .*; the SAE has 16"):
            kept_features(str(tmp_path / "wrong.parquet"), FEATURES)


def _count_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many batches went to the device."""
    real, calls = scorer.dispatch, []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(scorer, "dispatch", counted)
    return lambda: len(calls)


def test_killed_after_the_product_was_written(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = run(config, tmp_path / "out")
    before = fingerprints(tmp_path / "out")
    dispatched = _count_calls(monkeypatch)
    assert run(config, tmp_path / "out") == counts and dispatched() == 0
    assert fingerprints(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["documents", "peaks", "features"])
def test_a_finished_scan_that_lacks_a_table_is_not_taken_for_whole(config: Config, tmp_path: Path, name: str) -> None:
    run(config, tmp_path / "out")
    table = tmp_path / f"out/{name}.parquet"
    table.write_bytes(table.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{name}.parquet is missing or damaged \(.*\): delete .* to scan again"):
        run(config, tmp_path / "out")


@pytest.mark.parametrize("which", [0, 2, -1])
def test_a_missing_piece_is_named(config: Config, tmp_path: Path, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stretch, "COMMIT_DOCUMENTS", 6)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parts, "finish", _interrupt)
        run(config, tmp_path / "out")
    piece = sorted((tmp_path / "out" / "shares" / "1-of-1" / "pieces").iterdir())[which]
    piece.rename(tmp_path / "elsewhere")
    _, first, after = (int(number) for number in piece.name.split("-"))
    with pytest.raises(UserError, match=f"lack documents {first} to {after}: delete these folders to scan again"):
        run(config, tmp_path / "out")


def _interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def test_a_scan_with_another_sae_is_not_mixed_in(config: Config, tmp_path: Path) -> None:
    run(config, tmp_path / "out")
    with pytest.raises(
        UserError, match=r"was made with {'sae': 'sae-1'}, the config asks {'sae': 'sae-2'}: delete the folder"
    ):
        run(config, tmp_path / "out", sae="sae2")
    with pytest.raises(
        UserError, match="was made with SAE sae-1, asked is SAE sae-2: run `fac scan CONFIG --data anchor` again"
    ):
        check_sae(load_scan(tmp_path / "out"), "sae-2")


def test_an_sae_that_does_not_fit_the_backbone(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "load_sae", load_sae)
    card = {"k": K, "variant": "topk", "model": "toy", "rows": 1, "steps": 1, "metrics": {}}
    for name, width, layer, model in (("w", 8, 3, "model-1"), ("l", D, 2, "model-1"), ("m", D, 3, "model-2")):
        sae = SAE(jnp.zeros((FEATURES, width)), jnp.zeros(FEATURES), jnp.zeros(width))
        save_sae(tmp_path / name, sae, {**card, "layer": layer, "model_digest": model})
    for name, message in (
        ("w", "reads width 8, backbone has 6"),
        ("l", "layer 2, config asks 3"),
        ("m", "digest model-2"),
    ):
        with pytest.raises(UserError, match=message):
            run(config, tmp_path / "out", sae=str(tmp_path / name))


def test_no_scan_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished scan .*: run `fac scan CONFIG --data anchor`"):
        load_scan(tmp_path / "anchor")


def test_empty_data_set(config: Config, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(UserError, match="data.anchor has no documents"):
        run(config, tmp_path / "out")


def test_bad_rows_are_counted_and_listed(config: Config, tmp_path: Path) -> None:
    with open(tmp_path / "rows.jsonl", "a") as rows:
        rows.write("{broken\n")
    with pytest.raises(UserError, match="rows.jsonl:61: not valid JSON"):
        run(config, tmp_path / "out")
    data = {"anchor": dataclasses.replace(config.data["anchor"], on_bad_row="skip")}
    counts = run(dataclasses.replace(config, data=data), tmp_path / "out2")
    assert counts["skipped_rows"] == 1
    assert "rows.jsonl:61" in json.loads((tmp_path / "out2" / "scan.json").read_text())["skipped"][0]


def test_what_the_chat_template_refuses_is_a_bad_row(
    config: Config, tmp_path: Path, backbone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares number the documents alike: together they are the scan of the other rows."""
    monkeypatch.setattr(units, "UNIT_DOCUMENTS", 7)
    monkeypatch.setattr(parts, "UNIT_DOCUMENTS", 7)
    run(config, tmp_path / "good")
    text, refused = with_refused((tmp_path / "rows.jsonl").read_text())
    (tmp_path / "rows.jsonl").write_text(text)
    monkeypatch.setattr(backbone.tokenizer, "chat_template", ALTERNATE + backbone.tokenizer.chat_template)
    with pytest.raises(UserError, match="rows.jsonl:1: the chat template refuses turns of user, user"):
        run(config, tmp_path / "stop")
    data = {"anchor": dataclasses.replace(config.data["anchor"], on_bad_row="skip")}
    for share in ("3/3", "1/3"):
        one = dataclasses.replace(config, data=data, scan=dataclasses.replace(config.scan, share=share))
        with pytest.raises(Unfinished):
            run(one, tmp_path / "shared")
    last = dataclasses.replace(config, data=data, scan=dataclasses.replace(config.scan, share="2/3"))
    assert run(last, tmp_path / "shared")["skipped_rows"] == refused
    for name in ("features.parquet", "peaks.parquet"):
        assert fingerprints(tmp_path / "shared")[name] == fingerprints(tmp_path / "good")[name]


def test_what_synthesis_wrote_may_be_empty(config: Config, tmp_path: Path) -> None:
    synthesis = tmp_path / "synthesis"
    synthesis.mkdir()
    (synthesis / "kept.jsonl").write_text("")
    (synthesis / "random.jsonl").write_text('{"text": "red cat", "label": 1}\n')
    assert run(config, tmp_path / "kept", "kept", synthesis=synthesis)["documents"] == 0
    assert load_scan(tmp_path / "kept").peaks_nf.shape == (0, FEATURES)
    assert load_scan(tmp_path / "kept").mean_residuals().shape == (0, 0)
    assert run(config, tmp_path / "random", "random", synthesis=synthesis)["documents"] == 1
    assert load_scan(tmp_path / "random").labels_n.tolist() == [1.0]


def test_peaks_of_documents_in_memory_are_those_of_the_scan(config: Config, tmp_path: Path) -> None:
    run(config, tmp_path / "out")
    loaded = scorer.load_backbone("", 3, "auto", _mesh())
    encoded = [encode(d, loaded.tokenizer, 16) for d in read_documents(config.data["anchor"], "anchor")]
    for acts in ("topk", "relu"):
        peaks = peaks_of(encoded, loaded, sae_of(1), acts, config.backbone)
        if acts == "topk":
            assert (peaks != load_scan(tmp_path / "out").peaks_nf).nnz == 0
    assert peaks_of([], loaded, sae_of(1), "topk", config.backbone).shape == (0, FEATURES)
