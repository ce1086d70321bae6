"""The page: safe against hostile text, independent of any network, honest about what is not there."""

import base64
import copy
import dataclasses
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fac_jax.config.file import load_config
from fac_jax.report.markup import VOID_HTML
from fac_jax.report.page import page, report
from fac_jax.report.products import Row, RunView, read_view
from tests.report.sample_run import STAGES, write_run


class Reader(HTMLParser):
    """Tags with their attributes, text with the tags around it; fails where tags do not match."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, list[tuple[str, str]]]] = []
        self.feed(markup)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_HTML:
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.words.append((data, list(self.open)))

    def text(self) -> str:
        return " ".join(words for words, around in self.words if ("style", "") not in around)


def test_hostile_text_stays_text(hostile_run: Path, hostile: str) -> None:
    markup = page(read_view(hostile_run, load_config(hostile_run / "config.yaml")))
    read = Reader(markup)
    names = {name for name, _ in read.tags}
    assert not names & {"script", "img", "iframe", "object", "link", "base", "form"}
    assert sum(name == "style" for name, _ in read.tags) == sum(name == "main" for name, _ in read.tags) == 1
    assert not [key for _, attributes in read.tags for key in attributes if key.startswith("on")]
    assert "<script>alert(1)</script>" in read.text()  # shown, as text
    assert "\x1b" not in markup and "\u202e" not in markup


def test_nothing_is_loaded_from_anywhere(view: RunView) -> None:
    markup = page(view)
    for _, attributes in Reader(markup).tags:
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")  # type: ignore[union-attr]
    assert not re.search(r"url\(|@import|https?://(?!127)", markup)


def test_the_policy_allows_this_style_and_nothing_else(view: RunView) -> None:
    markup = page(view)
    style = re.search(r"<style>(.*?)</style>", markup, re.S)
    policy = next(a["content"] for _, a in Reader(markup).tags if a.get("http-equiv") == "Content-Security-Policy")
    assert style is not None and policy is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}';")
    assert " style=" not in markup  # inline styles would be refused


def test_every_passage_and_sample_is_veiled(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    view = read_view(tmp_path / "run", load_config(tmp_path / "run/config.yaml"))
    passages = {part for item in view.missing for s in item.spans for part in (s.before, s.after)}
    assert view.splice is not None
    passages |= {view.splice["sample"][name] for name in ("prompt", "clean", "spliced")}
    passages |= {sample.text for sample in view.kept} | {row["text"] for row in view.selection or []}
    shown = 0
    for words, around in Reader(page(view)).words:
        if any(passage and passage.strip() in words for passage in passages):
            shown += 1
            assert ("label", "veil") in around
    assert shown > 2 * len(view.missing)


def test_explanations_are_veiled_where_the_task_is_about_harm(view: RunView) -> None:
    tokens = {token for item in view.missing for token in (item.explanation["fires_on"] or [])} - {"they"}
    record = view.records["relevance"]
    harmless = dataclasses.replace(record, summary={**record.summary, "harmful": False})
    for seen, veiled in (
        (view, True),
        (dataclasses.replace(view, records={**view.records, record.stage: harmless}), False),
    ):
        named = [around for words, around in Reader(page(seen)).words if words in tokens and ("code", "") in around]
        assert len(named) > len(view.missing)
        assert all((("label", "veil") in around) == veiled for around in named)


def test_features_that_nothing_written_activates_are_counted(view: RunView) -> None:
    words = Reader(page(view)).text()
    assert "11 of these gave a contrastive pair, 9 no candidate that activates them" in words


def test_a_task_that_trains_no_classifier_says_so(view: RunView) -> None:
    record = view.records["relevance"]
    other = dataclasses.replace(record, summary={**record.summary, "metric": "win rate"})
    words = Reader(page(dataclasses.replace(view, records={**view.records, record.stage: other}, finetune=None))).text()
    assert "measured by win rate: fac finetune, with finetune.train, does that" in words
    assert "fac finetune CONFIG" not in words, "it would make nothing without more settings"


def test_scores_of_explanations(view: RunView) -> None:
    words = Reader(page(view)).text()
    for expected in (
        "1,731 of 2,114 features that the anchor activates are explained; 383 without a pattern.",
        "0.689 (0.685 to 0.693)",
        "0.499 (0.495 to 0.503)",
        "Rated by simulation",
        "Features by AUROC",
        "80 texts for 20 features, written by SmolLM2 from the explanation alone (3 were no text)",
        "0.312 (0.308 to 0.316)",
        "detection AUROC 0.52 (0.41 to 0.58)",
        "25.0% of texts written from it activate it",
    ):
        assert expected in words, expected
    assert "The judge and itself" not in words and "Passages that give orders" not in words, "no model judged"


def test_every_veil_can_be_lifted_from_the_keyboard(view: RunView) -> None:
    tags = Reader(page(view)).tags
    for place, (name, attributes) in enumerate(tags):
        if name == "label" and attributes.get("class") == "veil":
            following, given = tags[place + 1]
            assert (following, given["type"]) == ("input", "checkbox") and given["aria-label"]


def test_key_numbers_and_methods_are_on_the_page(view: RunView) -> None:
    words = Reader(page(view)).text()
    for expected in (
        "23 of 59",
        "61.0% → 76.5%",
        "47.8%",
        "0.604 ± 0.012",
        "203,411 rows",
        "embedded",
        "0.261",
        "K = 32",
        "1,208 predictions",
        "tied Top-K, 4,096 features, K = 32",
        "Features by activation density",
        "0.977",
    ):
        assert expected in words, expected


def test_a_sweep_is_drawn_and_tabled(view: RunView) -> None:
    """A figure per layer, width and quantity, a line per kind, a row per SAE; no section where none was asked for."""
    assert view.sweep is not None
    html = page(view)
    section = html[html.index('id="sweep"') :]
    section = section[: section.index("</section>")]
    assert section.count("<figure") == 6 and section.count("<polyline") == 24
    for title in (
        "FVU, layer 12, 2,048 features",
        "Dead fraction, layer 15, 4,096 features",
        "BatchTopK",
        "JumpReLU",
        "Matryoshka",
    ):
        assert title in section
    assert section.count("<tr") == 1 + len(view.sweep["members"])
    assert 'id="sweep"' not in page(dataclasses.replace(view, sweep=None))


def test_ablations_are_tabled_with_the_figures_that_they_have(view: RunView) -> None:
    html = page(view)
    section = html[html.index('id="ablations"') :].partition("</section>")[0]
    words = re.sub(r"<[^>]*>", " ", section)
    for expected in ("steps: written by embedded:tiny, 3 seeds, 23 features missing", "30.0 ± 4.0 %", "1,034 ± 99"):
        assert expected in " ".join(words.split()), expected
    assert section.count("<tr") == 3 and "Near duplicates" not in words and "Money" not in words
    assert 'id="ablations"' not in page(dataclasses.replace(view, ablations={}))


def test_steering_is_drawn_and_tabled(view: RunView) -> None:
    def spread(mean: float) -> dict[str, Any]:
        return {"mean": mean, "sd": 0.01, "values": [mean, mean]}

    arms = {
        name: {
            **{
                figure: {m: spread(0.2 + place / 10 + float(m) / 20) for m in ("-1", "0", "1")}
                for figure in ("robust_accuracy", "accuracy", "positional_bias", "probability")
            },
            "scr": spread(0.1),
        }
        for place, name in enumerate(("kept", "random", "random direction"))
    }
    found = {
        "questions": 100, "layer": 15, "multipliers": [-1.0, 0.0, 1.0], "seeds": [42, 43], "arms": arms,
        "samples": {"kept": 25, "random": 25},
    }  # fmt: skip
    assert 'id="steering"' not in page(view)
    html = page(dataclasses.replace(view, steering=found))
    section = html[html.index('id="steering"') :].partition("</section>")[0]
    assert section.count("<tr") == 4 and section.count("<polyline") == 3
    words = " ".join(re.sub(r"<[^>]*>", " ", section).split())
    for expected in (
        "100 held-out questions in both orders; vectors at layer 15 of 25 kept",
        "35.0% ± 1.0",
        "10.0% ± 1.0",
    ):
        assert expected in words, expected
    norms = [
        {"behaviour": task, "run": f"runs/{task}", "samples": 25, "norm_before": spread(before), "norm": spread(3.0)}
        for task, before in (("sycophancy", 2.0), ("survival", 4.0))
    ]
    html = page(dataclasses.replace(view, steering={**found, "equal_norm": norms}))
    section = html[html.index('id="steering"') :].partition("</section>")[0]
    words = " ".join(re.sub(r"<[^>]*>", " ", section).split())
    assert section.count("<tr") == 4 + 3 and "The vectors of 2 behaviours were brought to the mean" in words
    assert "sycophancy runs/sycophancy 25 2 ± 0.01 3 ± 0.01 survival runs/survival 25 4 ± 0.01 3 ± 0.01" in words


def test_other_measures_of_diversity_are_tabled(view: RunView) -> None:
    """What is a sample has its interval and its rows; what is absent says why and what mends it."""
    html = page(view)
    section = html[html.index('id="diversity"') :].partition("</section>")[0]
    assert list(view.diversity) == ["anchor", "seed"] and "seed (58 rows)" in section
    assert "9.25 [9.125, 9.375] of 540" in section and "Mean length (words)" in section
    assert section.count(">absent<") == 7 and section.count("no Vendi score: spaCy is not installed: run `bash") == 1
    assert 'id="diversity"' not in page(dataclasses.replace(view, diversity={}))


@pytest.mark.parametrize(
    ("upto", "command"),
    [
        ("activations", "fac train CONFIG"),
        ("sae", "fac scan CONFIG"),
        ("relevance", "fac coverage CONFIG"),
        ("coverage", "fac synthesize CONFIG"),
        ("synthesis", "fac evaluate CONFIG"),
        ("evaluation", "fac select CONFIG"),
        ("selection", "fac finetune CONFIG"),
    ],
)
def test_what_has_not_run_is_named_with_its_command(tmp_path: Path, upto: str, command: str) -> None:
    config = write_run(tmp_path / "run", upto=upto)
    assert command in Reader(page(read_view(tmp_path / "run", config))).text()


@pytest.mark.parametrize("upto", STAGES)
def test_every_partial_run_has_a_page(tmp_path: Path, upto: str) -> None:
    config = write_run(tmp_path / "run", upto=upto, features=3)
    Reader(page(read_view(tmp_path / "run", config)))


def test_a_selection_says_from_what_for_what_and_how(view: RunView) -> None:
    def words(selection: list[Row], **found: object) -> str:
        record = dataclasses.replace(view.records["selection"], summary=found)
        chosen = dataclasses.replace(view, selection=selection, records={**view.records, "selection": record})
        return Reader(page(chosen)).text()

    rows = list(view.selection or [])
    assert (
        "9 anchor documents together activate 23 of the 23 missing features. Chosen greedily"
        in Reader(page(view)).text()
    )
    other = {"source": "web <b>", "method": "sim_scale", "target": "all", "features": 4096}
    assert "9 web <b> documents together activate 23 of the 4,096 features of the SAE. Chosen by SAE-SimScale" in words(
        rows, **other
    )
    assert "No web <b> document is taken: none of them activates one of the 4,096 features" in words([], **other)
    assert "No anchor document is taken: nothing is missing." in words([], features=0)


def test_arms_at_chance_are_named(view: RunView) -> None:
    finetune = copy.deepcopy(view.finetune)
    assert finetune is not None
    finetune["arms"]["seed"]["auprc"]["mean"] = 0.4
    words = Reader(page(dataclasses.replace(view, finetune=finetune))).text()
    assert "No better than a random scorer (0.510): seed." in words
    assert "No better than a random scorer" not in Reader(page(view)).text()


def test_nothing_missing_and_nothing_kept_is_a_page_too(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", features=0)
    words = Reader(page(read_view(tmp_path / "run", config))).text()
    assert "None: the seed set activates all" in words and "No generation passed the filter" not in words
    assert words.count("No feature is missing, so there was nothing to write samples for.") == 2, "verdict and section"


def test_many_features_are_folded_and_then_left_to_the_product(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", features=330)
    words = Reader(page(read_view(tmp_path / "run", config))).text()
    assert "280 more missing features" in words and "30 more are in" in words


def test_the_stage_writes_the_same_page_again(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run")
    out = tmp_path / "run/report"
    out.mkdir()
    found = report(config, out, {})
    first = (out / "index.html").read_bytes()
    report(config, out, {})
    assert (out / "index.html").read_bytes() == first
    assert found["page"] == "index.html" and len(found["findings"]) == 3


def test_a_page_asked_for_with_another_threshold_shows_what_was_measured(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run")
    other = dataclasses.replace(config, coverage=dataclasses.replace(config.coverage, threshold=123.0))
    moved = read_view(tmp_path / "run", other)
    assert moved.threshold == config.coverage.threshold and "threshold 123" not in Reader(page(moved)).text()
