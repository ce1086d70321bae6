"""A sample's story: joined from what the stages left, hidden where it may do harm, exact about what is not known."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from fac_jax import cli
from fac_jax.config.file import Config
from fac_jax.errors import UserError
from fac_jax.report import samples
from fac_jax.report.samples import Story, listing, read_story
from fac_jax.scan.tables import DOCUMENTS, PEAKS
from tests.features.topics import WORDS, topics_tokenizer
from tests.report.sample_run import sample_text, write_run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Config]:
    """The third kept sample is for feature 248, and activates 137 and 211 too; its scan says where."""
    monkeypatch.setattr(samples, "load_tokenizer", lambda source: topics_tokenizer())
    folder = tmp_path / "run"
    config = write_run(folder)
    ids = [WORDS.index(word) for word in ("<user>", "plain1", "plain2", "topic3", "plain4", "<user>")]
    scanned = [
        {"index": 0, "id": "0" * 16, "text": "another", "token_ids": ids, "content": [True] * 6},
        {
            "index": 1, "id": "1" * 16, "text": sample_text(4, ""), "token_ids": ids,
            "content": [False, True, True, True, True, False],
        },
    ]  # fmt: skip
    peaks = [
        {"document": document, "feature": feature, "peak": peak, "position": 3, "token_id": ids[3]}
        for document, feature, peak in ((0, 248, 9.0), (1, 137, 1.5), (1, 211, 2.5), (1, 248, 4.61), (1, 999, 8.0))
    ]
    for name, rows, schema in (("documents", scanned, DOCUMENTS), ("peaks", peaks, PEAKS)):
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"scans/kept/{name}.parquet")
    return folder, config


def story(run: tuple[Path, Config], name: str) -> Story:
    return read_story(*run, name)[0]


def said(renderable: object) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_a_kept_sample_proves_itself(run: tuple[Path, Config]) -> None:
    found, harmful = read_story(*run, "f248-s1-0")
    assert harmful and found.outcome == "kept" and found.text == sample_text(4, "")
    one = found.kept_for
    assert one is not None and (one.feature, one.anchor_documents) == (248, 1)
    assert one.about is not None and "women" in one.about
    assert one.anchor_peak == pytest.approx(5.2) and one.seed_peak == pytest.approx(0.3 * 5.2)
    assert one.peak == pytest.approx(4.6) and "AUROC 0.71" in one.relevance
    assert [(other.feature, other.peak) for other in found.covers] == [(211, 2.5), (137, 1.5)], "strongest first"
    assert found.adds == (248,) and found.written_for == 248 and found.pair is None, "step 1 has no pair"
    assert found.activation is not None
    assert (found.activation.score, found.activation.position) == (pytest.approx(4.61), 3)
    assert (found.activation.before, found.activation.token.strip()) == ("plain1 plain2", "topic3")
    assert (found.reply["seed"], found.reply["prompt_digest"], found.reply["mended"]) == (1, "d", ["took off quotes"])


def test_step_two_shows_its_pair(run: tuple[Path, Config]) -> None:
    found = story(run, "f174-s2-0")
    assert found.pair is not None and found.written_for == 174
    assert (found.pair["strong"], found.pair["weak_peak"]) == ("f174-s1-1", 0.25)
    words = said(samples.printed(found, harmful=False))
    assert re.search(r"  matches +“B”", words), "what it consists of"
    assert "f174-s1-1, peak 4.50: “strong”" in words and "f174-s1-0, peak 0.25: “weak”" in words
    assert "; `fac evaluate` finds the token" in words, "the scan does not hold it"


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("f100-s1-7", "rejected: 1 words, 5 were asked for"),
        ("f100-s1-8", "activates nothing that is missing above 1; it comes nearest to feature 137 with 0.80"),
        ("f100-s1-9", "others that are kept activate what it does"),
    ],
)
def test_what_was_not_kept_says_why(run: tuple[Path, Config], name: str, outcome: str) -> None:
    found = story(run, name)
    assert outcome in found.outcome and found.kept_for is None and found.adds == ()
    assert outcome in said(samples.printed(found, harmful=False))


def test_how_hard_the_writer_was_steered_is_said(run: tuple[Path, Config]) -> None:
    words = said(samples.printed(story(run, "f100-s1-9"), harmful=True))
    assert re.search(r"steered +towards feature 100, by 1.5 times its anchor peak", words)
    assert "steered" not in said(samples.printed(story(run, "f248-s1-0"), harmful=True))


def test_text_of_a_task_about_harm_is_hidden(run: tuple[Path, Config], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = run
    asked = ["samples", "show", str(folder / "config.yaml"), "f248-s1-0"]
    out = folder / "story.json"
    assert cli.main([*asked, "--out", str(out)]) == 0
    words = capsys.readouterr().out
    assert "women" not in words and "topic3" not in words and "hidden: it may be harmful" in words
    assert "4.61 in the scan, at token 3" in words and "211 (2.50), 137 (1.50)" in words
    assert json.loads(out.read_text())["text"] == sample_text(4, "")
    assert cli.main([*asked, "--show-unsafe"]) == 0
    words = capsys.readouterr().out
    assert "cannot do this kind of work" in words and "…plain1 plain2«topic3»plain4…" in words and "hidden" not in words
    assert cli.main(["samples", "list", str(folder / "config.yaml")]) == 0
    words = capsys.readouterr().out
    assert "12 samples kept, for 12 features missing at 1" in words and "f248-s1-0" in words and "women" not in words
    assert "women" in said(listing(*run, unsafe=True))


def test_what_cannot_be_told_is_said(run: tuple[Path, Config], capsys: pytest.CaptureFixture[str]) -> None:
    folder, config = run
    with pytest.raises(UserError, match="synthesis wrote no 'f248-s1-00' .did you mean 'f248-s1-0'"):
        story(run, "f248-s1-00")
    assert cli.main(["samples", "show", str(folder / "config.yaml")]) == 2
    assert "fac samples show CONFIG SAMPLE" in capsys.readouterr().err
    missing = pq.read_table(folder / "coverage/missing.parquet").slice(5)
    pq.write_table(missing, folder / "coverage/missing.parquet")
    with pytest.raises(UserError, match="feature 248 is not missing any more, as coverage was measured again"):
        story(run, "f248-s1-0")
    (folder / "synthesis/stage.json").unlink()
    with pytest.raises(UserError, match="holds no samples: run `fac synthesize CONFIG` first"):
        story(run, "f248-s1-0")
