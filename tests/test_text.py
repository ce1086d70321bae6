"""Corpora of every format become the same documents, and what is malformed is named with its file and line."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fac_jax import text
from fac_jax.config.data import DataSet, Source
from fac_jax.corpus_files import resolve
from fac_jax.errors import UserError
from fac_jax.text import Turn, count_documents, document_hash, make_document, read_documents


def rows() -> list[dict[str, object]]:
    return [{"text": f'  row {i}, says "hi"\nand more ', "toxic": i % 2 == 0} for i in range(6)]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"data.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in rows())
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "jsonl.zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(lines.encode())
    elif kind == "json":
        path.write_text(json.dumps(rows()))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows()), path)
    else:
        separator = {"csv": ",", "tsv": "\t"}[kind]
        quoted = ['"' + str(r["text"]).replace('"', '""') + f'"{separator}{str(r["toxic"]).lower()}' for r in rows()]
        path.write_text("\n".join(["# a remark", f"text{separator}toxic", *quoted]) + "\n")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "json", "parquet", "csv", "tsv"])
def test_every_format_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    source = Source(str(write(tmp_path, kind)), label="toxic", skip_lines=1 if kind in ("csv", "tsv") else 0)
    found = list(read_documents(DataSet(sources=(source,)), "x"))
    assert [d.text for d in found] == [str(row["text"]).strip() for row in rows()]
    assert [d.label for d in found] == [1.0, 0.0] * 3
    assert found[0].id == make_document([Turn("user", str(rows()[0]["text"]).strip())], None, "").id


def test_txt_is_a_document_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    found = read_documents(DataSet(sources=(Source(str(tmp_path / "a.txt"), constant_label=1.0),)), "x")
    assert [(d.text, d.label) for d in found] == [("one", 1.0), ("two", 1.0)]


def test_messages_keep_their_roles_and_both_chitchat_speakers_are_users(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "m.jsonl").write_text(json.dumps({"text": messages}))
    (document,) = read_documents(DataSet(sources=(Source(str(tmp_path / "m.jsonl")),)), "x")
    assert document.turns == (Turn("user", "q"), Turn("assistant", "a")) and document.text == "q"
    conversation = {
        "k": {"messages": [[{"text": "Hi", "sender": "1"}, {"text": "there", "sender": "1"}], [{"text": "yo"}]]}
    }
    (tmp_path / "c.json").write_text(json.dumps(conversation))
    (document,) = read_documents(DataSet(sources=(Source(str(tmp_path / "c.json"), format="chitchat"),)), "x")
    assert document.turns == (Turn("user", "Hi\nthere"), Turn("user", "yo"))


def test_what_stood_around_an_empty_turn_is_one_turn(tmp_path: Path) -> None:
    """Two turns of one role in a row are no conversation for many chat templates; those of the file stay."""
    said = [("user", "a"), ("user", "b"), ("assistant", " "), ("user", "c"), ("assistant", ""), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in [("user", ""), *said, ("user", "\n")]]
    (tmp_path / "m.jsonl").write_text(json.dumps({"text": messages}))
    (document,) = read_documents(DataSet(sources=(Source(str(tmp_path / "m.jsonl")),)), "x")
    assert document.turns == (Turn("user", "a"), Turn("user", "b\n\nc"), Turn("assistant", "d"))


@pytest.mark.parametrize(
    "value", [3, {"messages": 3}, {"turns": []}, {"messages": [[{"text": 5}]]}, {"messages": ["hi"]}]
)
def test_a_conversation_of_another_form_is_named(tmp_path: Path, value: Any) -> None:
    good = {"messages": [[{"text": "hi"}]]}
    (tmp_path / "c.json").write_text(json.dumps({"a": good, "b": value}))
    source = Source(str(tmp_path / "c.json"), format="chitchat")
    with pytest.raises(UserError, match=r"c.json:b: a chitchat conversation needs the form"):
        list(read_documents(DataSet(sources=(source,)), "x"))
    assert len(list(read_documents(DataSet(sources=(source,), on_bad_row="skip"), "x"))) == 1


BAD_LINES = [
    ("{not json", "bad.jsonl:2: not valid JSON"),
    ('{"txt": "x"}', "bad.jsonl:2: no field 'text' (did you mean 'txt'?)"),
    ('{"text": 5}', "bad.jsonl:2: the text is 5"),
    ('{"text": "   "}', "bad.jsonl:2: the text is empty"),
    ('{"text": "x", "lable": 1}', "bad.jsonl:2: no field 'label' (did you mean 'lable'?); it has text, lable; where"),
    ('{"text": "x", "label": null}', "bad.jsonl:2: the label 'label' is None"),
    ('{"text": "x", "label": "perhaps"}', "bad.jsonl:2: the label 'label' is 'perhaps'"),
    ('{"text": "x", "label": NaN}', "must be finite"),
    ('["a"]', "bad.jsonl:2: a row must be an object"),
    (r'{"text": "half \ud800"}', "bad.jsonl:2: the text holds half of a UTF-16 pair"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_malformed_row_is_named_or_skipped_and_listed(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "first", "label": 0}\n' + line + '\n{"text": "last", "label": 1}\n')
    data = DataSet(sources=(Source(str(path), label="label"),))
    with pytest.raises(UserError) as error:
        list(read_documents(data, "x"))
    assert message in str(error.value) and "--on-bad-row skip" in str(error.value)
    skipped: list[str] = []
    kept = DataSet(sources=data.sources, on_bad_row="skip")
    assert [d.text for d in read_documents(kept, "x", skipped)] == ["first", "last"]
    assert len(skipped) == 1 and message in skipped[0]


def test_a_field_that_no_row_has_is_said_when_all_are_left_out(tmp_path: Path) -> None:
    """A wider split would not help, which is what is said when rows are there and none is taken."""
    (tmp_path / "a.jsonl").write_text('{"txt": "x"}\n' * 3)
    dataset = DataSet((Source(str(tmp_path / "a.jsonl")),), on_bad_row="skip")
    with pytest.raises(UserError, match=r"every row of .*a.jsonl is malformed \(3\); the first is a.jsonl:1: no field"):
        list(read_documents(dataset, "x"))
    named = replace(dataset, sources=(Source(str(tmp_path / "a.jsonl"), text="txt", split=(0.0, 1e-9)),))
    with pytest.raises(UserError, match="gave nothing under its split"):
        list(read_documents(named, "x"))


def test_a_label_that_a_parquet_file_lacks_is_named_with_those_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"], "label": [1]}), tmp_path / "a.parquet")
    source = Source(str(tmp_path / "a.parquet"), label="lable")
    with pytest.raises(
        UserError, match=r"no field 'lable' \(did you mean 'label'\?\); it has text, label; .*label: FIELD"
    ):
        list(read_documents(DataSet((source,)), "x"))


def test_a_csv_row_with_too_few_fields_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nfine,1\nshort\n")
    with pytest.raises(UserError, match="a.csv:3: the row has not as many fields as the header"):
        list(read_documents(DataSet(sources=(Source(str(tmp_path / "a.csv"), label="label"),)), "x"))


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("a.csv", '"he said "no" to me\nand left",1', "a.csv:3: not valid csv .*; a quote inside .* is written twice"),
        ("a.csv.gz", '"he said "no" to me\nand left",1', "a.csv.gz:3: not valid csv"),
        ("a.tsv", '"never closed\t1\nx\t0', "a.tsv:5: not valid tsv"),
    ],
)
def test_behind_a_wrong_quote_no_row_is_trusted(tmp_path: Path, name: str, line: str, message: str) -> None:
    """It stops the run also when bad rows are left out: what follows would be a row of its own, with a label."""
    separator = "\t" if ".tsv" in name else ","
    content = f"text{separator}label\nfine{separator}1\n{line}\nlast{separator}0\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    data = DataSet((Source(str(tmp_path / name), label="label"),), on_bad_row="skip")
    with pytest.raises(UserError, match=message):
        list(read_documents(data, "x"))


def test_a_long_field_is_read(tmp_path: Path) -> None:
    """Longer than 131,072 characters, at which Python's csv stops by itself."""
    (tmp_path / "a.csv").write_text('text,label\n"' + "word, \n" * 50_000 + '",1\n')
    (found,) = read_documents(DataSet((Source(str(tmp_path / "a.csv"), label="label"),)), "x")
    assert len(found.text) == 7 * 50_000 - 2 and found.label == 1


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """A damaged or false archive, text in another encoding, JSON that holds no rows: an error each, no traceback."""
    whole = gzip.compress(json.dumps({"text": "x" * 9999}).encode() * 99)
    contents = {
        "cut.jsonl.gz": (whole[: len(whole) // 2], "cut.jsonl.gz: cannot be unpacked"),
        "false.jsonl.gz": (b"this is no archive", "false.jsonl.gz: cannot be unpacked"),
        "false.json.gz": (b"this is no archive", "false.json.gz: cannot be unpacked"),
        "latin.jsonl": ('{"text": "caf\xe9"}'.encode("latin-1"), "latin.jsonl:1: not UTF-8 text .byte 0xe9"),
        "latin.csv": ("text\nfine\ncaf\xe9\n".encode("latin-1"), "latin.csv:3: not UTF-8 text .byte 0xe9"),
        "latin.json": ('{"text": "caf\xe9"}'.encode("latin-1"), "latin.json: not UTF-8 text"),
        "five.json": (b"5", "five.json: holds a JSON int, not a list or mapping of rows"),
    }
    for name, (content, message) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            list(read_documents(DataSet(sources=(Source(str(tmp_path / name)),)), "x"))


def test_one_foreign_byte_costs_one_line(tmp_path: Path) -> None:
    """Left out with its line number; every other line is there, before it and after it."""
    lines = [json.dumps({"text": f"document {i}"}).encode() for i in range(2000)]
    lines[300] = '{"text": "caf\xe9"}'.encode("latin-1")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    skipped: list[str] = []
    found = list(read_documents(DataSet((Source(str(tmp_path / "a.jsonl")),), on_bad_row="skip"), "x", skipped))
    assert len(found) == 1999 and found[-1].text == "document 1999"
    assert skipped == ["a.jsonl:301: not UTF-8 text (byte 0xe9)"]


def test_a_file_that_ends_early_is_no_bad_row(tmp_path: Path) -> None:
    """It stops the run also when bad rows are left out: what is missing cannot be counted."""
    whole = gzip.compress(b"\n".join(json.dumps({"text": f"document {i}"}).encode() for i in range(9999)))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="a.jsonl.gz: cannot be unpacked .*; copy or download it again$"):
        list(read_documents(DataSet((Source(str(tmp_path / "a.jsonl.gz")),), on_bad_row="skip"), "x"))


def test_missing_and_empty_corpora_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; mend the path"):
        resolve(str(tmp_path / "nothing*.jsonl"))
    with pytest.raises(
        UserError, match=f"{tmp_path.name} is a folder; name the files in it, .*{tmp_path.name}/\\*.jsonl$"
    ):
        resolve(f"{tmp_path}/")
    with pytest.raises(UserError, match="package 'no_such_package' is not installed"):
        resolve("pkg://no_such_package/x.json")
    for content in ("", "\n \n"):
        (tmp_path / "empty.jsonl").write_text(content)
        with pytest.raises(UserError, match=r"data.x has no documents: .*empty.jsonl is empty"):
            list(read_documents(DataSet(sources=(Source(str(tmp_path / "empty.jsonl")),)), "x"))
    (tmp_path / "a.weird").write_text("x")
    with pytest.raises(UserError, match="set format"):
        list(read_documents(DataSet(sources=(Source(str(tmp_path / "a.weird")),)), "x"))


def test_splits_are_by_content_disjoint_and_complete(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {i}"}) for i in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("\n".join(reversed(lines)))

    def ids(name: str, low: float, high: float) -> set[str]:
        source = Source(str(tmp_path / name), split=(low, high))
        return {d.id for d in read_documents(DataSet(sources=(source,)), "x")}

    first, second = ids("a.jsonl", 0, 0.5), ids("a.jsonl", 0.5, 1)
    assert not first & second and len(first | second) == 400 and 150 < len(first) < 250
    assert ids("b.jsonl", 0, 0.5) == first
    whole = Source(str(tmp_path / "a.jsonl"))
    tenth = {d.id for d in read_documents(DataSet(sources=(whole,), sample=0.1), "x")}
    assert 15 < len(tenth) < 70 and 0 < len(tenth & first) < len(tenth)


def test_a_document_seen_twice_counts_once_and_limits_hold(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ["x", "x", "y", "z"]))
    source = Source(str(tmp_path / "a.jsonl"))
    assert [d.text for d in read_documents(DataSet(sources=(source, source)), "x")] == ["x", "y", "z"]
    every = DataSet(sources=(source, source), unique=False)
    assert [d.text for d in read_documents(every, "x")] == ["x", "x", "y", "z"] * 2
    limited = Source(source.path, limit=2)
    assert len(list(read_documents(DataSet(sources=(limited,)), "x"))) == 2


def test_document_hash_is_uniform_and_salted() -> None:
    values = np.array([document_hash(f"{i:016x}", "a") for i in range(2000)])
    assert 0.45 < values.mean() < 0.55 and values.min() >= 0 and values.max() < 1
    assert document_hash("00", "a") != document_hash("00", "b")


def test_only_corpora_that_are_soon_read_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ["x", "x", "y"]))
    data = DataSet(sources=(Source(str(tmp_path / "a.jsonl")),))
    assert count_documents(data, "x") == 2
    assert count_documents(replace(data, on_bad_row="skip"), "x") is None
    monkeypatch.setattr(text, "COUNTED_BYTES", 10)
    assert count_documents(data, "x") is None


