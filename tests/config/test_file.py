"""A typo in the file or in a flag is an error that names the right word; what is written is read back as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from fac_jax.config.file import Config, load_config, to_yaml
from fac_jax.errors import UserError
from fac_jax.plain import digest, from_plain, to_plain

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_loads_and_round_trips(path: Path) -> None:
    config = load_config(path)
    assert from_plain(Config, yaml.safe_load(to_yaml(config)), "again") == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sea: {}", ["no key 'sea'", "did you mean 'sae'"]),
        ("sae: {feature: 4}", ["no key 'feature'", "did you mean 'features'"]),
        ("sae: {k: many}", ["k is 'many'", "must be int"]),
        ("sae: {k: true}", ["k is True", "must be int"]),
        ("sae: {k: 9, features: 4}", ["sae.k is 9", "sae.features 4"]),
        ("scan: {acts: topkk}", ["did you mean 'topk'", "relu"]),
        ("data: {a: {sources: [{format: csv}]}}", ["sources.0", "lacks the key 'path'"]),
        ("data: {a: {sources: [{path: x, split: [0.5, 0.1]}]}}", ["(0.5, 0.1)", "low < high"]),
        ("data: {a: {sources: [{path: x, split: [0.5]}]}}", ["has 1 items", "must have 2"]),
        ("data: {a: {sources: [{path: x, label: y, constant_label: 1}]}}", ["keep one"]),
        ("backbone: [1]", ["must be a mapping"]),
        ("backbone: {layer: 0}", ["starts at 1"]),
        ("a: [", ["not valid YAML"]),
        ("sae: {}\ntrain: {}\nsae: {k: 4}", ["'sae' is in line 1 and in line 3", "keep one"]),
        ("data: {a: {sources: [{path: x,\n  path: y}]}}", ["'path' is in line 1 and in line 2"]),
        ("data: {a: {sources: &own [*own]}}", ["sources.0", "must be a mapping"]),
        ("? [a, b]\n: 1", ["not valid YAML"]),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(path)
    for word in words:
        assert word in str(error.value)


def test_a_key_over_one_that_is_merged_is_no_second_one(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "data:\n  a: &a {sources: [{path: p}], max_tokens: 99}\n  b: &b {<<: *a, max_tokens: 77}\n"
        "  c: {<<: *b, sample: 0.5}\n  d: {<<: [*b, *a], max_tokens: 55}\n"
    )
    data = load_config(tmp_path / "c.yaml").data
    assert {name: data[name].max_tokens for name in data} == {"a": 99, "b": 77, "c": 77, "d": 55}


def test_a_missing_file_says_where_to_start() -> None:
    with pytest.raises(UserError, match="configs/quickstart.yaml"):
        load_config("nowhere.yaml")


def test_a_base_gives_what_a_file_does_not_say(tmp_path: Path) -> None:
    (tmp_path / "low").mkdir()
    (tmp_path / "base.yaml").write_text(
        "run: {dir: a, seed: 3}\nsae: {k: 8, features: 64}\ndata: {x: {sources: [{path: p}], max_tokens: 99}}"
    )
    (tmp_path / "low" / "middle.yaml").write_text("base: ../base.yaml\nsae: {k: 16}\nscan: {acts: relu}")
    top = tmp_path / "low" / "top.yaml"
    top.write_text("base: middle.yaml\nrun: {dir: b}\ndata: {x: {sources: [{path: q}]}, y: {sources: [{path: r}]}}")
    config = load_config(top)
    assert (config.run.dir, config.run.seed, config.sae.k, config.sae.features) == ("b", 3, 16, 64)
    assert config.scan.acts == "relu" and sorted(config.data) == ["x", "y"]
    assert [one.path for one in config.data["x"].sources] == ["q"] and config.data["x"].max_tokens == 99


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"top": "base: gone.yaml"}, ["gone.yaml does not exist", "base of", "top.yaml"]),
        ({"top": "base: 3"}, ["base is 3", "path of a YAML file"]),
        ({"top": "base: b.yaml", "b": "base: top.yaml"}, ["top.yaml is its own base", "b.yaml"]),
        ({"top": "base: b.yaml", "b": "sea: {}"}, ["b.yaml has no key 'sea'"]),
        ({"top": "base: b.yaml\nsea: {}", "b": "sae: {}"}, ["top.yaml has no key 'sea'"]),
    ],
)
def test_a_mistake_with_a_base_is_named(tmp_path: Path, files: dict[str, str], words: list[str]) -> None:
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "top.yaml")
    for word in words:
        assert word in str(error.value)


def test_what_is_no_text_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read .Is a directory.; name a YAML file"):
        load_config(tmp_path)
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="a.yaml is not UTF-8 text .invalid start byte at byte 0"):
        load_config(tmp_path / "a.yaml")


def test_an_unknown_data_set_lists_those_there_are() -> None:
    config = load_config(ROOT / "configs/quickstart.yaml")
    with pytest.raises(UserError, match=r"'ancor'.*did you mean 'anchor'.*chat, anchor, seed, heldout"):
        config.dataset("ancor")


def test_yaml_1_1_floats_such_as_1e_3_are_numbers() -> None:
    assert from_plain(Config, {"train": {"learning_rate": "1e-3"}}, "c").train.learning_rate == 1e-3


def test_only_the_embedded_writer_is_steered() -> None:
    plain = {"synthesize": {"steer": [0, 1.5]}, "llm": {"url": "http://127.0.0.1:9/v1"}}
    with pytest.raises(UserError, match=r"synthesize.steer is \(0.0, 1.5\) and llm.url http.*set llm.url to null"):
        from_plain(Config, plain, "c")
    assert from_plain(Config, {"synthesize": plain["synthesize"]}, "c").synthesize.steer == (0.0, 1.5)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"synthesize.steer is \(.*\); strengths must be 0 or more"):
            from_plain(Config, {"synthesize": {"steer": [bad]}}, "c")


def test_perturbing_any_field_changes_the_digest() -> None:
    config = load_config(ROOT / "configs/quickstart.yaml")
    seen = {digest(config)}
    count = 1
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if not dataclasses.is_dataclass(value):
            continue
        for f in dataclasses.fields(value):
            plain = to_plain(config)
            plain[section.name][f.name] = "perturbed"
            seen.add(digest(plain))
            count += 1
    assert len(seen) == count
