"""Scans of different data sets merged in any order, against one scan of all their documents; and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fac_jax.cli import main
from fac_jax.errors import UserError
from fac_jax.packing import encode, pack
from fac_jax.scan.merge import merge_scans
from fac_jax.scan.parts import Identity
from fac_jax.scan.peaks import BatchPeaks
from fac_jax.scan.product import load_scan
from fac_jax.text import Turn, make_document
from tests.scan.written_scan import write_scan
from tests.word_tokenizer import word_tokenizer

FEATURES = 12
TOKENIZER = word_tokenizer(["<pad>", "<user>", *(f"word{index}" for index in range(40))])


def texts(seed: int, count: int = 20) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(f"word{i}" for i in generator.integers(0, 40, 8)) for _ in range(count)]


def peaks_of(text: str) -> np.ndarray:
    """[f] peaks that are fixed by the text alone, many of them equal."""
    generator = np.random.default_rng(int(hashlib.sha256(text.encode()).hexdigest()[:8], 16))
    return np.where(generator.random(FEATURES) < 0.5, generator.integers(1, 4, FEATURES), 0).astype(np.float32)


def make(folder: Path, name: str, rows: list[str], **changes: object) -> Path:
    documents = [make_document([Turn("user", text)], None, name) for text in rows]
    scored = []
    for batch in pack((encode(document, TOKENIZER, 16) for document in documents), 4, 32):
        peak_nf = np.stack([peaks_of(one.document.text) for one in batch.documents])
        document, feature = np.nonzero(peak_nf)
        position = (1 + (peak_nf.sum(axis=1)[document].astype(int) + feature) % 8).astype(np.int32)
        tokens_f = np.count_nonzero(peak_nf, axis=0)
        means = np.zeros((len(batch.documents), 1), np.float32)
        scored.append((batch, BatchPeaks(document, feature, peak_nf[document, feature], position, tokens_f, means)))
    identity = Identity(name, f"data-{name}", "model", 3, "sae", FEATURES, 2, "topk", 4, 8, "all")
    write_scan(folder, dataclasses.replace(identity, **changes), scored, TOKENIZER)  # type: ignore[arg-type]
    return folder


def test_merged_in_any_order_they_are_one_scan_of_all(tmp_path: Path) -> None:
    rows = {name: texts(seed) for seed, name in enumerate("abc")}
    folders = [make(tmp_path / name, name, found) for name, found in rows.items()]
    make(tmp_path / "together", "all", [text for found in rows.values() for text in found])
    made = []
    for number, order in enumerate(itertools.permutations(folders)):
        merge_scans(tmp_path / f"merged-{number}", order)
        made.append({file.name: file.read_bytes() for file in (tmp_path / f"merged-{number}").iterdir()})
    assert all(files == made[0] for files in made)
    merged, together = load_scan(tmp_path / "merged-0"), load_scan(tmp_path / "together")
    assert merged.identity.name == "a+b+c" and merged.counts == together.counts
    assert merged.features().equals(together.features()), "counts, maxima, histograms and spans"
    assert (merged.peaks_nf != together.peaks_nf).nnz == 0
    assert merged.documents().equals(together.documents().set_column(3, "source", merged.documents("source")["source"]))


def test_scans_without_documents(tmp_path: Path) -> None:
    for name in "ab":
        make(tmp_path / name, name, texts(ord(name)), peaks="none")
    assert main(["scan", "merge", str(tmp_path / "ab"), str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert load_scan(tmp_path / "ab").counts["documents"] == 40
    assert not (tmp_path / "ab" / "documents.parquet").exists()


def test_other_files_at_the_same_path_are_another_data_set(tmp_path: Path) -> None:
    here, there = (make(tmp_path / files, "one", texts(ord(files)), files=files) for files in "ab")
    unknown = make(tmp_path / "c", "one", texts(3))
    merge_scans(tmp_path / "both", [there, here])
    assert load_scan(tmp_path / "both").identity.files == "a+b"
    merge_scans(tmp_path / "three", [make(tmp_path / "d", "two", texts(4), files="d"), unknown])
    assert load_scan(tmp_path / "three").identity.files is None
    for twice in ([here, make(tmp_path / "e", "one", texts(5), files="a")], [here, unknown]):
        with pytest.raises(UserError, match="data set 'one' is named twice"):
            merge_scans(tmp_path / "into", twice)


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    one = make(tmp_path / "one", "one", texts(1))
    refused = {
        "holds neither a finished scan": tmp_path / "nothing",
        "was scanned with {'sae': 'other'}.* with {'sae': 'sae'}|with {'sae': 'sae'}": make(
            tmp_path / "sae", "x", texts(2), sae="other"
        ),
        "data set 'one' is named twice": make(tmp_path / "same", "one", texts(3)),
        "20 documents are in more than one": make(tmp_path / "overlap", "y", texts(1)),
    }
    for message, other in refused.items():
        with pytest.raises(UserError, match=message):
            merge_scans(tmp_path / "into", [one, other])
        assert not (tmp_path / "into").exists()
    half = tmp_path / "half"
    (half / "shares").mkdir(parents=True)
    with pytest.raises(UserError, match="one is a finished scan and .*half is not"):
        merge_scans(tmp_path / "into", [one, half])
    with pytest.raises(UserError, match="no share of a scan is there"):
        merge_scans(tmp_path / "into", [half])
    with pytest.raises(UserError, match="already holds something"):
        merge_scans(one, [make(tmp_path / "z", "z", texts(9))])


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", "merge"]) == 2 and "fac scan merge INTO FROM" in capsys.readouterr().out
    assert main(["scan", "merge", "--help"]) == 0
    assert main(["scan", "merge", "only-one"]) == 1 and "too few words" in capsys.readouterr().err


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    scans = [str(make(tmp_path / name, name, texts(ord(name)))) for name in "ab"]
    assert main(["scan", "merge", str(tmp_path / "file" / "into"), *scans]) == 1
    assert "file cannot be made a folder" in " ".join(capsys.readouterr().err.split())


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    share = tmp_path / "x" / "shares" / "1-of-1"
    share.mkdir(parents=True)
    pq.write_table(pa.table({"feature": [1]}), share / "state.parquet")
    with pytest.raises(UserError, match="state.parquet cannot be read .*; delete .*1-of-1 to scan this share again"):
        merge_scans(tmp_path / "into", [tmp_path / "x"])