def test_what_is_held_out_is_left_out_in_any_spelling(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {"all": ["One two.", "three FOUR", "five", "!!", "??"], "held": ["one, two", "Three four!", "!!"]}
    for name, texts in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in texts))
    every, held = (Source(path=str(tmp_path / f"{name}.jsonl")) for name in files)
    dataset = DataSet(sources=(every,), without=(held,))
    with caplog.at_level("INFO", "fac_jax.text"):
        assert [one.text for one in read_documents(dataset, "mine")] == ["five", "??"]
    assert "data.mine: 3 documents left out" in caplog.text
    limited = replace(dataset, sources=(replace(every, limit=1),))
    assert [one.text for one in read_documents(limited, "mine")] == ["five"], "what is left out does not count"
    assert [one.text for one in read_documents(replace(dataset, without=()), "mine")] == files["all"]
    with pytest.raises(UserError, match=r"data\.mine\.without has no documents"):
        list(read_documents(replace(dataset, without=(replace(held, split=(0.0, 1e-9)),)), "mine"))


def test_half_of_a_source_without_the_other_shares_no_words_with_it(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(list("abc"), 3)) for _ in range(200)]
    spelled = [text.upper() if random.random() < 0.5 else f"{text}." for text in texts]
    (tmp_path / "all.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in spelled))
    training = Source(path=str(tmp_path / "all.jsonl"), split=(0.0, 0.5))
    heldout = DataSet(sources=(replace(training, split=(0.5, 1.0)),), without=(training,))
    one, other = (
        {document.text.lower().rstrip(".") for document in read_documents(dataset, "set")}
        for dataset in (DataSet(sources=(training,)), heldout)
    )
    whole = {d.text.lower().rstrip(".") for d in read_documents(replace(heldout, without=()), "set")}
    assert one and other and not one & other and one & whole
